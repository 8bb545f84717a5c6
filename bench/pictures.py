"""Pictures of a results file: throughput against batch and draws, the roofline of the noise, memory against draws.

``python -m rse_fast.bench.pictures`` in a checkout draws the picture of README.md and of the documentation from the committed results.
"""

import io
import json
import re
from pathlib import Path

import matplotlib
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from rse_fast.render import NETWORKS  # noqa: E402

from . import report, results  # noqa: E402
from .measure import role  # noqa: E402

RSE, PLAIN, ADVERSARIAL = NETWORKS["rse"], NETWORKS["plain"], NETWORKS["adversarial"]


def draw(found: dict, folder: Path) -> list[Path]:
    """Writes the pictures that the results allow as PNG files into ``folder`` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, paint in PICTURES.items():
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        if paint(axes, found):
            figure.suptitle(results.machine(found["rows"][0]), fontsize="x-small", color="gray")
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize="x-small")
            made.append(folder / f"{name}.png")
            figure.savefig(made[-1], dpi=130, metadata={"Software": None})
        plt.close(figure)
    return made


def _series(found: dict, suite: str, metric: str, pattern: str) -> dict[str, list[tuple[int, dict]]]:
    """{implementation: [(x, row), ...] by x} of the cases that match ``pattern``, whose one group is x."""
    series: dict[str, list] = {}
    for row in found["rows"]:
        match = re.fullmatch(pattern, row["case"])
        if match and row["suite"] == suite and row["metric"] == metric and row["p50"] is not None:
            series.setdefault(row["implementation"], []).append((int(match[1]), row))
    return {name: sorted(points, key=lambda p: p[0]) for name, points in series.items() if len(points) > 1}


def _lines(axes, series) -> bool:
    for name, points in series.items():
        kind = role(name)
        style = {"rse_fast": "o-", "peer": "s--", "limit": "k:"}[kind]
        x = [x for x, _ in points]
        axes.plot(x, [row["p50"] for _, row in points], style, label=name, linewidth=2 if kind == "rse_fast" else 1)
        axes.fill_between(x, [row["p20"] for _, row in points], [row["p80"] for _, row in points], alpha=0.15)
    axes.set_xscale("log", base=2)
    return bool(series)


def throughput_against_batch(axes, found) -> bool:
    axes.set(xlabel="batch (images)", ylabel="images/s", ylim=(0, None), title="VGG16 at 32x32, 10 draws")
    return _lines(axes, _series(found, "ensemble", "images", r"VGG16 32x32 B=(\d+) n=10"))


def throughput_against_draws(axes, found) -> bool:
    batch = next((b for b in (4, 64) if _series(found, "ensemble", "images", rf"VGG16 32x32 B={b} n=(\d+)")), 4)
    axes.set(xlabel="draws", ylabel="images/s", yscale="log", title=f"VGG16 at 32x32, {batch} images")
    return _lines(axes, _series(found, "ensemble", "images", rf"VGG16 32x32 B={batch} n=(\d+)"))


def memory_against_draws(axes, found) -> bool:
    axes.set(xlabel="draws", ylabel="peak memory, MB", yscale="log", title="chain of convolutions, 8 images of 32x32")
    return _lines(axes, _series(found, "growth", "peak memory", r"draws=(\d+)"))


def roofline(axes, found) -> bool:
    """G normals/s against normals a byte moved: the memory's roof is the copy, the arithmetic's is Philox without Box-Muller."""
    largest = [rows for rows in report.tables(found) if rows[0]["suite"] == "noise" and rows[0]["case"].endswith((" 4M", " 512M"))]
    points, copies, words = {}, [], []
    for rows in largest:
        width = 4 if rows[0]["case"].startswith("float32") else 2
        for row in rows:
            if row["p50"] is None:
                continue
            if row["implementation"].startswith("copy"):
                copies.append(2 * width * row["p50"])
            elif row["implementation"].startswith("Philox"):
                words.append(row["p50"])
            else:
                points.setdefault(row["implementation"], []).append((1 / (2 * width), row["p50"]))
    if not copies:
        return False
    intensity = [1 / 16, 1 / 2]
    axes.plot(intensity, [max(copies) * i for i in intensity], "k-", label=f"copy: {max(copies):.3g} GB/s")
    if words:
        axes.axhline(max(words), color="k", linestyle=":", label=f"Philox words alone: {max(words):.3g} G/s")
    for name, measured in points.items():
        rate = max(y / x for x, y in measured)
        marker = "o" if role(name) == "rse_fast" else "x"
        axes.plot(*zip(*measured, strict=True), marker, label=f"{name}: at most {rate:.3g} GB/s")
    axes.set(xlabel="normals a byte moved (float32 1/8, bfloat16 1/4)", ylabel="G normals/s", title="noise: roofline")
    axes.set(xscale="log", yscale="log")
    return True


PICTURES = {
    "throughput-batch": throughput_against_batch,
    "throughput-draws": throughput_against_draws,
    "memory-draws": memory_against_draws,
    "roofline": roofline,
}


# -------------------------------------------------------------------------------------------------------------- front picture
def front(table: dict, found: dict, out: Path) -> None:
    """Writes README's picture: accuracy of three networks under attack, and cost of the ensemble against its draws.

    Args:
        table: what rse_fast/evaluate/table.py has written as table.json.
        found: a results file of the ensemble suite.
        out: PNG file to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    networks = {"plain": ("no defence", PLAIN), "rse": ("RSE, 10 draws", RSE), "adversarial": ("adversarial training", ADVERSARIAL)}
    columns = {"clean": "clean", "c = 0.03": "C&W\nc = 0.03", "c = 0.1": "C&W\nc = 0.1", "PGD 8/255": "PGD\n8/255",
               "AutoAttack 8/255": "AutoAttack\n8/255"}  # fmt: skip
    for place, (name, (label, colour)) in enumerate(networks.items()):
        cells = [table["rows"][name]["cells"][column]["accuracy"] for column in columns]
        heights = [100 * cell["mean"] for cell in cells]
        errors = [[100 * (c["mean"] - c["low"]) for c in cells], [100 * (c["high"] - c["mean"]) for c in cells]]
        x = [i + 0.27 * (place - 1) for i in range(len(columns))]
        left.bar(x, heights, 0.25, yerr=errors, color=colour, label=label, error_kw={"linewidth": 1, "ecolor": "0.3"})
    left.set_xticks(range(len(columns)), columns.values())
    left.set(ylabel="accuracy, %", ylim=(0, 100), title="Accuracy under attack (CIFAR-10, 100 images)")
    series = _series(found, "ensemble", "images", r"VGG16 32x32 B=4 n=(\d+)")
    shown = {"eager loop": ("loop of noisy passes", "0.55", "s--"), "eager packed": ("the same, one packed batch", "0.3", "^--"),
             "plain network, packed bfloat16 (limit)": ("as many plain passes, bfloat16", PLAIN, ":"),
             "rse_fast": ("rse-fast", RSE, "o-")}  # fmt: skip
    for name, (label, colour, style) in shown.items():
        draws, rates = zip(*((n, row["p50"]) for n, row in series[name]), strict=True)
        right.plot(draws, [1000 / rate for rate in rates], style, color=colour, label=label)
    right.set(xscale="log", yscale="log", xlabel="draws", ylabel="ms an image", title="Cost (VGG16, 2 CPU cores)")
    right.set_xticks([1, 10, 50, 100], [1, 10, 50, 100])
    right.set_yticks([3, 10, 30, 100, 300, 1000], [3, 10, 30, 100, 300, 1000])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    plt.close(figure)
    # 256 colours instead of all: a third of the bytes, which every sdist carries.
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    committed = Path(__file__).parent / "results"
    table = json.loads((committed / "cifar10" / "table.json").read_text())
    front(table, results.load(committed / "epyc-avx512bf16.json"), Path(__file__).parent.parent / "docs" / "assets" / "front.png")
