"""``make battery``: the noise before statistical batteries. Parts that are done are kept, so a run that was stopped goes on.

``python -m bench.battery [BATTERY ...]``. The Philox words, in the orders in which networks take them (`ORDERS`), go through TestU01
(``smallcrush``, ``crush``, ``bigcrush``) and ``dieharder``. ``normals`` takes 10^10 normals of each unit of the CPU library: moments, a
chi-square over fine bins, tails, Anderson-Darling. Each part is one line of `ROWS`; the page is written from all of them.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy import special, stats

from rse_fast import functional
from rse_fast.kernels import cpu
from rse_fast.kernels.cpu import build

from .results import cpu_name

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "results" / "randomness.jsonl", HERE / "results" / "randomness.md"

# Which address is next: the order's meaning.
ORDERS = {
    "positions": "all words of one layer, image after image",
    "first-words": "word 0 of each quad alone, the one that gives a radius",
    "images": "4096 images side by side: the same quad of each, then the next quad",
    "draws": "4096 draws side by side",
    "streams": "4096 layers side by side",
    "seeds": "4096 consecutive seeds side by side",
    "high-seeds": "the same for seeds that differ in their high word",
    "network": "batches of 5 images and 3 draws through four layers",
}
REVERSED = "-reversed"  # the bits of each word from last to first: TestU01 looks at the first bits most

TESTU01 = {"smallcrush": ("small", 10), "crush": ("crush", 96), "bigcrush": ("big", 106)}
# All of dieharder's tests but those that its own list calls suspect (5 to 7) or not to be used (14), at its default sizes.
DIEHARDER = (0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 15, 16, 17, 100, 101, 102, 200, 201, 202, 203, 204, 205, 206, 207, 208, 209)
EVERY_ORDER = [order + ending for ending in ("", REVERSED) for order in ORDERS]
DEFAULT_ORDERS = {
    "smallcrush": EVERY_ORDER,
    "crush": ["positions", "draws" + REVERSED],
    "bigcrush": ["positions"],
    "dieharder": ["network"],
}

# Normals: parts a unit, chunks a part, of 2^20 normals each. Bins of width 1 / FINE over [-8, 8): no normal is larger than 6.77.
PARTS, CHUNKS, CHUNK, FINE = 10, 1000, (16, 64, 32, 32), 32
EDGES = np.arange(-8 * FINE, 8 * FINE + 1) / FINE
SAMPLE, EVERY = 2**16, 20  # Anderson-Darling: of so many normals of every so-many-th chunk
TAILS = (3.0, 4.0, 4.5, 5.0, 5.5, 6.0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make battery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    batteries = (*TESTU01, "dieharder", "normals")
    parser.add_argument("batteries", nargs="*", metavar="BATTERY", help=f"of {', '.join(batteries)}; default: smallcrush and normals")
    parser.add_argument("--orders", nargs="+", choices=EVERY_ORDER, metavar="ORDER", help=f"of {', '.join(EVERY_ORDER)}")
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE", help="what was found, a line a part (%(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="the page that is written from it (%(default)s)")
    arguments = parser.parse_args(argv)
    wanted = arguments.batteries or ["smallcrush", "normals"]
    if unknown := set(wanted) - set(batteries):
        parser.error(f"no battery {', '.join(sorted(unknown))}; there are {', '.join(batteries)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            if name == "normals":
                run_normals(arguments.rows)
            else:
                run_words(name, arguments.orders or DEFAULT_ORDERS[name], arguments.rows, Path(folder))
    arguments.page.write_text(page(read(arguments.rows)))
    return 0


# --------------------------------------------------------------------------------------------------------------------- rows
def read(path: Path) -> list[dict]:
    """All whole lines: the last one may have been cut off by a kill, and its part is then run again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def append(path: Path, row: dict) -> None:
    row |= {"date": datetime.date.today().isoformat(), "machine": f"{cpu_name()}, {platform.system()}"}
    torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with open(path, "a") as file:
        file.write("\n" * bool(torn) + json.dumps(row) + "\n")


def missing(path: Path, battery: str, what: str, parts) -> list[int]:
    done = {row["part"] for row in read(path) if (row["battery"], row["of"]) == (battery, what)}
    return [part for part in parts if part not in done]


# -------------------------------------------------------------------------------------------------------------------- words
def compile_words(folder: Path) -> Path:
    """The program that writes the library's words to its standard output."""
    out = folder / "words"
    if not out.exists():
        subprocess.run([*build.find_compiler(), "-O2", "-std=c++17", str(HERE / "words.cpp"), "-o", str(out), "-ldl"], check=True)
    return out


def compile_testu01(folder: Path) -> Path:
    out = folder / "testu01"
    libraries = ("-ltestu01", "-ltestu01probdist", "-ltestu01mylib", "-lm")
    compiler = os.environ.get("CC", "cc")
    if not out.exists() and subprocess.run([compiler, "-O2", str(HERE / "testu01.c"), "-o", str(out), *libraries]).returncode:
        raise SystemExit("TestU01 is missing: apt-get install libtestu01-0-dev (Debian's component non-free)")
    return out


def run_words(battery: str, orders: list[str], rows: Path, folder: Path) -> None:
    """One battery on each order, part by part; part n begins at a place of its own."""
    words = compile_words(folder)
    if battery in TESTU01:
        kind, count = TESTU01[battery]
        program, parts, arguments, parse = str(compile_testu01(folder)), range(1, count + 1), lambda n: [kind, str(n)], parse_testu01
    else:
        program, parts, arguments, parse = shutil.which("dieharder"), DIEHARDER, lambda n: ["-g", "200", "-d", str(n)], parse_dieharder
        if program is None:
            raise SystemExit("dieharder is missing: apt-get install dieharder")
    library = cpu.load()
    for order in orders:
        for part in missing(rows, battery, order, parts):
            began = time.monotonic()
            source = subprocess.Popen([words, library.path, library.unit, order, str(part)], stdout=subprocess.PIPE)
            done = subprocess.run([program, *arguments(part)], stdin=source.stdout, capture_output=True, text=True)
            source.stdout.close()
            source.wait()
            results = parse(done.stdout)
            if done.returncode or not results:
                raise SystemExit(f"{battery}, part {part} of {order} failed: {done.stderr[-2000:]}")
            row = {"battery": battery, "of": order, "part": part, "unit": library.unit, "seconds": round(time.monotonic() - began, 1)}
            append(rows, row | {"results": results})
            print(f"{battery} {order} {part}: {', '.join(f'{name} {p:.3g}' for name, p in results)}", flush=True)


def parse_testu01(text: str) -> list[tuple[str, float]]:
    return [(name, float(p)) for p, name in (line.split("\t") for line in text.splitlines())]


def parse_dieharder(text: str) -> list[tuple[str, float]]:
    """Its table: name | ntup | tsamples | psamples | p-value | assessment."""
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if not line.startswith("#")]
    return [(f"{c[0]} {c[1]}", float(c[4])) for c in cells if len(c) == 6 and re.fullmatch(r"[01]\.\d+", c[4])]


# ------------------------------------------------------------------------------------------------------------------ normals
def run_normals(rows: Path) -> None:
    library = cpu.load()
    try:
        for unit in library.units:
            library.handle.rse_select_unit(unit.encode())
            for part in missing(rows, "normals", unit, range(PARTS)):
                began = time.monotonic()
                found = measure(part)
                append(rows, {"battery": "normals", "of": unit, "part": part, "seconds": round(time.monotonic() - began, 1)} | found)
                print(f"normals {unit} {part}: mean {found['sums'][0] / found['count']:.2g}", flush=True)
    finally:
        library.handle.rse_select_unit(library.unit.encode())


def measure(part: int) -> dict:
    """Sums of powers, counts in bins and Anderson-Darling's statistic of a part's normals: as users get them, from `add_noise`."""
    zeros = torch.zeros(CHUNK)
    sums, counts, squares = np.zeros(6), np.zeros(len(EDGES) - 1, np.int64), []
    for chunk in range(CHUNKS):
        layout = torch.channels_last if chunk % 2 else torch.contiguous_format
        x = zeros.to(memory_format=layout)
        z = functional.add_noise(x, 1.0, seed=part, stream=chunk, backend="cpu").permute(0, 2, 3, 1).reshape(-1).numpy()
        for piece in z.reshape(-1, 2**15):  # stays in the cache
            counts += np.bincount(((piece + np.float32(8)) * np.float32(FINE)).astype(np.int32), minlength=len(counts))
            one = piece.astype(np.float64)
            two = one * one
            three = two * one
            sums += one.sum(), one @ one, one @ two, two @ two, two @ three, three @ three
        if chunk % EVERY == 0:
            squares.append(anderson_darling(z[:SAMPLE].astype(np.float64)))
    return {"count": CHUNKS * zeros.numel(), "sums": sums.tolist(), "counts": counts.tolist(), "squares": squares}


def anderson_darling(z: np.ndarray) -> float:
    """A^2 against N(0, 1), all of whose parameters are known."""
    z = np.sort(z)
    i = np.arange(1, len(z) + 1)
    return float(-len(z) - np.mean((2 * i - 1) * (special.log_ndtr(z) + special.log_ndtr(-z[::-1]))))


def anderson_darling_p(square: float) -> float:
    """The upper tail of A^2 for many values (Marsaglia and Marsaglia 2004, their short form; good to 5e-6)."""
    if square <= 0:
        return 1.0
    if square < 2:
        inner = 2.00012 + (0.247105 - (0.0649821 - (0.0347962 - (0.0116720 - 0.00168691 * square) * square) * square) * square) * square
        return float(1 - square**-0.5 * np.exp(-1.2337141 / square) * inner)
    inner = 1.0776 - (2.30695 - (0.43424 - (0.082433 - (0.008056 - 0.0003146 * square) * square) * square) * square) * square
    return float(1 - np.exp(-np.exp(inner)))


def judge(parts: list[dict]) -> list[tuple[str, str, float]]:
    """(statistic, what was found, p-value) of all normals of a unit; p-values of two sides but for the chi-square."""
    count = sum(part["count"] for part in parts)
    sums, counts = (np.sum([part[key] for part in parts], 0) for key in ("sums", "counts"))
    rows = []
    moments = [special.factorial2(k - 1) if k % 2 == 0 else 0.0 for k in range(1, 13)]  # of N(0, 1): 0, 1, 0, 3, 0, 15, ...
    for k in range(1, 7):
        mean, error = sums[k - 1] / count, np.sqrt((moments[2 * k - 1] - moments[k - 1] ** 2) / count)
        z = (mean - moments[k - 1]) / error
        rows.append((f"moment {k}", f"{mean:.9g}, {z:+.2f} standard errors from {moments[k - 1]:g}", float(2 * stats.norm.sf(abs(z)))))
    middle = special.ndtr(EDGES[1:]) - special.ndtr(EDGES[:-1])
    lower = special.ndtr(-EDGES[:-1]) - special.ndtr(-EDGES[1:])
    expected = count * np.where(EDGES[:-1] < 0, middle, lower)  # the difference of the small ones
    inside = expected >= 20
    got = [*counts[inside], counts[~inside].sum()]
    wanted = [*expected[inside], count - expected[inside].sum()]
    square = float(np.sum((np.array(got) - wanted) ** 2 / wanted))
    rows.append((f"chi-square, {len(got)} bins", f"{square:.1f}", float(stats.chi2.sf(square, len(got) - 1))))
    for t in TAILS:
        for side, inside in (("below -", EDGES[:-1] < -t), ("above ", EDGES[:-1] >= t)):
            got, mean = int(counts[inside].sum()), count * float(special.ndtr(-t))
            p = 2 * min(stats.poisson.cdf(got, mean), stats.poisson.sf(got - 1, mean))
            rows.append((f"{side}{t:g}", f"{got}, expected {mean:.1f}", min(1.0, float(p))))
    squares = [anderson_darling_p(square) for part in parts for square in part["squares"]]
    text = f"{len(squares)} samples of {SAMPLE}; smallest p {min(squares):.2g}"
    rows.append(("Anderson-Darling, p-values uniform", text, float(stats.kstest(squares, "uniform").pvalue)))
    return rows


# --------------------------------------------------------------------------------------------------------------------- page
def page(rows: list[dict]) -> str:
    """Markdown: what was run, how large, every figure of the normals, and the p-values that stand out."""
    lines = [
        "# Randomness",
        "",
        "Written by `make battery` from `randomness.jsonl`, which holds every p-value. The words are those of the CPU library (its test",
        "entry point `rse_sample`, all units give the same bits), the normals those of `functional.add_noise` at sigma 1. Debian does not",
        "package PractRand; dieharder takes its place (without its tests 5, 6, 7 and 14: its list calls them suspect or not to be used).",
        "",
        "```",
        'make battery ARGS="smallcrush normals"',
        f'make battery ARGS="crush --orders {" ".join(DEFAULT_ORDERS["crush"])}"',
        f'make battery ARGS="dieharder --orders {" ".join(DEFAULT_ORDERS["dieharder"])}"',
        "```",
        "",
        "Orders, each also with the bits of every word reversed (`-reversed`):",
        "",
        *(f"- `{name}`: {meaning}" for name, meaning in ORDERS.items()),
        "",
        "## Words",
        "",
        "A right generator gives p-values that are uniform in [0, 1]: of n, n / 500 lie outside [0.001, 0.999]. TestU01 calls a test",
        "failed outside [1e-10, 1 - 1e-10]. Parts: tests of the battery that are done.",
        "",
        "| battery | order | parts | p-values | smallest | largest | outside [0.001, 0.999] | expected | hours | date |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    size = {**{name: count for name, (_, count) in TESTU01.items()}, "dieharder": len(DIEHARDER)}
    values, apart = [], []
    for battery in size:
        for order in EVERY_ORDER:
            here = [row for row in rows if (row["battery"], row["of"]) == (battery, order)]
            if not here:
                continue
            p = [p for row in here for _, p in row["results"]]
            values += p
            outside = [(battery, order, row["part"], n, v) for row in here for n, v in row["results"] if not 0.001 <= v <= 0.999]
            apart += outside
            hours = sum(row["seconds"] for row in here) / 3600
            lines.append(
                f"| {battery} | {order} | {len(here)} of {size[battery]} | {len(p)} | {min(p):.2g} | {_near_one(max(p))} | {len(outside)} "
                f"| {len(p) / 500:.1f} | {hours:.2f} | {max(row['date'] for row in here)} |"
            )
    if values:
        lines += ["", f"In all {len(values)} p-values, {len(apart)} outside [0.001, 0.999] where {len(values) / 500:.1f} are expected:", ""]
        lines += ["| battery | order | part | statistic | p |", "|---|---|---:|---|---:|"]
        lines += [f"| {b} | {order} | {part} | {name} | {_near_one(p)} |" for b, order, part, name, p in apart]
    lines += ["", "## Normals", "", "Every unit takes the same seeds: what differs between them is rounding.", ""]
    for unit in build.UNITS:
        here = [row for row in rows if (row["battery"], row["of"]) == ("normals", unit)]
        if here:
            lines += [f"### Unit {unit}: {sum(row['count'] for row in here):.4g} normals ({here[-1]['machine']}, {here[-1]['date']})", ""]
            lines += ["| statistic | found | p |", "|---|---|---:|"]
            lines += [f"| {name} | {found} | {p:.3g} |" for name, found, p in judge(here)] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _near_one(p: float) -> str:
    return f"{p:.2g}" if p < 0.99 else f"1 - {1 - p:.2g}"


if __name__ == "__main__":
    sys.exit(main())
