"""The log of a run: one JSON object a line, always; TensorBoard as well where it is installed; a picture of the curves at the end."""

import json
import os
from pathlib import Path

from rse_fast.data import write_atomically
from rse_fast.data.lines import whole_lines
from rse_fast.render import colour

# What later steps of a run read of a row.
_NUMBERS = {
    "step": ("step", "epoch"), "epoch": ("step", "epoch"),
    "end": ("step", "best_epoch", "best_score", "test_accuracy"),
}  # fmt: skip


class Log:
    """Appends rows to ``folder/log.jsonl``. ``step``: the run continues there, and rows of later steps are dropped (None: a new run)."""

    def __init__(self, folder: Path, step: int | None = None, epoch: int = 0):
        self.path = folder / "log.jsonl"
        if step is not None:
            kept = [row for row in read(self.path) if row.get("step", 0) <= step and not (row["event"] == "epoch" and row["epoch"] > epoch)]
            write_atomically(self.path, lambda file: file.write("".join(json.dumps(row) + "\n" for row in kept).encode()))
        self._board = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=None if step is None else step + 1)

    def write(self, row: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())  # as checkpoints are: the end of a run needs both
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{row['event']}/{name}", value, row["step"])
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read(path: Path) -> list[dict]:
    """The rows of a log. A last line without its newline, which was cut off, is left out; ValueError for one that is no row of a log."""
    rows = []
    if not path.exists():
        return rows
    for number, line in whole_lines(path, "run"):
        try:
            row = json.loads(line)
            numbers = [row[name] for name in _NUMBERS.get(row["event"], ("step",))]
            if not all(type(value) in (int, float) for value in numbers):
                raise TypeError(f"expected numbers, got {numbers}")
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"run: line {number} of {str(path)!r} is no row of a log ({str(error)[:100]})") from error
    return rows


def draw_curves(rows: list[dict], path: Path) -> None:
    """Draws loss, accuracy, learning rate and sigma over the epochs as a PNG, if there are any; what stays constant has no panel. Needs
    matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Validation is what counts: its line is full, the attacked one has a marker of its own, training is pale.
    lines = {
        "loss": ("loss", {"loss": "training", "val_loss": "validation"}),
        "accuracy": (
            "accuracy (%)",
            {"accuracy": "training", "val_accuracy": "validation", "val_attacked_accuracy": "attacked"},
        ),
        "learning rate": ("learning rate", {"lr": "learning rate"}),
        "mean sigma": ("mean sigma", {"sigma": "sigma"}),
    }
    epochs = [row for row in rows if row["event"] == "epoch"]
    steps = [row for row in rows if row["event"] == "step"]
    panels = {}
    for title, (unit, names) in lines.items():
        by_step = title in ("learning rate", "mean sigma")
        values = {row[name] for row in (*epochs, *steps) for name in names if name in row}
        if len(values) > by_step:  # one value throughout is no curve
            panels[title] = unit, names, steps if by_step and steps else epochs
    if not panels:
        return
    base = colour(next((row["defence"] for row in rows if "defence" in row), None), any("sigma" in row for row in epochs))
    styles = {"training": {"color": base, "alpha": 0.45, "linestyle": "--"}, "attacked": {"color": base, "marker": "^"}}
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axes, (title, (unit, names, source)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, label in names.items():
            points = [(row["epoch"], row[name] * (100 if unit.endswith("(%)") else 1)) for row in source if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **styles.get(label, {"color": base}), markersize=4)
        axes.set(xlabel="epoch", ylabel=unit, title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
