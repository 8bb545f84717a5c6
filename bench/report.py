"""Results as tables: in the terminal, and as Markdown in bench/RESULTS.md between its markers."""

import os
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import results, targets
from .measure import COSTS, role

console = Console(width=120)
KEY = ("suite", "case", "metric")


def tables(found: dict) -> list[list[dict]]:
    """The rows of each (suite, case, metric), in the order in which they were first measured."""
    groups: dict[tuple, list[dict]] = {}
    for row in found["rows"]:
        groups.setdefault(tuple(row[name] for name in KEY), []).append(row)
    return list(groups.values())


def advantage(ours: dict | None, other: dict | None) -> float | None:
    """How many times better ``ours`` is than ``other``; below 1 it is worse."""
    if ours is None or other is None or not ours["p50"] or not other["p50"]:
        return None
    return other["p50"] / ours["p50"] if ours["unit"] in COSTS else ours["p50"] / other["p50"]


def best(rows: list[dict], kind: str) -> dict | None:
    """The best measured row of one role."""
    rows = [row for row in rows if role(row["implementation"]) == kind and row["p50"] is not None]
    pick = min if rows and rows[0]["unit"] in COSTS else max
    return pick(rows, key=lambda row: row["p50"], default=None)


def headline(rows: list[dict]) -> str:
    """rse-fast against the best peer and against the limit, in one line."""
    ours = next((row for row in rows if role(row["implementation"]) == "rse_fast" and row["p50"] is not None), None)
    peer = best(rows, "peer")
    others = [(peer, "the best peer, ")] * bool(peer) + [(row, "") for row in rows if role(row["implementation"]) == "limit"]
    return "; ".join(f"{times:.3g}x {words}{row['implementation']}" for row, words in others if (times := advantage(ours, row)) is not None)


def show(found: dict) -> None:
    for rows in tables(found):
        first = rows[0]
        ours = next((row for row in rows if role(row["implementation"]) == "rse_fast" and row["p50"] is not None), None)
        title = f"{first['suite']}: {first['case']}, {first['metric']}"
        table = Table("implementation", *(f"{p} {first['unit']}" for p in ("p20", "p50", "p80")), "rse_fast / it, or why not", title=title)
        table.caption = headline(rows)
        for row in rows:
            if row["p50"] is None:
                table.add_row(row["implementation"], "", "", "", row["error"])
                continue
            times = advantage(ours, row)
            figures = (f"{row[p]:.3g}" for p in ("p20", "p50", "p80"))
            table.add_row(row["implementation"], *figures, "" if times is None else f"{times:.2f}")
        console.print(table)
    if found["targets"]:
        table = Table("suite", "case", "what", "measured", "target", "holds", title="targets")
        for t in found["targets"]:
            table.add_row(t["suite"], t["case"], t["what"], measured(t), wanted(t), verdict(t))
        console.print(table)


def show_targets(found: dict) -> None:
    table = Table("on", "task", "measured", "target", "holds", title="every target, judged on what was measured")
    for aim, t in targets.judge(found["targets"]):
        table.add_row(aim.hardware, aim.task, measured(t), wanted(t), verdict(t))
    console.print(table)


def measured(t: dict) -> str:
    if t["value"] is None:
        return "not measured here"
    digits = 3  # more of them where rounding would show a missed target as reached
    while t["holds"] is False and digits < 9 and float(f"{t['value']:.{digits}g}") == t["target"]:
        digits += 1
    return f"{t['value']:.{digits}g} {t['unit']}".strip()


def wanted(t: dict) -> str:
    return f"{'<=' if t['at_most'] else '>='} {t['target']:g} {t['unit']}".strip()


def verdict(t: dict) -> str:
    return {True: "yes", False: "NO", None: f"needs {t['needs']}" if t["needs"] else "not measured"}[t["holds"]]


def show_comparison(found: list[dict], tolerance: float) -> None:
    title = f"regressions: more than {tolerance:g} times worse"
    table = Table("suite", "case", "implementation", "old", "new", "unit", "times worse", title=title)
    for item in found:
        mark = "REGRESSION " if item["worse"] > tolerance else ""
        table.add_row(
            *(item[name] for name in ("suite", "case", "implementation")), f"{item['old']:.3g}", f"{item['new']:.3g}", item["unit"],
            f"{mark}{item['worse']:.2f}",
        )  # fmt: skip
    console.print(table)


# ---------------------------------------------------------------------------------------------------------------------- Markdown
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COMMAND = "rse-fast bench --results"
# What the suites' tables say above them in RESULTS.md; suites that are not here are not in it.
HEADINGS = {
    "noise": "`x + sigma * eps`, by dtype, layout and number of elements",
    "convolution": "3x3 convolutions, in multiplications and additions of the direct algorithm",
    "ensemble": "The ensemble of n draws",
    "early_exit": "Early exit, on trained networks (handwritten digits are easy images, so many leave early)",
    "int8": "8-bit ensembles",
    "train": "Training",
    "attack": "Attacks",
    "certify": "Certification",
    "startup": "Startup",
    "host": "The host's part",
}


def markdown(found: dict, name: str) -> str:
    """One machine's results: its name, the targets, and folded away a table for each suite and metric."""
    rows = found["rows"]
    commits = ", ".join(sorted({row["commit"][:9] + row["commit"][40:] for row in rows}))
    date = min(row["date"] for row in rows)[:10]
    about = f"{rows[0]['versions']}; measured {date} at {commits}; medians, each case timed in turns ([all figures]({name}))."
    here = hardware(found)
    meant = "two cores with AVX-512 BF16" if here == "CPU" else "an H200"
    lines = [f"### {results.machine(rows[0])}", "", about, "", f"Targets, set for {meant}:", ""]
    lines += ["| task | measured | target | holds |", "|---|---|---|---|"]
    judged = targets.judge(found["targets"])
    lines += [f"| {p.task} | {measured(t)} | {wanted(t)} | {verdict(t)} |" for p, t in judged if p.hardware == here]
    suites = {suite: pivots for suite in HEADINGS if (pivots := _pivots(rows, suite))}
    lines += ["", f"<details><summary>Every implementation: {', '.join(suites).replace('_', ' ')}</summary>"]
    for suite, pivots in suites.items():
        for (metric, unit), table in pivots.items():
            label = ", ".join(part for part in (metric, unit) if part)
            lines += ["", f"{HEADINGS[suite]}: {label}", "", *table]
    return "\n".join([*lines, "", "</details>"])


def hardware(found: dict) -> str:
    return "CPU" if found["rows"][0]["device"] == "cpu" else "GPU"


def _pivots(rows: list[dict], suite: str) -> dict[tuple, list[str]]:
    """{(metric, unit): lines of a table} with implementations down and cases across; below it the errors of those that did not run."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["suite"] == suite and _in_page(row, rows):
            found.setdefault((row["metric"], row["unit"]), []).append(row)
    return {key: _pivot(part) for key, part in found.items()}


def _in_page(row: dict, rows: list[dict]) -> bool:
    if row["suite"] == "noise":
        return row["case"].endswith(" 4M") or row["device"] != "cpu"
    if row["suite"] == "convolution":  # a full packed batch
        return row["case"].endswith(" 80 rows")
    if row["suite"] == "ensemble":  # the cases with every peer
        return len([r for r in rows if r["suite"] == "ensemble" and r["case"] == row["case"]]) > 5
    return True


def _pivot(rows: list[dict]) -> list[str]:
    cases, names = list(dict.fromkeys(r["case"] for r in rows)), list(dict.fromkeys(r["implementation"] for r in rows))
    cells = {(r["implementation"], r["case"]): r for r in rows}
    lines = ["| | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(_cell(cells.get((name, case))) for case in cases) + " |")
    errors = dict.fromkeys((r["implementation"], r["error"]) for r in rows if r["error"])
    return lines + ([""] if errors else []) + [f"{name}, not timed: {error}" + "  " for name, error in errors]


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    return "-" if row["p50"] is None else f"{row['p50']:.3g}"


def write_page(page: Path, paths: list[Path]) -> None:
    """Writes the tables of these results files between the markers of ``page``. Raises ValueError without the markers."""
    text = page.read_text()
    if len(re.findall(re.escape(BEGIN), text)) != 1 or text.find(END) < text.find(BEGIN):
        raise ValueError(f"{page} must hold {BEGIN} once and {END} after it")
    parts, seen = [], set()
    for path in paths:
        found = results.load(path)
        if not found["rows"]:
            raise ValueError(f"{path} holds no results")
        parts.append(markdown(found, Path(os.path.relpath(path, page.parent)).as_posix()))  # links are relative to the page
        seen.add(hardware(found))
    for missing in sorted({"CPU", "GPU"} - seen):
        unmeasured = [f"| {p.task} | {wanted(t)} |" for p, t in targets.judge([]) if p.hardware == missing]
        heading = [f"### Not measured: needs a {missing}", "", "| task | target |", "|---|---|"]
        parts.append("\n".join(heading + unmeasured))
    command = f"{COMMAND} {' '.join(map(str, paths))}"
    before, rest = text.split(BEGIN)
    body = "\n\n".join([f"Written by `{command}` from results of `rse-fast bench`.", *parts])
    results.write_whole(page, f"{before}{BEGIN}\n{body}\n{END}{rest.split(END, 1)[1]}")
