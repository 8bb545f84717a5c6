"""``python -m bench [--suite noise ensemble] [--out FILE]``: measures, prints tables with ratios, writes JSON."""

import argparse
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import ensemble, measure, noise

SUITES = {"noise": noise.run, "ensemble": ensemble.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--out", type=Path, default=Path("bench-results.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    rows, targets, console = [], [], Console(width=110)
    for suite in arguments.suite:
        measured, wanted = SUITES[suite]()
        rows, targets = rows + measured, targets + wanted
        show(console, measured, wanted)
        measure.write(arguments.out, rows, targets)  # after each suite: an interrupted run keeps what it has
    console.print(f"written to {arguments.out}")


def show(console, rows, targets) -> None:
    for (suite, case), group in groupby(rows, lambda r: (r.suite, r.case)):
        group = list(group)
        table = Table("implementation", *(f"{p} {group[0].unit}" for p in ("p20", "p50", "p80")), "rse_fast / it", title=f"{suite}: {case}")
        for row in group:
            ratio = group[0].p50 / row.p50
            table.add_row(row.implementation, f"{row.p20:.3g}", f"{row.p50:.3g}", f"{row.p80:.3g}", f"{ratio:.2f}")
        console.print(table)
    table = Table("case", "what", "measured", "target", "holds", title="targets")
    for t in targets:
        table.add_row(t["case"], t["what"], f"{t['value']:.3g} {t['unit']}", f">= {t['target']:g}", "yes" if t["holds"] else "NO")
    console.print(table)


if __name__ == "__main__":
    main()
