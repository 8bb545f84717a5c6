"""The report of an evaluation: report.md, results.json and pictures, made from the summary and the rows alone."""

import base64
import json
from pathlib import Path

import torch
from torch import Tensor

from rse_fast.data import write_atomically
from rse_fast.evaluate.protocols import LARGE
from rse_fast.render import (
    colour,
    draws_panel,
    errors,
    example_row,
    markdown_table,
    new_figure,
    percent,
    prepare,
    radius,
    shades,
)

_PICTURES = {
    "accuracy-eps.png": "Accuracy against the strength of the attack, for each EOT",
    "accuracy-c.png": "Accuracy against c",
    "eot.png": "Accuracy against EOT: is there a plateau?",
    "steps.png": "Accuracy against steps: is there a plateau?",
    "accuracy-draws.png": "Accuracy against the number of draws",
    "examples.png": "Images and their adversarial versions",
    "cost.png": "Cost per image",
}
_CALIBRATION = {  # pictures of a section of their own
    "reliability.png": "Accuracy against confidence",
    "risk-coverage.png": "Error rate against the share of images that are answered",
}
_METHODS = {
    "clean": "no attack", "noise": "uniform random noise (foolbox)", "fgsm": "FGSM (foolbox)", "pgd": "PGD (foolbox)",
    "momentum": "MI-FGSM (foolbox)", "cw": "C&W L2, binary search (foolbox)", "cw-c": "C&W L2, fixed c (foolbox)",
    "apgd-ce": "APGD-CE (pyautoattack)", "apgd-dlr": "APGD-DLR (pyautoattack)", "square": "Square (pyautoattack)",
    "autoattack": "AutoAttack (pyautoattack)",
}  # fmt: skip


def headline(results: dict) -> str:
    """Failed checks first, then clean accuracy and the strongest attack within the main radius, a few lines of plain text."""
    lines = [f"FAILED CHECK: {check['text']}" for check in results["checks"] if not check["passed"]]
    entries = results["cases"]
    if "clean" in entries:
        lines.append(f"clean: {percent(entries['clean']['accuracy'])} %")
    for norm in ("Linf", "L2"):
        # Random noise is a control, not an attack.
        attacks = [e for e in entries.values() if e["norm"] == norm and e["victim"] == "deployed" and e["method"] != "noise"]
        main = max((e["eps"] for e in attacks if e["eps"] and e["eps"] < LARGE), default=None)
        if main is not None:
            inside = [e for e in attacks if e["eps"] == main]
            best = min(inside, key=lambda e: e["accuracy"]["mean"])
            count = f"{len(inside)} attack{'' if len(inside) == 1 else 's'}"
            lines.append(f"{norm} {radius(main)}, strongest of {count} ({best['name']}): {percent(best['accuracy'])} %")
    return "\n".join(lines)


def write(out: Path, results: dict, images: Tensor, rows: list[dict], certified: Path | None = None) -> None:
    """Writes everything into ``out``, each file atomically. images: uint8 [N, C, H, W]. certified: a folder of rse-fast certify."""
    base = colour(results.get("defence"), bool(results["settings"]["draws"]))
    figures = {
        "accuracy-eps.png": _eps_figure(results, base), "accuracy-c.png": _c_figure(results, base),
        "eot.png": _plateau_figure(results, base, "eot", "EOT: draws behind each gradient of the attack"),
        "steps.png": _plateau_figure(results, base, "steps", "steps of the attack"),
        "accuracy-draws.png": _draws_figure(results, base), "examples.png": _examples(results, images, rows),
        "cost.png": _cost_figure(results, base), "reliability.png": _reliability_figure(results.get("calibration"), base),
        "risk-coverage.png": _risk_figure(results.get("calibration"), base),
    }  # fmt: skip
    for name, figure in figures.items():
        if figure is None:
            (out / name).unlink(missing_ok=True)
        else:
            write_atomically(out / name, lambda file, figure=figure: figure.savefig(file, format="png", dpi=120))
    section = _certified(out, certified, results["settings"])
    text = markdown(results, [name for name, figure in figures.items() if figure is not None], section)
    write_atomically(out / "report.md", lambda file: file.write(text.encode()))
    write_atomically(out / "results.json", lambda file: file.write(json.dumps(results, allow_nan=False).encode()))


def _certified(out, folder, settings):
    """The summary of a folder of certificates as a section, its picture and table copied beside the report; only the reason against it
    where they are of another network or other data."""
    if folder is None or not (folder / "summary.md").is_file():
        return None
    certified = json.loads((folder / "certify.json").read_text())
    if other := [name for name in ("weights", "labels", "part") if certified.get(name) != settings[name]]:
        return f"## Certified accuracy\n\nNot shown: the certificates in `{folder}` are of something else (other {', '.join(other)})."
    for name in ("certified.png", "certified.tsv"):
        content = (folder / name).read_bytes()
        write_atomically(out / name, lambda file, content=content: file.write(content))
    text = (folder / "summary.md").read_text().strip().replace("\n## ", "\n### ").replace("# ", "## ", 1)
    return text + "\n\nEvery image: [certified.tsv](certified.tsv)."


def markdown(results: dict, pictures: list[str], certified: str | None = None) -> str:
    """The text of report.md, with the named pictures."""
    settings, machine = results["settings"], results["machine"]
    failed = [check for check in results["checks"] if not check["passed"]]
    passed = [check for check in results["checks"] if check["passed"]]
    parts = [f"# Evaluation under attack: protocol {settings['protocol']}"]
    if failed:
        parts += ["**Checks that failed. Until they are explained, read the figures below as too favourable.**", _bullets(failed)]
    ensemble = f"ensemble of {settings['draws']} draws, sigmas {', '.join(f'{s:g}' for s in settings['sigmas'])}"
    parts += [
        f"Model: {settings['model']} ({ensemble if settings['draws'] else 'deterministic'}; weights {settings['weights'][:12]}). "
        f"Data: {settings['data']}, {settings['part']} part, {settings['images']} images, the {settings['order']}. "
        f"Seed {settings['seed']}. {_not_run(settings)}".rstrip(),
        *_tables(results),
        *_incomplete(results),
        _how_to_read(results),
    ]
    parts += ["## Checks", _bullets(passed) if passed else "None passed." if failed else "These cases allow no check."]
    if results["replication"]:
        parts += _replication(results["replication"])
    if results.get("calibration"):
        parts += _calibration(results["calibration"], [name for name in pictures if name in _CALIBRATION])
    for name in (name for name in pictures if name in _PICTURES):
        parts += [f"## {_PICTURES[name]}", f"![{_PICTURES[name]}]({name})"]
    if certified:
        parts.append(certified)
    parts += [
        "## Cost",
        markdown_table([("case", "attack seconds/image", "queries/image", "draws/query")] + [
            (e["name"], f"{e['seconds_per_image']:.3g}", f"{e['attack_queries']:.0f}", _eot(e)) for e in results["cases"].values()
        ]),
        "## How to repeat it",
        f"`{results['command']}`, seed {settings['seed']}. For one line of the table add `--only CASE` and the seed; results.json has that "
        "command for each case (`cases.CASE.command`). The command continues what is in its folder; another `--out` measures again. "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items())
        + f"; {machine['system']}, {machine['device']} ({machine['processor']}, {machine['threads']} threads, {machine['processes']} "
        f"process(es)). Wall time: {results['seconds']:.0f} s of this call; attacks {results['attack_seconds']:.0f} s over all calls and "
        "processes. Rows: `rows-*.jsonl`, all figures: [results.json](results.json).",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _bullets(checks):
    return "\n".join(f"- {check['name']}: {check['text']}." for check in checks)


def _not_run(settings):
    text = "" if settings["plain"] or not settings["draws"] else "No plain network was given, so transfer from one was not tried. "
    return text + ("This protocol is a first look; `adaptive` is the evaluation." if settings["protocol"] == "quick" else "")


def _tables(results):
    entries = list(results["cases"].values())
    header = ("case", "attack", "norm", "radius", "steps", "EOT", "accuracy %", f"worst of {_queries(entries)} queries %", "mean L2")
    tables = []
    for title, chosen in (
        ("## Accuracy", [e for e in entries if e["victim"] == "deployed"]),
        ("## Ablations: the noise off, or the same at every query", [e for e in entries if e["victim"] != "deployed"]),
    ):
        if chosen:
            tables += [title, markdown_table([header] + [_row(e) for e in chosen])]
    medians = [e for e in entries if e["method"] == "cw"]
    for e in medians:
        distance = "is not known: the attack failed on half of the images or more" if e["median_l2"] is None else f"is {e['median_l2']:.3f}"
        tables.append(f"{e['name']}: the median L2 distance {distance} ({100 * e['won']:.1f} % won, in most of the scorings).")
    return tables


def _incomplete(results):
    if found := results["incomplete"]:
        names = ", ".join(f"{name} ({e['images']} of {results['settings']['images']} images)" for name, e in found.items())
        yield f"Left out, as not all images were attacked yet: {names}."


def _queries(entries):
    return entries[0]["queries_per_image"] if entries else 0


def _row(e):
    attack = _METHODS[e["method"]] + ("" if e["source"] == "deployed" else f", on {e['source']}")
    attack += "" if e["victim"] == "deployed" else f"; scored: {e['victim']}"
    attack += f", {e['restarts']} restarts" if e["restarts"] > 1 else ""
    strength = radius(e["eps"]) if e["eps"] else f"c = {e['c']:g}" if e["c"] else "–"
    worst = e["worst"] | {"sd": None}
    bare = e["method"] == "clean"
    return (
        e["name"], attack, "–" if bare else e["norm"], strength, "–" if bare else str(e["steps"]), "–" if bare else _eot(e),
        percent(e["accuracy"]), percent(worst), f"{e['mean_l2']:.3f}",
    )  # fmt: skip


def _eot(e):
    """Draws behind each query of the attack, which one on another network, or on one draw, has not."""
    if e["source"] in ("plain", "noise-off") or e["victim"] == "noise-off":
        return "–"
    return "1" if e["source"] == "fixed-draw" else str(e["eot"])


def _how_to_read(results):
    settings, entries = results["settings"], list(results["cases"].values())
    if not settings["draws"]:
        return "Accuracy with its 95 % interval (Wilson) for the choice of images. The network is deterministic."
    queries = _queries(entries)
    return (
        f"- Accuracy: mean ± sd over {queries} scorings of the attacked images by the deployed ensemble of {settings['draws']} draws. Each "
        "scoring has its own noise, never that of the attack. In brackets: the 95 % interval (Wilson) for the choice of images.\n"
        f"- Worst of {queries} queries: an image counts as right only if all {queries} scorings are right. This is the accuracy that "
        "is left against someone who asks again.\n"
        "- EOT: draws of noise behind each query of the attack, which sees the log of their mean softmax. Every query has fresh noise.\n"
        "- Where an attack gives several images for one, the image that counts is chosen in separate draws: the one whose true class is "
        "furthest behind another, or least ahead of it. C&W with a search for the smallest distance runs with margins of 0 to 4; there it "
        "is the closest image that is wrong in the separate draws."
    )


def _replication(replication):
    rows = [("c", "accuracy %", "root mean square L2")]
    rows += [(f"{e['c']:g}", percent(e["accuracy"]), f"{e['rms_l2']:.3f}") for e in replication["columns"]]
    crossing = replication["l2_at_30"]
    return [
        "## Replication of the paper's table",
        markdown_table(rows),
        "L2 at 30 % accuracy: " + ("not reached in these columns." if crossing is None else f"{crossing:.3f} (linear between columns)."),
        "C&W with one fixed c, 300 Adam steps of 1e-3, kappa 0, as in the paper (Liu et al. 2018). Three things make it stronger than "
        "there: the margin is that of the log of the mean softmax of several draws, not of the logits of one noisy pass; the network is in "
        "eval mode; and of the closest image and the last one, the worse for the network counts. By today's standards it is a weak attack. "
        "These figures replicate the paper, and are no claim of robustness.",
    ]


def optimistic(temperature: float) -> str:
    """The warning about calibration figures of a run's own validation images."""
    by = "the best epoch was chosen by" if temperature == 1 else "the temperature was fitted, and the best epoch chosen, on"
    return f"{by} these very images, so accuracy and calibration look better than on new ones; --part test takes others"


def _calibration(calibration, pictures):
    """The section on probabilities and uncertainties of images that were not attacked."""
    images, undefined, ood = calibration["images"], calibration["undefined"], calibration["ood"]
    yield "## Calibration and uncertainty"
    if undefined:
        yield (
            f"**{undefined} of {images} images gave NaN. They are left out of NLL, Brier score, calibration error, disagreement and AUROC, "
            "and count as wrong and least sure elsewhere.**"
        )
    yield f"{images} images, not attacked; accuracy {100 * calibration['accuracy']:.1f} %."
    if calibration["chosen_by"]:
        sentence = optimistic(calibration["temperature"])
        yield f"**{sentence[0].upper()}{sentence[1:]}.**"
    rows = [
        ("as it is" if e["temperature"] == 1 else f"at temperature {e['temperature']:.3f}",
         f"{e['nll']:.4f}", f"{e['brier']:.4f}", f"{100 * e['ece']:.2f}") for e in calibration["by_temperature"]
    ]  # fmt: skip
    yield markdown_table([("probabilities", "NLL (nats)", "Brier score", "calibration error % (15 bins)"), *rows])
    if calibration["temperature"] == 1:
        yield "No temperature is kept with this network."
    else:
        yield "The temperature was fitted on the run's validation images; `rse-fast predict` uses it. It changes no label."
    if calibration["disagreement"] is not None:
        yield f"Disagreement: two draws of an image differ in their label with probability {calibration['disagreement']:.4f}."
    if ood:
        found = [(word, ood[word.replace(" ", "_")]) for word in ("entropy", "mutual information")]
        told = ", ".join(f"{value:.3f} by {word}" for word, value in found if value is not None) or "no number"
        left = f" ({ood['undefined']} of them gave NaN and are left out)" if ood["undefined"] else ""
        yield f"Told from {ood['images']} images of {ood['data']}{left}: AUROC {told}. 0.5 is chance, 1 is always."
    yield markdown_table([("answered", "images", "accuracy %")] + [
        (f"{100 * e['coverage']:.0f} %", str(e["images"]), f"{100 * e['accuracy']:.1f}") for e in calibration["selective"]
    ])  # fmt: skip
    yield f"Answered are the images with the largest probabilities. Area under the risk-coverage curve: {calibration['aurc']:.4f}."
    for name in pictures:
        yield f"![{_CALIBRATION[name]}]({name})"


def _reliability_figure(calibration, base):
    """Accuracy against mean confidence, a point a bin, as large as the bin has images."""
    if not calibration or not calibration["by_temperature"]:
        return None
    figure = new_figure(5.2, 4.8)
    axes = figure.add_subplot()
    prepare(axes, "confidence: the largest probability (%)")
    axes.plot([0, 100], [0, 100], color="0.4", linestyle=":", linewidth=1, label="calibrated")
    for e, style in zip(calibration["by_temperature"], shades(base, len(calibration["by_temperature"])), strict=True):
        name = "as it is" if e["temperature"] == 1 else f"temperature {e['temperature']:.3f}"
        x, y, images = zip(*((100 * b["confidence"], 100 * b["accuracy"], b["images"]) for b in e["diagram"]), strict=True)
        axes.plot(x, y, color=style["color"], label=f"{name}: error {100 * e['ece']:.1f} %")
        areas = [12 + 200 * n / sum(images) for n in images]
        axes.scatter(x, y, areas, color=style["color"], marker=style["marker"], alpha=0.7)
    axes.set(xlim=(-3, 103), ylim=(-3, 103))
    axes.set_title(f"{calibration['images'] - calibration['undefined']} images; larger marks: more of them", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _risk_figure(calibration, base):
    if not calibration:
        return None
    figure = new_figure(5.8, 4.0)
    axes = figure.add_subplot()
    prepare(axes, "answered (%), the surest first")
    axes.set_ylabel("error rate among these (%)")
    risk = calibration["risk"]
    axes.plot([100 * (k + 1) / len(risk) for k in range(len(risk))], [100 * r for r in risk], color=base)
    axes.set(xlim=(0, 100), ylim=(0, None))
    axes.set_title(f"{calibration['images']} images, area {calibration['aurc']:.4f}", fontsize=10)
    return figure


def _eps_figure(results, base):
    pgd = [e for e in results["cases"].values() if e["method"] == "pgd" and e["norm"] == "Linf" and e["eps"] < LARGE]
    pgd = [e for e in pgd if e["source"] == e["victim"] == "deployed" and e["restarts"] == 1 and e["steps"] == 20]
    if not pgd or len({e["eps"] for e in pgd}) < 2:
        return None
    figure = new_figure(6.4, 4.6)
    axes = figure.add_subplot()
    prepare(axes, "eps: largest change of a pixel, pixels in 0..1")
    clean = results["cases"].get("clean")
    numbers, width = sorted({e["eot"] for e in pgd}), max(e["eps"] for e in pgd) / 60
    for place, (eot, style) in enumerate(zip(numbers, shades(base, len(numbers)), strict=True)):
        points = sorted((e["eps"], e["accuracy"]) for e in pgd if e["eot"] == eot)
        points = ([(0.0, clean["accuracy"])] if clean else []) + points
        radii, estimates = zip(*points, strict=True)
        beside = [r + width * (place - (len(numbers) - 1) / 2) for r in radii]  # so that bars do not cover each other
        axes.errorbar(beside, [100 * e["mean"] for e in estimates], errors(estimates), label=f"EOT {eot}", capsize=3, **style)
    ticks = sorted({e["eps"] for e in pgd})
    axes.set_xticks([0, *ticks], ["0", *map(radius, ticks)])
    _finish(axes, results, f"PGD-20, {pgd[0]['images']} images (bars: 95 % intervals)")
    return figure


def _finish(axes, results, title):
    axes.axhline(100 / len(results["classes"]), color="0.4", linestyle=":", linewidth=1, label="guessing")
    axes.set_ylim(-3, 103)
    axes.set_title(title, fontsize=10)
    axes.figure.legend(loc="outside lower center", ncols=2, frameon=False)


def _c_figure(results, base):
    if not results["replication"]:
        return None
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    prepare(axes, "c")
    columns = results["replication"]["columns"]
    estimates = [e["accuracy"] for e in columns]
    axes.errorbar([e["c"] for e in columns], [100 * e["mean"] for e in estimates], errors(estimates), capsize=3, color=base, marker="s")
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks([e["c"] for e in columns], [f"{e['c']:g}" for e in columns])
    _finish(axes, results, f"C&W L2 with fixed c, {estimates[0]['images']} images (bars: 95 % intervals)")
    return figure


def _plateau_figure(results, base, along, title):
    found = results[along]
    if not found:
        return None
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    prepare(axes, title)
    for place, (plateau, style) in enumerate(zip(found, shades(base, len(found)), strict=True)):
        values, estimates = zip(*((p[along], p["accuracy"]) for p in plateau["points"]), strict=True)
        label = f"PGD-{plateau['steps']}" if along == "eot" else f"PGD, EOT {plateau['eot']}"
        label += f", {plateau['norm']} {radius(plateau['eps'])}" + ("" if plateau["plateau"] else " (no plateau)")
        beside = [n * 1.04 ** (place - (len(found) - 1) / 2) for n in values]
        axes.errorbar(beside, [100 * e["mean"] for e in estimates], errors(estimates), label=label, capsize=3, **style)
    axes.set_xscale("log")
    axes.minorticks_off()
    ticks = sorted({p[along] for plateau in found for p in plateau["points"]})
    axes.set_xticks(ticks, map(str, ticks))
    _finish(axes, results, f"Robust accuracy against {'EOT' if along == 'eot' else along} (bars: 95 % intervals)")
    return figure


def _draws_figure(results, base):
    curves = results["draws"]
    if not curves:
        return None
    figure = new_figure(4.4 * len(curves), 3.8)
    for position, (name, points) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(1, len(curves), position)
        draws_panel(axes, points, {"color": base, "marker": "s"})
        axes.set_title(f"{name}, {points[0]['images']} images", fontsize=9)
    figure.suptitle("Accuracy against the number of draws (bands: 95 % intervals; the scales differ)", fontsize=10)
    return figure


def _cost_figure(results, base):
    """Seconds of attack per image, a bar a case; the scale is logarithmic, since an attack costs up to thousands of times another."""
    entries = [e for e in results["cases"].values() if e["seconds_per_image"] > 0]
    if not entries:
        return None
    figure = new_figure(7.2, 1.4 + 0.24 * len(entries))
    axes = figure.add_subplot()
    bars = axes.barh([e["name"] for e in entries], [e["seconds_per_image"] for e in entries], color=base)
    axes.bar_label(bars, [f"{e['seconds_per_image']:.2g}" for e in entries], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.invert_yaxis()  # the order of the tables
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds per image to find the adversarial one")
    return figure


def _examples(results, images, rows):
    """Originals, and beneath them what some of the attacks within the main radius made of them."""
    kept = {}
    for row in rows:
        if "example" in row:
            kept.setdefault(row["case"], {})[row["index"]] = row
    chosen = [
        e for e in results["cases"].values()
        if e["name"] in kept and e["method"] not in ("clean", "noise") and e["source"] == e["victim"] == "deployed" and e["eps"] != LARGE
    ]  # fmt: skip
    strongest = {}  # of each kind: images of one attack with more or fewer draws look alike
    for e in sorted(chosen, key=lambda e: e["accuracy"]["mean"]):
        strongest.setdefault((e["method"], e["norm"]), e)
    chosen = list(strongest.values())[:3]
    if not chosen:
        return None
    count = min(len(kept[chosen[0]["name"]]), len(images))
    labels = [kept[chosen[0]["name"]][i]["target"] for i in range(count)]
    figure = new_figure(1.3 * count + 1.4, 1.6 * (1 + len(chosen)) + 0.4)
    grid = figure.subplots(1 + len(chosen), count, squeeze=False)
    example_row(grid[0], "original", images[:count].float() / 255, labels, labels, results["classes"])
    channels, height, width = results["shape"]
    for axes_row, e in zip(grid[1:], chosen, strict=True):
        own = [kept[e["name"]][i] for i in range(count)]
        pixels = [torch.frombuffer(bytearray(base64.b64decode(r["example"])), dtype=torch.uint8) for r in own]
        pixels = torch.stack([p.view(height, width, channels).permute(2, 0, 1) for p in pixels]).float() / 255
        strength = radius(e["eps"]) if e["eps"] else f"c = {e['c']:g}" if e["c"] else "smallest L2"
        name = f"{_METHODS[e['method']].partition(' (')[0]}\n{e['norm']} {strength}\nEOT {e['eot']}"
        example_row(axes_row, name, pixels, [r["answers"][0] for r in own], labels, results["classes"])
    figure.suptitle("The strongest attacks, and the label that the first scoring gives (✗: wrong)", fontsize=10)
    return figure
