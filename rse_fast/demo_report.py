"""The report of ``rse-fast demo``: a table on the terminal, Markdown, JSON and pictures, all made from the one dictionary of results.

Nothing here measures or judges; rows and pictures for what was not measured (after an interrupt) are left out.
"""

import json
from pathlib import Path

from rse_fast.data import write_atomically
from rse_fast.render import (
    MARKERS,
    NETWORKS,
    draws_panel,
    errors,
    example_row,
    markdown_table,
    new_figure,
    percent,
    prepare,
    radius,
)

_RSE, _PLAIN, _TRANSFER = (
    {"color": NETWORKS[network], "marker": marker} for network, marker in zip(("rse", "plain", "rse"), MARKERS, strict=False)
)
_GALLERY_COLUMNS = 6
_PICTURES = {
    "accuracy-eps.png": "Accuracy against the strength of the attack",
    "accuracy-draws.png": "Accuracy against the number of draws",
    "examples.png": "Images and their adversarial versions",
}


def show(results: dict) -> None:
    """Prints the table on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    header, *rows = _table(results)
    title = f"Random Self-Ensemble on {results['data']['name']}"
    table = Table(title=title, caption=_caption(results), caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write(out: Path, results: dict, gallery: dict) -> None:
    """Writes report.md, results.json and the pictures into ``out``, each atomically; pictures of an earlier run that this one lacks go."""
    figures = {
        "accuracy-eps.png": _eps_figure(results),
        "accuracy-draws.png": _draws_figure(results),
        "examples.png": _examples(results, gallery),
    }
    for name, figure in figures.items():
        if figure is None:
            (out / name).unlink(missing_ok=True)
        else:
            write_atomically(out / name, lambda file, figure=figure: figure.savefig(file, format="png", dpi=150))
    text = markdown(results, [name for name, figure in figures.items() if figure is not None])
    write_atomically(out / "report.md", lambda file: file.write(text.encode()))
    write_atomically(out / "results.json", lambda file: file.write(json.dumps(results, indent=1, allow_nan=False).encode()))


def _caption(results: dict) -> str:
    """What the rows of the table are."""
    accuracy, speed = results["accuracy"], results.get("speed")
    text = (
        f"Accuracy in % with the 95 % interval of the choice of images; ± is the sd over {results['settings']['repeats']} repeats with "
        f"fresh noise. Clean: {accuracy['plain']['images']} test images."
    )
    if levels := _levels(results):
        text += (
            f" PGD: {levels[0]['plain']['images']} of them, foolbox LinfPGD, {results['attack']['steps']} steps, each network attacked "
            "itself, the ensemble through the mean softmax of its draws."
        )
    if speed:
        text += (
            f" Images/s: batches of {speed['batch']}; the loop runs the same {speed['draws']} draws in plain torch, one after the other."
        )
    return text


def _levels(results: dict) -> list[dict]:
    return results.get("attack", {}).get("levels", [])


def _table(results: dict) -> list[tuple[str, str, str, str]]:
    """Header and rows as text."""
    accuracy = results["accuracy"]
    rows = [("", "plain", "RSE, 1 draw", f"RSE, n = {results['settings']['draws']}")]
    one_draw = accuracy["rse_one_draw"] | {"sd": None}  # it is in results.json; here it would only widen the table
    rows.append(("clean", percent(accuracy["plain"]), percent(one_draw), percent(accuracy["rse_ensemble"])))
    for level in _levels(results):
        rows.append((f"PGD eps {radius(level['eps'])}", percent(level["plain"]), "–", percent(level["rse_ensemble"])))
    if speed := results.get("speed"):
        rows.append(("images/s", _rate(speed["plain"]), "–", _rate(speed["ensemble"])))
        rows.append(("images/s, loop", "–", "–", _rate(speed["eager_loop"])))
        rows.append(("ensemble/loop", "–", "–", f"{speed['ratio']:.2f}x"))
    return rows


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def markdown(results: dict, pictures: list[str]) -> str:
    """The text of report.md, with the named pictures."""
    settings, described, training = results["settings"], results["data"], results["training"]
    channels, height, width = described["shape"]
    parts = [
        "# Random Self-Ensemble: what the demo measured",
        f"Data: {described['name']}, {len(described['classes'])} classes, images of {height}x{width} pixels and {channels} channel(s), "
        f"{described['train']} for training, {described['val']} for validation, {described['test']} for testing. "
        f"Run: {results['status']}, {results['seconds']:.0f} s on {results['machine']['device']} ({results['machine']['processor']}, "
        f"{results['machine']['threads']} threads).",
        markdown_table(_table(results)),
        _caption(results) + " Intervals: Wilson.",
    ]
    if _levels(results):
        parts += ["## Under attack", *_attack_text(results)]
    for name in pictures:
        parts += [f"## {_PICTURES[name]}", f"![{_PICTURES[name]}]({name})"]
        if name == "examples.png":
            parts.append("Below each adversarial image the label that the attacked network gives it; what is wrong is marked with a cross.")
        if name == "accuracy-draws.png" and "attacked" in results["draws"]:
            parts.append(
                f"The attacked images were made against the ensemble of {settings['draws']} draws, whatever the number that scores them. "
                "They are scored with other noise than in the table, so the two may differ by chance."
            )
    if "speed" in results:
        parts += [
            "## Speed",
            f"Batches of {results['speed']['batch']} images, {results['speed']['draws']} draws. The eager loop is the same network and "
            "weights with `x + sigma * torch.randn_like(x)` in front of each convolution, run once per draw, its softmax outputs "
            f"averaged. The ensemble and the loop were timed in turns; the median of {len(results['speed']['rounds']['ensemble'])} rounds "
            "is given, and the median of the rounds' ratios. The loop was timed in float32 in both memory layouts and in bfloat16; the "
            f'fastest counts ({results["speed"]["eager_loop_form"]}). The ensemble computes in bfloat16 where the hardware does. "plain" '
            "is one pass of the network without noise, in float32.",
        ]
    rows = [("", "epochs", "seconds", "last loss", "validation accuracy, %")]
    for name, run in training.items():
        last = run["epochs"][-1]
        rows.append((name, str(last["epoch"]), f"{run['seconds']:.0f}", f"{last['loss']:.3f}", f"{100 * last['val_accuracy']:.1f}"))
    one = next(iter(training.values()))
    parts += [
        "## Training",
        markdown_table(rows),
        f"Both networks: the same small convolutional network, SGD with Nesterov momentum 0.9, weight decay 5e-4, one-cycle learning rate "
        f"with peak {one['peak_rate']:g}, batches of {one['batch_size']}, cross-entropy, seed {settings['seed']}. The RSE network draws "
        f"fresh noise at each step (sigma {settings['init_sigma']:g} before the first convolution, {settings['inner_sigma']:g} before the "
        "others). The last epoch is used; no choice was made on the test images.",
        "## Versions",
        ", ".join(f"{name} {number or '(not installed)'}" for name, number in results["versions"].items())
        + f"; {results['machine']['system']}.",
        "All figures, settings and scoring seeds: [results.json](results.json).",
    ]
    return "\n\n".join(parts) + "\n"


def _attack_text(results: dict) -> list[str]:
    attack, settings = results["attack"], results["settings"]
    rows = [("eps", "plain", "RSE ensemble", "RSE ensemble on the plain network's images (transfer)", "largest change of a pixel")]
    rows.append(("0", percent(attack["unattacked"]["plain"]), percent(attack["unattacked"]["rse_ensemble"]), "–", "–"))
    for level in attack["levels"]:
        columns = (percent(level[name]) for name in ("plain", "rse_ensemble", "rse_transfer"))
        rows.append((radius(level["eps"]), *columns, f"{level['largest_change']:.4f}"))
    stronger = [level for level in attack["levels"] if level["rse_transfer"]["mean"] < level["rse_ensemble"]["low"]]
    top = attack["levels"][-1]
    checks = [
        f"At the largest eps ({radius(top['eps'])}) the plain network is right on {100 * top['plain']['mean']:.1f} % and the ensemble on "
        f"{100 * top['rse_ensemble']['mean']:.1f} %; an attack that works brings both to about 0 when eps is large."
    ]
    if stronger:
        checks.append(
            f"**Warning:** at eps {', '.join(radius(level['eps']) for level in stronger)} images made for the plain network fool the "
            "ensemble more often than images made for the ensemble itself: there the attack on the ensemble is too weak, and its figures "
            "flatter the ensemble."
        )
    else:
        checks.append("At no eps is the transfer clearly stronger than the attack on the ensemble itself, as it should be.")
    return [
        markdown_table(rows),
        f"Attack: {attack['method']}, {attack['steps']} steps, pixels in [0, 1]. On the ensemble each step takes the gradient of the log "
        f"mean softmax over {settings['draws']} packed draws with fresh noise; the images found are scored {settings['repeats']} times "
        "with fresh seeds.",
        "\n".join(f"- {check}" for check in checks),
        "**What this does not show.** A short PGD with one start and one loss is no full robustness evaluation: more steps, more draws per "
        "gradient, several starts, other losses and norms (AutoAttack `rand`, C&W) may find more. Read the figures as upper bounds of the "
        "accuracy under attack.",
    ]


def _eps_figure(results: dict):
    levels = _levels(results)
    if not levels:
        return None
    figure = new_figure(6.4, 4.8)
    axes = figure.add_subplot()
    prepare(axes, "eps: largest change of a pixel, pixels in 0..1")
    lines = (
        ("plain", "plain network", _PLAIN, "-"),
        ("rse_ensemble", f"RSE ensemble of {results['settings']['draws']}", _RSE, "-"),
        ("rse_transfer", "RSE ensemble, images made for the plain network", _TRANSFER, "--"),
    )
    handles = []
    for key, label, style, dash in lines:
        points = [(level["eps"], level[key]) for level in levels]
        if key in results["attack"]["unattacked"]:
            points.insert(0, (0.0, results["attack"]["unattacked"][key]))
        radii, estimates = zip(*points, strict=True)
        means = [100 * e["mean"] for e in estimates]
        handles.append(axes.errorbar(radii, means, errors(estimates), label=label, linestyle=dash, capsize=3, **style))
    handles.append(axes.axhline(100 / len(results["data"]["classes"]), color="0.4", linestyle=":", linewidth=1, label="guessing"))
    axes.set_ylim(-3, 103)
    # Labels of radii that lie close together would overlap: name only those that keep a distance.
    named: list[float] = []
    for level in reversed(levels):
        if not named or named[-1] - level["eps"] > 0.07 * levels[-1]["eps"]:
            named.append(level["eps"])
    axes.set_xticks([0, *named], ["0", *map(radius, named)])
    axes.set_title(
        f"PGD with {results['attack']['steps']} steps on {levels[0]['plain']['images']} test images (bars: 95 % intervals)", fontsize=10
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draws_figure(results: dict):
    if "draws" not in results:
        return None
    panels = [("clean", "clean", _RSE)]
    if "attacked" in results["draws"]:
        panels.append(("attacked", f"PGD at eps {radius(results['draws']['attacked_eps'])}", _TRANSFER))
    figure = new_figure(4.4 * len(panels), 3.8)
    for position, (key, name, style) in enumerate(panels, start=1):
        rows = results["draws"][key]
        axes = figure.add_subplot(1, len(panels), position)
        draws_panel(axes, rows, style)
        axes.set_title(f"{name}, {rows[0]['images']} test images", fontsize=10)
    figure.suptitle("RSE: accuracy against the number of draws (bands: 95 % intervals; the scales differ)", fontsize=10)
    return figure


def _examples(results: dict, gallery: dict):
    levels = _levels(results)
    if not levels:
        return None
    # The eps at which the two networks differ most, so that the picture shows what the noise buys there; the curve shows the rest.
    index = max(range(len(levels)), key=lambda i: levels[i]["rse_ensemble"]["mean"] - levels[i]["plain"]["mean"])
    classes = results["data"]["classes"]
    count = min(_GALLERY_COLUMNS, len(gallery["labels"]))
    plain, rse = gallery["plain"][index], gallery["rse"][index]
    rows = (
        ("original", gallery["images"], gallery["labels"]),
        ("against\nplain", plain["images"], plain["labels"]),
        ("against\nRSE", rse["images"], rse["labels"]),
    )
    figure = new_figure(1.25 * count + 1.0, 4.9)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes_row, (name, images, labels) in zip(grid, rows, strict=True):
        example_row(axes_row, name, images, labels.tolist(), gallery["labels"].tolist(), classes)
    figure.suptitle(f"PGD at eps = {radius(levels[index]['eps'])}, and the label the attacked network gives", fontsize=10)
    return figure
