"""Measurements behind docs/evidence.md that no command makes: ``python -m rse_fast.bench.evidence``, one sub-command each.

Each writes OUT/NAME.json, small; ``report`` makes OUT/README.md and the pictures of all that are there.

- ``halves``: a network trained on one half of the training images and one on the other, without choosing an epoch. Is an image that was
  held out easier than a test image? Are the images of the validation part easier than others that were held out?
- ``duplicates``: images that are nearly the same as one of the other half, by a trained network's features and then by their pixels.
- ``draws``: accuracy, NLL and calibration error of an ensemble against the number of draws, and the bound that training with one draw
  minimises.
- ``certificates``: certified accuracy against radius, beside Cohen, Rosenfeld & Kolter's published certificates.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from rse_fast import Ensemble, certify_cli, data, run_inputs, train
from rse_fast.cli import wrapper
from rse_fast.evaluate import calibration
from rse_fast.evaluate.estimate import estimate
from rse_fast.render import COLOURS, NETWORKS, markdown_table, new_figure, prepare, shades
from rse_fast.train.distributed import connect

VALIDATION = (0.02, 0.04, 0.1)  # shares of the training images that runs have set aside
DRAWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
SINGLE = 100  # of these, the first, the losses of single draws are known
RADII = [round(0.05 * i, 2) for i in range(31)]
# Share of 500 CIFAR-10 test images (every 20th), ResNet-110, n = 100,000, alpha = 0.001, certified right at the radii: counted from the
# files data/certify/cifar10/resnet110/noise_SIGMA/test/sigma_SIGMA of github.com/locuslab/smoothing (78a4d94).
COHEN = {
    0.12: {0: 0.814, 0.25: 0.586}, 0.25: {0: 0.748, 0.25: 0.600, 0.5: 0.428, 0.75: 0.266},
    0.5: {0: 0.652, 0.25: 0.546, 0.5: 0.414, 0.75: 0.320, 1.0: 0.234},
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rse_fast.bench.evidence", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/evidence"), metavar="DIR")
    commands = parser.add_subparsers(required=True)
    for action in (halves, duplicates, draws, certificates, report):
        command = commands.add_parser(action.__name__)
        command.set_defaults(action=action)
        if action in (halves, duplicates):
            command.add_argument("data", help="folder of images, as in rse-fast train --data")
        if action is halves:
            command.add_argument("--config", type=Path, required=True, metavar="FILE", help="config.json of rse-fast train")
            command.add_argument("--epochs", type=int, default=6)
        if action in (duplicates, draws):
            command.add_argument("--run", type=Path, required=True, help="run folder of rse-fast train")
        if action is draws:
            command.add_argument("--images", type=int, default=1000, help="of the test part, and as many of the training part")
        if action is certificates:
            command.add_argument("folders", nargs="+", metavar="NAME=DIR", help="folders of rse-fast certify")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    return wrapper.run("bench", lambda: args.action(args) or 0)


def _save(args, name: str, found: dict) -> None:
    data.write_atomically(args.out / f"{name}.json", lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))


def _share(right: torch.Tensor) -> dict:
    return estimate([float(right.double().mean())], len(right)) if len(right) else None


# -------------------------------------------------------------------------------------------------------------------- validation and test
def halves(args) -> None:
    """Cross-fitting: each training image is judged by the network that never saw it, each test image by both."""
    config = dataclasses.replace(train.Config.load(args.config), data=args.data, epochs=args.epochs, val_fraction=0.5)
    splits = train.load_data(config)  # halves by the hash that chooses validation images: the smaller ones are the first half
    parts = [splits.val, splits.train]
    models, right = [], []
    for own, other in (parts, parts[::-1]):
        models.append(_trained(config, dataclasses.replace(splits, train=own, val=_first(other, 100))))
        right.append(_right(models[-1], other))
    held_out = torch.cat(right[::-1])  # of each half, by the network of the other
    tested = torch.stack([_right(model, splits.test) for model in models]).double().mean(0)
    labels = torch.cat([part.labels for part in parts])
    found = {
        "config": dataclasses.asdict(config) | {"data": splits.name},
        "held_out": _share(held_out),
        "halves": [_share(r) for r in right[::-1]],
        "test": _share(tested),
        "by_class": [
            {"class": name, "held_out": _share(held_out[labels == k]), "test": _share(tested[splits.test.labels == k])}
            for k, name in enumerate(splits.classes)
        ],
        "validation": {},
    }
    for share in VALIDATION:
        keys = set(_keys(train.load_data(dataclasses.replace(config, val_fraction=share)).val))
        chosen = torch.tensor([key in keys for part in parts for key in _keys(part)])
        found["validation"][str(share)] = {"chosen": _share(held_out[chosen]), "others": _share(held_out[~chosen])}
    _save(args, "halves", found)


def _trained(config, splits):
    with connect(config.device) as ranks:
        trainer = train.Trainer(config, splits, ranks)
        while not trainer.complete:
            row = trainer.advance()
            if row is not None and row["event"] == "epoch":
                print(f"epoch {row['epoch']}: loss {row['loss']:.3f}", flush=True)
    return trainer.evaluated.eval()


def _first(part, count):
    return data.Part(part.images[:count], part.labels[:count])


def _right(model, part) -> torch.Tensor:
    """bool [N]: which images one pass of the network has right."""
    with torch.no_grad():
        return torch.cat([model(x).argmax(-1) == y for x, y in data.batches(part, 256)])


def _keys(part) -> list[bytes]:
    return [image.tobytes() for image in part.images.numpy()]


def duplicates(args) -> None:
    """For each test image, and each image of the half of the training images with the smaller hashes: the nearest images of the other half
    by features of the run's network, and how alike the closest is in pixels (correlation, mirrored or not)."""
    model = run_inputs.model_of(args.run, trust=True)
    splits = train.load_data(dataclasses.replace(train.Config.load(args.run / "config.json"), data=args.data, val_fraction=0.5))
    reference = splits.train
    features = _features(model, reference)
    found = {"run": train.Config.load(args.run / "config.json").defence, "reference": len(reference), "parts": {}}
    for name, part in (("held out", splits.val), ("test", splits.test)):
        own, alike = _features(model, part), torch.empty(len(part))
        for start in range(0, len(part), 500):
            rows = slice(start, start + 500)
            nearest = (own[rows] @ features.T).topk(20, dim=-1).indices
            mine, theirs = _standard(part.images[rows]), reference.images[nearest.flatten()]
            both = [(mine[:, None] * _standard(t).unflatten(0, nearest.shape)).sum(-1) for t in (theirs, theirs.flip(-1))]
            alike[rows] = torch.stack(both).amax((0, 2))
        found["parts"][name] = {"images": len(part), "above": {str(level): _share(alike > level) for level in (0.9, 0.95, 0.98)}}
    _save(args, "duplicates", found)


def _features(model, part) -> torch.Tensor:
    """float32 [N, F] of length 1: what the last linear layer reads."""
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    kept = []
    handle = last.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].float()))
    _right(model, part)
    handle.remove()
    return normalize(torch.cat(kept), dim=-1)


def _standard(images) -> torch.Tensor:
    """Pixels of uint8 images, centred and of length 1: their products are correlations."""
    flat = images.flatten(1).float()
    return normalize(flat - flat.mean(-1, keepdim=True), dim=-1)


# -------------------------------------------------------------------------------------- how many models an ensemble is worth
def draws(args) -> None:
    """The mean softmax over 1 .. 1000 draws: accuracy, NLL, calibration error, with intervals. The bound: by Jensen's inequality the mean
    loss of single draws, which noisy SGD minimises, is at least the loss of the mean softmax."""
    model = run_inputs.model_of(args.run, trust=True)
    config = train.Config.load(args.run / "config.json")
    splits = train.load_data(config)
    found = {"run": str(args.run), "model": config.model, "images": args.images, "parts": {}}
    for name in ("test", "train"):
        part = getattr(splits, name)
        picked = torch.arange(args.images) * len(part) // args.images
        (images,) = part.fetch([picked])
        found["parts"][name] = _by_draws(model, images.float() / 255, part.labels[picked])
    _save(args, "draws", found)


def _by_draws(model, x, y) -> dict:
    total, single, done, points = 0.0, torch.zeros(len(x), dtype=torch.float64), 0, []
    one, ten = Ensemble(model, 1), Ensemble(model, 10)
    labels = []
    while done < DRAWS[-1]:
        size = 1 if done < SINGLE else 10
        ensemble = one if size == 1 else ten
        answers = [ensemble.predict(batch, seed=1000 + done, image_offset=64 * i) for i, batch in enumerate(x.split(64))]
        probs = torch.cat([answer.probs for answer in answers]).double()
        if size == 1:  # of single draws
            single += -probs.gather(1, y[:, None])[:, 0].clamp_min(2.0**-149).log()
        total += probs * size
        done += size
        if done == SINGLE:  # of the same draws, so Jensen's inequality holds for each image
            losses = -(total / done).gather(1, y[:, None])[:, 0].clamp_min(2.0**-149).log()
        if done in DRAWS:
            points.append({"draws": done} | _figures(total / done, y))
            labels.append((total / done).argmax(-1))
    gap = single / SINGLE - losses
    return {
        "points": points,
        "label_as_limit": [float((own == labels[-1]).double().mean()) for own in labels],
        "loss_of_one_draw": _mean(single / SINGLE), "loss_of_ensemble": _mean(losses), "gap": _mean(gap),
        "images_below_the_bound": int((gap < -1e-12).sum()),
    }  # fmt: skip


def _figures(probs, y) -> dict:
    nll = -probs.gather(1, y[:, None])[:, 0].clamp_min(2.0**-149).log()
    rng, ece = np.random.default_rng(0), []
    for _ in range(200):  # bootstrap over images
        rows = torch.from_numpy(rng.integers(0, len(y), len(y)))
        ece.append(calibration.calibration_error(calibration.reliability(probs[rows], y[rows])))
    point = calibration.calibration_error(calibration.reliability(probs, y))
    return {
        "accuracy": _share(probs.argmax(-1) == y),
        "nll": _mean(nll),
        "ece": {"mean": point, "low": float(np.quantile(ece, 0.025)), "high": float(np.quantile(ece, 0.975))},
    }


def _mean(values) -> dict:
    mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


# ------------------------------------------------------------------------------------------------------------------------- certificates
def certificates(args) -> None:
    found = {}
    for name, _, folder in (text.partition("=") for text in args.folders):
        table = certify_cli.read_table(Path(folder) / "certified.tsv")
        settings = data.read_json(Path(folder) / "certify.json")
        found[name] = {
            "settings": {key: settings[key] for key in ("sigma", "n0", "n", "alpha", "radii", "bound", "dtype", "weights", "seed")},
            "images": len(table), "abstained": sum(row.label < 0 for row in table) / len(table),
            "draws_per_image": settings["n0"] + sum(row.draws for row in table) / len(table),
            "seconds_per_image": sum(row.seconds for row in table) / len(table),
            "curve": [
                [radius, *certify_cli.certified_accuracy(table, radius)] for radius in (settings["radii"] or RADII)
            ],
        }  # fmt: skip
    _save(args, "certificates", found)


# -------------------------------------------------------------------------------------------------------------------------- the report
def report(args) -> None:
    sections = {"halves": _halves_text, "duplicates": _duplicates_text, "draws": _draws_text, "certificates": _certificates_text}
    there = {name: data.read_json(args.out / f"{name}.json") for name in sections if (args.out / f"{name}.json").exists()}
    parts = [
        "# Measurements behind docs/evidence.md",
        "Made by `python -m rse_fast.bench.evidence report`; the figures: the .json files beside.",
    ]
    for name, found in there.items():
        parts += sections[name](found)
    for name, draw in (("draws", _draws_picture), ("certificates", _certificates_picture)):
        if name in there:
            figure = draw(there[name])
            data.write_atomically(args.out / f"{name}.png", lambda file, figure=figure: figure.savefig(file, format="png", dpi=120))
    data.write_atomically(args.out / "README.md", lambda file: file.write(("\n\n".join(parts) + "\n").encode()))


def _percent(e: dict | None, digits: int = 1) -> str:
    return "–" if e is None else f"{100 * e['mean']:.{digits}f} ({100 * e['low']:.{digits}f}–{100 * e['high']:.{digits}f})"


def _halves_text(found):
    config = found["config"]
    yield "## Are held-out training images easier than test images?"
    yield (
        f"{config['model']}, {config['defence']}, {config['epochs']} epochs on one half of the training images of {config['data']}, and "
        "again on the other; the last epoch counts. Accuracy in %, in brackets the 95 % interval for the choice of images."
    )
    rows = [
        ("images", "number", "accuracy %"),
        ("held out: the other half, both ways", str(found["held_out"]["images"]), _percent(found["held_out"])),
    ]
    rows += [("test, mean of both networks", str(found["test"]["images"]), _percent(found["test"]))]
    for share, e in found["validation"].items():
        rows.append((f"held out, in the validation part of {100 * float(share):g} %", str(e["chosen"]["images"]), _percent(e["chosen"])))
        rows.append(
            (f"held out, not in the validation part of {100 * float(share):g} %", str(e["others"]["images"]), _percent(e["others"]))
        )
    yield markdown_table(rows)
    yield markdown_table(
        [("class", "held out %", "test %")] + [(e["class"], _percent(e["held_out"]), _percent(e["test"])) for e in found["by_class"]]
    )


def _duplicates_text(found):
    yield "## Near-duplicates"
    yield (
        f"Of each image the 20 nearest of {found['reference']} training images by features of the {found['run']} network; alike: "
        "the largest correlation of pixels with one of them, mirrored or not."
    )
    levels = list(found["parts"]["test"]["above"])
    rows = [("images", "number", *(f"alike > {level} (%)" for level in levels))]
    rows += [(name, str(e["images"]), *(_percent(e["above"][level], 2) for level in levels)) for name, e in found["parts"].items()]
    yield markdown_table(rows)


def _draws_text(found):
    yield "## An ensemble of more and more draws"
    for name, e in found["parts"].items():
        yield f"{found['model']} of {found['run']}, {found['images']} images of the {name} part."
        rows = [("draws", "accuracy %", "NLL (nats)", "calibration error %", "same label as 1000 draws %")]
        for p, same in zip(e["points"], e["label_as_limit"], strict=True):
            nll = f"{p['nll']['mean']:.4f} ({p['nll']['low']:.4f}–{p['nll']['high']:.4f})"
            rows.append((str(p["draws"]), _percent(p["accuracy"]), nll, _percent(p["ece"], 2), f"{100 * same:.1f}"))
        yield markdown_table(rows)
        one, all_, gap = (e[key] for key in ("loss_of_one_draw", "loss_of_ensemble", "gap"))
        yield (
            f"The bound that training with one draw minimises, on the same {SINGLE} draws: mean loss of single draws {one['mean']:.4f} "
            f"nats, loss of their mean softmax {all_['mean']:.4f}; gap {gap['mean']:.4f} ({gap['low']:.4f}–{gap['high']:.4f}), below 0 on "
            f"{e['images_below_the_bound']} images."
        )
    yield "![accuracy, NLL and calibration error against draws](draws.png)"


def _certificates_text(found):
    yield "## Certified accuracy"
    radii = (0, 0.1, 0.25, 0.5, 0.75, 1.0)
    rows = [("network", "sigma", "n", "images", *(f"L2 {radius:g}" for radius in radii), "abstains %", "draws/image", "s/image")]
    for name, e in found.items():
        curve = {radius: {"mean": mean, "low": low, "high": high} for radius, mean, low, high in e["curve"]}
        cost = f"{100 * e['abstained']:.1f}", f"{e['draws_per_image']:.0f}", f"{e['seconds_per_image']:.2f}"
        own = [_percent(curve.get(radius)) for radius in radii]
        rows.append((name, f"{e['settings']['sigma']:g}", str(e["settings"]["n"]), str(e["images"]), *own, *cost))
    for sigma, curve in COHEN.items():
        own = [f"*{100 * curve[radius]:.1f}*" if radius in curve else "–" for radius in radii]
        rows.append(("*Cohen et al., ResNet-110*", f"{sigma:g}", "100000", "500", *own, "–", "–", "–"))
    yield markdown_table(rows)
    yield (
        "The network of Cohen, Rosenfeld & Kolter (ICML 2019) is a ResNet-110, and their images are the published CIFAR-10. Their figures "
        "are counted from the certificates that they published, of other images of the same test set. Seconds: wall time of one thread "
        "beside other work."
    )
    yield "![certified accuracy against radius](certificates.png)"


def _draws_picture(found):
    figure = new_figure(11, 3.4)
    for place, (key, title, scale) in enumerate(
        (("accuracy", "accuracy (%)", 100), ("nll", "NLL (nats)", 1), ("ece", "calibration error (%)", 100))
    ):
        axes = figure.add_subplot(1, 3, place + 1)
        prepare(axes, "draws")
        axes.set_ylabel(title)
        for (name, e), style in zip(found["parts"].items(), shades(NETWORKS["rse"], len(found["parts"])), strict=True):
            counts = [p["draws"] for p in e["points"]]
            axes.plot(counts, [scale * p[key]["mean"] for p in e["points"]], label=name, **style)
            low, high = ([scale * p[key][end] for p in e["points"]] for end in ("low", "high"))
            axes.fill_between(counts, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.set_xscale("log")
    axes.legend(frameon=False)
    figure.suptitle(f"{found['images']} images of each part (bands: 95 % intervals)", fontsize=10)
    return figure


def _certificates_picture(found):
    figure = new_figure(6.4, 4.4)
    axes = figure.add_subplot()
    prepare(axes, "L2 radius (pixels in 0..1)")
    whole = {name: e for name, e in found.items() if not e["settings"]["radii"]}
    colours = dict(zip(COHEN, COLOURS, strict=False))
    for name, e in whole.items():
        radii, mean, low, high = zip(*e["curve"], strict=True)
        colour = NETWORKS["rse"] if name == "rse" else colours.get(round(e["settings"]["sigma"], 2), "0.3")
        line = "--" if name == "rse" else "-"
        axes.plot(radii, [100 * value for value in mean], line, color=colour, label=f"{name}, sigma {e['settings']['sigma']:g}")
        axes.fill_between(radii, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.12, linewidth=0)
    for sigma, curve in COHEN.items():
        label = f"Cohen et al. 2019, ResNet-110, sigma {sigma:g}"
        axes.plot(list(curve), [100 * value for value in curve.values()], ":", color=colours[sigma], marker="o", label=label)
    axes.set(ylim=(0, 100), ylabel="certified accuracy (%)")
    axes.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
