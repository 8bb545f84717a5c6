"""Pieces of reports: how a figure is written, Markdown tables, plain figures of matplotlib that need no display, colours of networks."""

from torch import Tensor

# Okabe & Ito's palette, distinct for colour-blind readers; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "so^vDPX"
# One network has one colour in every picture; what is done to it has its own shade, marker or line.
NETWORKS = dict(
    zip(("rse", "plain", "adversarial", "distillation", "brelu", "rse+adversarial", "gaussian"), COLOURS, strict=True),
)


def colour(defence: str | None, noisy: bool) -> str:
    """The colour of a network. defence: None for a network that was not trained here, of which only its noise is known."""
    return NETWORKS[defence or ("rse" if noisy else "plain")]


def shades(base: str, count: int) -> list[dict]:
    """Styles of ``count`` lines that are all of one network: its colour from pale to full, each with a marker of its own."""
    from matplotlib.colors import to_hex, to_rgb

    pale = [0.6 * (count - 1 - i) / max(count - 1, 1) for i in range(count)]
    colours = [to_hex([white + (1 - white) * channel for channel in to_rgb(base)]) for white in pale]
    return [{"color": shade, "marker": MARKERS[i % len(MARKERS)]} for i, shade in enumerate(colours)]


def percent(estimate: dict) -> str:
    """ "88.6 ± 0.4 (86.1–90.8)": mean, sd over repeats where there are several, 95 % interval."""
    spread = "" if estimate["sd"] is None else f" ± {100 * estimate['sd']:.1f}"
    return f"{100 * estimate['mean']:.1f}{spread} ({100 * estimate['low']:.1f}–{100 * estimate['high']:.1f})"


def radius(eps: float) -> str:
    """As given: 0.15 stays 0.15, what is long as a decimal fraction but a whole number of grey levels is written like 8/255."""
    whole = abs(eps * 255 - round(eps * 255)) < 1e-6
    return f"{round(eps * 255)}/255" if whole and len(f"{eps:g}") > 5 else f"{eps:g}"


def markdown_table(rows: list[tuple[str, ...]]) -> str:
    """The first row is the header. Columns of figures are set to the right."""
    header, *body = rows
    columns = zip(*body, strict=True) if body else [()] * len(header)
    rule = ["---:" if all(cell.strip("*")[:1].isdigit() or cell == "–" for cell in column) else "---" for column in columns]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(rule) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def new_figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws to memory, whatever display or backend is configured
    return figure


def prepare(axes, xlabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def errors(estimates: list[dict]) -> list[list[float]]:
    """Distances below and above the mean, in %; never negative (rounding at 0 and 100 %)."""
    return [[100 * max(0.0, e["mean"] - e["low"]) for e in estimates], [100 * max(0.0, e["high"] - e["mean"]) for e in estimates]]


def draws_panel(axes, rows: list[dict], style: dict) -> None:
    """Accuracy against the number of draws, with a band: ``rows`` of {draws, mean, low, high}."""
    counts = [row["draws"] for row in rows]
    prepare(axes, "draws in the ensemble")
    axes.plot(counts, [100 * row["mean"] for row in rows], **style)
    low, high = ([100 * row[key] for row in rows] for key in ("low", "high"))
    axes.fill_between(counts, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(counts, [str(count) for count in counts])


def example_row(axes_row, name: str, images: Tensor, labels: list[int], true: list[int], classes: list[str]) -> None:
    """A row of images float [N, C, H, W] in [0, 1], under each the label it got (-1: the model gave NaN), marked where it is wrong.

    A model may have more classes than the data set has names for.
    """
    for axes, image, label, right in zip(axes_row, images, labels, true, strict=False):
        pixels = image.detach().cpu().float().clamp(0, 1)
        pixels = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
        axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        sign = "" if name == "original" else ("✓ " if label == right else "✗ ")
        got = "NaN" if label < 0 else classes[label] if label < len(classes) else f"class {label}"
        axes.set_xlabel(sign + got, color="black" if label == right else "firebrick", fontsize=10)
    axes_row[0].set_ylabel(name, fontsize=10)
