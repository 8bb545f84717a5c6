"""``rse-fast bench``: measures rse-fast beside its peers and limits, prints tables with ratios, merges the results into a file.

One suite, or one case, can be measured at a time: what FILE holds of the same machine is kept, and measured cases replace their old
figures. ``--compare`` and ``--compare-ref`` look for regressions; ``--report`` and ``--results`` measure nothing.
"""

import argparse
import fnmatch
import importlib
import math
import sys
import time
import warnings
from pathlib import Path

from rse_fast.cli import wrapper

from . import measure, report, results

# name: the module that holds the suite
SUITES = ("noise", "convolution", "ensemble", "early_exit", "int8", "train", "attack", "certify", "startup", "host", "growth", "gpu")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 when a comparison finds a regression or a result was refused; 2 for bad arguments (see
    `wrapper.run`)."""
    arguments = parse(argv)
    return wrapper.run("bench", lambda: run(arguments))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rse-fast bench", description=__doc__.replace("``", ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=None, help="default: all that this machine can run")
    parser.add_argument("--case", default="*", metavar="GLOB", help="only cases whose name matches, such as '*B=16*'")
    listed = dict(nargs="?", const="", choices=("", "cpu", "cuda"), metavar="DEVICE")
    parser.add_argument("--list", **listed, help="print the names of suites and cases, here or on a cpu or cuda device; measure nothing")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="start no further case after so many seconds")
    parser.add_argument("--out", type=Path, default=Path("bench-results.json"), metavar="FILE", help="JSON (default: %(default)s)")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="compare with the results of OLD.json; exit 1 on a regression")
    parser.add_argument("--compare-ref", metavar="GITREF", help="compare that commit and this checkout, measured in turns in one run")
    parser.add_argument("--tolerance", type=float, default=1.1, metavar="RATIO", help="times worse that are a regression (%(default)s)")
    parser.add_argument("--report", action="store_true", help="tables and pictures of what FILE holds; measures nothing")
    parser.add_argument("--results", nargs="+", type=Path, metavar="FILE", help="write RESULTS.md and SCALING.md in bench/ from these")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)  # implementations whose name begins so; for --compare-ref
    arguments = parser.parse_args(argv)
    if arguments.compare and not arguments.compare.exists():
        parser.error(f"--compare: {arguments.compare} does not exist")
    if not arguments.tolerance >= 1:
        parser.error(f"--tolerance must be at least 1, got {arguments.tolerance}")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    if arguments.results:
        from . import scaling

        report.write_page(Path("bench/RESULTS.md"), arguments.results)
        scaling.write(Path("bench/SCALING.md"), arguments.results)
        return 0
    if arguments.compare_ref:
        from . import reference_run

        return verdict(*reference_run.measure(arguments.compare_ref, arguments.suite, arguments.case), arguments.tolerance)
    if not arguments.report:
        with measure.choice(device=arguments.list or ""):
            chosen = cases(arguments.suite, arguments.case)
        if arguments.list is not None:
            print("\n".join(f"{suite}: {name}" for suite, name in chosen))
            return 0
        old = results.load(arguments.compare) if arguments.compare else None  # before it is overwritten, if it is the same file
        with measure.choice(only=arguments.only):
            new = measure_cases(chosen, arguments.out, arguments.seconds)
        return verdict(old, new, arguments.tolerance) if arguments.compare else 0
    return show_report(arguments.out)


def cases(suites: list[str] | None, pattern: str) -> dict:
    """{(suite, case): function that measures it}. Raises ValueError where nothing matches."""
    found = {}
    for suite in suites or SUITES:
        try:
            module = importlib.import_module(f".{suite}", __package__)
            pieces = module.cases() if hasattr(module, "cases") else {"all": module.run}
        except Exception as error:  # a suite that cannot run here is no reason not to run the others
            problem = f"suite {suite} cannot run here: {type(error).__name__}: {error}"
            if suites:
                raise ValueError(problem) from error
            print(f"rse-fast bench: {problem}", file=sys.stderr)
            continue
        found.update({(suite, name): piece for name, piece in pieces.items() if name == "all" or fnmatch.fnmatch(name, pattern)})
    if not found:
        raise ValueError(f"--case {pattern!r} matches no case; --list prints their names")
    return found


def measure_cases(chosen: dict, out: Path, seconds: float) -> dict:
    """Measures, prints and merges into ``out`` case by case, so an interrupted run keeps what it has. Returns what was measured."""
    begin = time.monotonic()
    results.load(out)  # a file that is something else is an error now, not after minutes
    new = {"rows": [], "targets": []}
    for (suite, name), piece in chosen.items():
        if time.monotonic() - begin > seconds:
            report.console.print(f"no time left for {suite}: {name}")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of peers; what goes wrong with them is in the table
            rows, targets = piece()
        environment = results.environment()
        results.save(out, results.merge(results.load(out), rows, targets, environment))
        found = results.merge({"rows": [], "targets": []}, rows, targets, environment)
        report.show(found)
        new = {key: new[key] + found[key] for key in new}
    report.show_targets(results.load(out))
    report.console.print(f"merged into {out}")
    return new


def show_report(path: Path) -> int:
    from . import pictures

    found = results.load(path)
    if not found["rows"]:
        raise ValueError(f"{path} holds no results")
    report.show(found)
    report.show_targets(found)
    made = pictures.draw(found, path.with_suffix(""))
    report.console.print(f"{len(made)} pictures in {path.with_suffix('')}")
    return 0


def verdict(old: dict, new: dict, tolerance: float) -> int:
    """Prints the comparison; 1 if a figure of rse-fast got worse by more than ``tolerance``."""
    found = results.slowdowns(old, new)
    report.show_comparison(found, tolerance)
    return int(any(item["worse"] > tolerance for item in found))


if __name__ == "__main__":
    sys.exit(main())
