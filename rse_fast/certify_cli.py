"""``rse-fast certify``: certified L2 radius of every image of a test set, in a folder that a killed run continues.

The folder: ``certify.json`` (what is certified, and how), ``certified.tsv`` (a line an image with its checksum, flushed as it is done), and
at the end ``summary.json``, ``summary.md`` and ``certified.png``, certified accuracy against radius. An image's line depends on the
settings and its index alone, so a run that was killed and continued gives the table of one that was not, times apart. (Where the two
best classes of a draw are equal to rounding, another size of batch may choose the other.)
"""

import argparse
import json
import math
import platform
import shlex
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch

from rse_fast import data, run_inputs, train
from rse_fast.certifiable import input_noise
from rse_fast.cli import wrapper
from rse_fast.confidence import clopper_pearson
from rse_fast.data import lines
from rse_fast.ensemble import Ensemble
from rse_fast.smoothing import BOUNDS, COVERS, certify

RADII = (0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)  # of the summary, up to the largest that was certified


@dataclass(frozen=True)
class Row:
    """One line of the table. target: the label of the data set. label: the certified one, -1 (and radius 0) where it abstains. votes: of
    the selected class, among ``draws``."""

    index: int
    target: int
    label: int
    radius: float
    correct: int
    p_lower: float
    votes: int
    draws: int
    seconds: float


COLUMNS = [f.name for f in fields(Row)]
_HEAD = "\t".join([*COLUMNS, "crc32"]).encode()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where a file cannot be written; 2 for bad input; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    out = _parser().parse_args(argv).out
    return wrapper.run("certify", lambda: run(argv) and 0, out, ("certified.tsv",))


def run(argv: list[str]) -> dict:
    """What the command does. Returns its summary (see `summarise`).

    Raises ValueError or TypeError naming the option, OSError for a folder that cannot be written.
    """
    args = _parser().parse_args(argv)
    model, part, rows, facts = run_inputs.load(args)
    labels = torch.as_tensor(part.labels)
    some, all_classes = len(labels[list(rows)].unique()), len(labels.unique())
    if bool((labels[1:] >= labels[:-1]).all()) and some < min(all_classes, len(rows)):
        text = f"--images: the part is sorted by class, and these {len(rows)} images are of {some} of its {all_classes} classes; "
        warnings.warn(text + f"--every {max(1, len(labels) // len(rows))} takes as many of all", RuntimeWarning, stacklevel=2)
    ensemble = Ensemble(model, dtype=args.dtype, max_rows=args.max_rows, logits=args.logits)
    x = run_inputs.images(part, rows[:1], args.device)
    run_inputs.check_classes(ensemble.prepared(x).classes, labels)
    certify(ensemble, x[:0], **_procedure(args))  # what it refuses leaves no folder
    sigma = float(input_noise(model, x, args.logits).current_sigma())
    settings = facts | {
        "sigma": sigma, **_procedure(args), "dtype": str(ensemble.prepared(x).runner.compute)[6:],
    }  # fmt: skip
    settings = run_inputs.open_folder(args.out, "certify.json", settings, args.seed) | {"every": args.every}
    return _run(args, ensemble, part, rows, settings, shlex.join(["rse-fast", "certify", *argv]))


def _procedure(args):
    """The arguments of `certify` that say how; they are settings of the folder under the same names."""
    return {"n0": args.n0, "n": args.n, "alpha": args.alpha, "radii": args.radius, "tolerance": args.tolerance, "bound": args.bound}


def _parser():
    parser = argparse.ArgumentParser(prog="rse-fast certify", description=__doc__.partition("\n\n")[0].replace("``", ""))
    run_inputs.add_arguments(parser)
    parser.add_argument("--n0", type=int, default=100, metavar="DRAWS", help="draws that select the class (default: %(default)s)")
    parser.add_argument("--n", type=int, default=10_000, metavar="DRAWS", help="draws that estimate its share (default: %(default)s)")
    text = "probability that an image's statement is wrong (default: %(default)s)"
    parser.add_argument("--alpha", type=float, default=1e-3, metavar="P", help=text)
    stop = parser.add_mutually_exclusive_group()
    stop.add_argument("--radius", type=float, nargs="+", metavar="R", help="stop when 'radius >= R' is proven or given up for each R")
    stop.add_argument("--tolerance", type=float, metavar="T", help="stop when all n draws would enlarge the radius by T at most")
    text = "lower bound of the share; 'randomised' is never smaller, with a random number from the seed (default: %(default)s)"
    parser.add_argument("--bound", choices=BOUNDS, default=BOUNDS[0], help=text)
    parser.add_argument(
        "--out", type=Path, default=Path("certified"), metavar="DIR", help="folder of results, new or to continue (default: %(default)s)"
    )
    return parser


# -------------------------------------------------------------------------------------------------------------------- the table
def read_table(path: Path) -> list[Row]:
    """The whole lines of a table; a last one that was cut off is not there. Raises ValueError for another file, and a damaged one."""
    found = []
    if not path.exists():
        return found
    for number, line in lines.whole_lines(path, "--out"):
        if number == 1:
            if line != _HEAD:
                raise ValueError(f"--out: expected the columns {' '.join(COLUMNS)} crc32 in {str(path)!r}, got {line[:200]!r}")
            continue
        try:
            line, _, checksum = line.rpartition(b"\t")
            if lines.checksum(line).encode() != checksum:
                raise ValueError("its checksum differs")
            row = Row(*(f.type(value) for f, value in zip(fields(Row), line.decode().split("\t"), strict=True)))
            if not (0 <= row.index < 2**32 and row.correct in (0, 1) and 0 <= row.radius < math.inf and math.isfinite(row.seconds)):
                raise ValueError("a value is out of range")
            found.append(row)
        except ValueError as error:
            raise ValueError(f"--out: line {number} of {str(path)!r} is damaged ({str(error)[:100]})") from error
    return found


def _run(args, ensemble, part, rows, settings, command):
    path = args.out / "certified.tsv"
    table = read_table(path)
    done = {row.index for row in table}
    with data.append(path) as file:
        if not file.tell():
            file.write(_HEAD + b"\n")
        # As many neighbours at once as the selection's draws leave room for, so that a large device is not idle.
        x = run_inputs.images(part, rows[:1], args.device)
        size = max(1, ensemble.rows(x) // args.n0) if args.every == 1 else 1
        waiting = [i for i in rows if i not in done]
        with wrapper.Progress("certify", len(rows), done=len(rows) - len(waiting)) as progress:
            for group in run_inputs.neighbours(waiting, size):
                for row in _certify(args, ensemble, part, group, settings):
                    table.append(row)
                    text = "\t".join(map(str, asdict(row).values()))
                    file.write(f"{text}\t{lines.checksum(text.encode())}\n".encode())
                    file.flush()
                progress.update(len(group), f"certified {sum(r.correct for r in table) / len(table):.1%}")
    wanted = set(rows)
    table = sorted((row for row in table if row.index in wanted), key=lambda row: row.index)
    summary = summarise(table, settings, command)
    data.write_atomically(args.out / "summary.json", lambda file: file.write(json.dumps(summary, indent=1).encode()))
    data.write_atomically(args.out / "summary.md", lambda file: file.write(markdown(summary).encode()))
    defence = None if args.run is None else train.Config.load(args.run / "config.json").defence
    data.write_atomically(args.out / "certified.png", lambda file: draw(table, settings, file, defence))
    print(markdown(summary).partition("\n\n## ")[0])
    return summary


def _certify(args, ensemble, part, group, settings):
    begin = time.perf_counter()
    x = run_inputs.images(part, group, args.device)
    out = certify(ensemble, x, **_procedure(args), seed=settings["seed"], image_offset=group[0])
    seconds = (time.perf_counter() - begin) / len(group)
    for i, index in enumerate(group):
        target, label = int(part.labels[index]), int(out.labels[i])
        yield Row(
            index=index, target=target, label=label, radius=float(out.radius[i]), correct=int(label == target),
            p_lower=float(out.p_lower[i]), votes=int(out.votes[i, out.selected[i]]) if out.selected[i] >= 0 else 0,
            draws=int(out.draws[i]), seconds=round(seconds, 4),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ the summary
def certified_accuracy(table: list[Row], radius: float) -> tuple[float, float, float]:
    """Share of images whose label is right and certified to this radius, and its 95 % interval (Clopper & Pearson)."""
    count = sum(row.correct and row.radius >= radius for row in table)
    low, high = clopper_pearson(count, len(table), 0.025)
    return count / len(table), float(low), float(high)


def summarise(table: list[Row], settings: dict, command: str) -> dict:
    """Everything that `markdown` says, JSON-serialisable: settings, one entry a radius, costs, versions, what a certificate covers, and
    the command that made it."""
    largest = max(row.radius for row in table)
    radii = settings["radii"] or [r for r in RADII if r <= largest or r == 0]
    keys = ("accuracy", "low", "high")
    return {
        "command": command,
        "settings": settings,
        "images": len(table),
        "certified": [{"radius": r} | dict(zip(keys, certified_accuracy(table, r), strict=True)) for r in radii],
        "abstained": sum(row.label < 0 for row in table) / len(table),
        "wrong": sum(row.label >= 0 and not row.correct for row in table) / len(table),
        "mean_radius": sum(row.radius * row.correct for row in table) / len(table),
        "draws_per_image": settings["n0"] + sum(row.draws for row in table) / len(table),
        "seconds_per_image": sum(row.seconds for row in table) / len(table),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "rse-fast": version("rse-fast")},
        "covers": COVERS,
    }


def markdown(summary: dict) -> str:
    """The summary as a section of a report; pictures and tables lie beside it."""
    s = summary["settings"]
    early = f", stopping when the radii {', '.join(map(str, s['radii']))} are decided" if s["radii"] else ""
    if s["tolerance"] is not None:
        early = f", stopping when all n draws would enlarge the radius by {s['tolerance']:g} at most"
    rows = [
        f"| {c['radius']:g} | {100 * c['accuracy']:.1f} | {100 * c['low']:.1f} .. {100 * c['high']:.1f} |" for c in summary["certified"]
    ]
    return "\n".join(
        [
            "# Certified accuracy (L2)",
            "",
            f"{summary['images']} images ({s['data']}, {s['part']}, every {s['every']}), model {s['model']} in {s['dtype']}, noise at the "
            f"input {s['sigma']:.4g}, n0 = {s['n0']}, n = {s['n']}, alpha = {s['alpha']:g}, bound {s['bound']}, seed {s['seed']}{early}.",
            "",
            "| radius | certified accuracy % | 95 % interval |",
            "|---|---|---|",
            *rows,
            "",
            f"Abstained: {summary['abstained']:.1%}; certified with a wrong label: {summary['wrong']:.1%}; mean radius, 0 where "
            f"wrong: {summary['mean_radius']:.3f}. Cost of an image: {summary['draws_per_image']:.0f} draws, "
            f"{summary['seconds_per_image']:.3g} s.",
            "",
            "![certified accuracy against radius](certified.png)",
            "",
            "## What a certificate covers",
            "",
            summary["covers"],
            "",
            f"Made by `{summary['command']}`, seed {s['seed']}; {', '.join(f'{n} {v}' for n, v in summary['versions'].items())}; "
            f"{summary['images'] * summary['seconds_per_image']:.0f} s in all.",
            "",
        ]
    )


def draw(table: list[Row], settings: dict, file, defence: str | None = None) -> None:
    """Certified accuracy against radius, a step at each image's radius, with its 95 % interval, as PNG. defence: of the run, if any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from rse_fast.render import colour

    steps = sorted({0.0} | {row.radius for row in table if row.correct})
    points = [certified_accuracy(table, r) for r in steps]
    steps, points = [*steps, 1.05 * steps[-1] or settings["sigma"]], [*points, (0.0, 0.0, certified_accuracy(table, math.inf)[2])]
    accuracy, low, high = zip(*[[100 * v for v in point] for point in points], strict=True)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    base = colour(defence, True)
    axes.fill_between(steps, low, high, step="pre", color=base, alpha=0.2, linewidth=0)
    axes.step(steps, accuracy, where="pre", color=base)
    axes.set(xlabel="L2 radius (pixels in 0..1)", ylabel="certified accuracy (%)", xlim=(0, steps[-1]), ylim=(0, 100))
    axes.set_title(f"sigma {settings['sigma']:.3g}, n = {settings['n']}, alpha = {settings['alpha']:g}, {len(table)} images", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", dpi=120)
