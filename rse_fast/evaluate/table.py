"""The paper's table of defences on a data set of one's own, from training to Markdown: ``python -m rse_fast.evaluate.table``.

For each defence a network is trained, attacked by protocol ``table`` of `rse-fast evaluate` and, where it has noise, certified by `rse-fast
certify`, each in a folder below OUT/DEFENCE. After each of these OUT/table.md and OUT/table.json are written anew from what is there, with
the reason for whatever is not. The same command continues after a kill; what is complete is not done again.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from rse_fast import certify_cli, data, run_inputs, train
from rse_fast.cli import wrapper
from rse_fast.evaluate import command
from rse_fast.evaluate.protocols import PROTOCOLS
from rse_fast.render import markdown_table, percent
from rse_fast.train.log import read

EPS, RADIUS = "8/255", 0.25  # L-infinity of PGD and AutoAttack; L2 that is certified
# Of a column, what its cases have in common; of several the one with the most draws behind each gradient is shown.
ATTACKED = {
    "clean": {"method": "clean"},
    **{f"c = {c:g}": {"method": "cw-c", "c": c} for c in (0.01, 0.03, 0.06, 0.1, 0.2)},
    f"PGD {EPS}": {"method": "pgd", "eps": 8 / 255},
    f"AutoAttack {EPS}": {"method": "autoattack"},
}
CERTIFIED = f"certified L2 {RADIUS:g}"
COLUMNS = (*ATTACKED, CERTIFIED)
PAPER = {  # Liu et al. 2018: CIFAR-10, VGG16, accuracy in % of the columns clean and c
    "plain": (92.0, 30.4, 8.9, 5.1, 3.6, 2.2), "adversarial": (91.6, 27.0, 9.8, 4.1, 3.7, 1.4),
    "distillation": (84.1, 49.9, 17.7, 4.6, 3.1, 1.4), "brelu": (90.3, 75.1, 47.9, 30.9, 20.7, 13.5),
    "rse": (88.6, 87.4, 83.7, 75.8, 61.9, 28.0),
}  # fmt: skip
DEFENCES = (*PAPER, "gaussian", "rse+adversarial")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 for a whole table; 1 where something is absent; 2 for bad options; 130 after Ctrl-C, or after SIGTERM
    while it trains (see `wrapper.run`)."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    return wrapper.run("table", lambda: _make(args, argv), args.out, ("*/evaluation/rows-*.jsonl", "*/certified/certified.tsv"))


def _make(args, argv) -> int:
    runs = _runs(args)
    args.out.mkdir(parents=True, exist_ok=True)
    table = {
        "command": shlex.join(["python", "-m", "rse_fast.evaluate.table", *argv]), "columns": list(COLUMNS),
        "rows": {defence: _Row(defence, run, config).facts for defence, (run, config) in runs.items()},
    }  # fmt: skip
    _write(args.out, table)
    for defence, (run, config) in runs.items():
        row = _Row(defence, run, config)
        table["rows"][defence] = row.facts
        for stage in (row.train, row.attack, row.certify):
            print(f"{defence}: {stage.__name__}", flush=True)
            go_on = row.attempt(stage, args)
            _write(args.out, table)  # after each stage: whatever ends the process, the table is that of now
            if not go_on:
                break
    print(f"table: {args.out / 'table.md'}")
    return 1 if any(row["absent"] for row in table["rows"].values()) else 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m rse_fast.evaluate.table", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--data", metavar="DATA", help="data set to train on, as in rse-fast train (default: the configuration's)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new, or to continue")
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=DEFENCES, help="default: all")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json of rse-fast train for all networks, their defence apart")
    parser.add_argument("--reuse", type=Path, nargs="+", default=[], metavar="RUN", help="run folders that are trained; only read")
    images = PROTOCOLS["table"].images
    parser.add_argument("--images", type=int, default=images, metavar="N", help="test images of attacks and certificates (%(default)s)")
    parser.add_argument("--draws", type=int, default=10, metavar="N", help="of the deployed ensembles (default: %(default)s)")
    parser.add_argument("--n", type=int, default=10_000, help="draws of a certificate, fewer where that decides it (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    return parser


def _runs(args) -> dict[str, tuple[Path, train.Config | None]]:
    """The run folder of each defence, and the configuration to train it with; None: it is another's, and only read."""
    reused = {}
    for run in args.reuse:
        run_inputs.check_run(run, "--reuse")
        if (defence := train.Config.load(run / "config.json").defence) in reused:
            raise ValueError(f"--reuse: {str(reused[defence])!r} and {str(run)!r} are both of the defence {defence}")
        reused[defence] = run
    if unwanted := reused.keys() - set(args.defences):
        raise ValueError(f"--reuse: {', '.join(sorted(unwanted))} is not among --defences")
    base = train.Config.load(args.config) if args.config else train.Config()
    base = dataclasses.replace(base, data=args.data or base.data, device=args.device)
    found = {}
    for defence in args.defences:
        config = dataclasses.replace(base, defence=defence, temperature=None)  # a defence brings its own temperature
        found[defence] = (reused[defence], None) if defence in reused else (args.out / defence / "run", config)
    return found


class _Row:
    """A defence on its way through the stages, and what the table knows of it: ``facts``, JSON-serialisable.

    facts: run (folder), config (fields), trained (last row of the log), cells (column -> accuracy with its interval, and the command that
    made it), absent (column -> why), notes (failed checks).
    """

    def __init__(self, defence: str, run: Path, config: train.Config | None):
        self.defence, self.run, self.config = defence, run, config
        self.facts = {"run": str(run), "config": None, "trained": None, "cells": {}, "absent": dict.fromkeys(COLUMNS, "not done yet")}
        self.facts["notes"] = []

    def attempt(self, stage: Callable, args) -> bool:
        """Whether the stage succeeded. A defence that fails is a row with a reason; the others are not held up."""
        try:
            stage(args)
        except (ValueError, TypeError, OSError, FloatingPointError, RuntimeError) as error:
            self.facts["absent"] = {column: f"{stage.__name__}: {error}" for column in COLUMNS if column not in self.facts["cells"]}
            print(f"{self.defence}: {stage.__name__}: {error}", file=sys.stderr)
            return False
        return True

    def train(self, args) -> None:
        path = self.run / "config.json"
        found = train.Config.load(path) if path.exists() else None
        if self.config is None:
            last = (read(self.run / "log.jsonl") or [{"event": "no row"}])[-1]
            if last["event"] != "end":
                raise ValueError(f"the run {str(self.run)!r} is not complete (its log ends with {last['event']!r})")
        else:
            if found is not None and (found.fingerprint, found.data) != (self.config.fingerprint, self.config.data):
                raise ValueError(f"{str(self.run)!r} holds a run of another configuration; name another --out, or --reuse it")
            last = train.train(self.config, self.run, resume=found is not None)
            if last["event"] != "end":
                raise KeyboardInterrupt
        self.facts |= {"config": dataclasses.asdict(train.Config.load(path)), "trained": last}

    def attack(self, args) -> None:
        results = command.run([
            str(self.run), "--protocol", "table", "--eps", EPS, "--draws", str(args.draws), "--images", str(args.images),
            "--device", args.device, "--out", str(args.out / self.defence / "evaluation"), "--trust",
        ])  # fmt: skip
        self.facts["settings"], self.facts["versions"] = results["settings"], results["versions"]
        for column, what in ATTACKED.items():
            e = max((e for e in results["cases"].values() if what.items() <= e.items()), key=lambda e: e["eot"])
            cell = {name: e[name] for name in ("accuracy", "name", "command", "mean_l2", "eot", "seconds_per_image")}
            self._add(column, cell | {"paper": dict(zip(COLUMNS, PAPER.get(self.defence, ()), strict=False)).get(column)})
        self.facts["notes"] = [f"{c['name']}: {c['text']}" for c in results["checks"] if not c["passed"]]

    def certify(self, args) -> None:
        if not self.facts["settings"]["draws"]:
            self.facts["absent"][CERTIFIED] = "a deterministic network has no certificate of this kind"
            return
        splits = train.load_data(train.Config.load(self.run / "config.json"))
        # Where the part is sorted by class the attacks take a shuffle of it, and certificates every so many-th.
        every = 1 if self.facts["settings"]["order"] == "first" else max(1, len(splits.test) // args.images)
        summary = certify_cli.run([
            str(self.run), "--images", str(args.images), "--every", str(every), "--n", str(args.n), "--radius", str(RADIUS),
            "--device", args.device, "--out", str(args.out / self.defence / "certified"), "--trust",
        ])  # fmt: skip
        (found,) = summary["certified"]
        accuracy = {"mean": found["accuracy"], "sd": None, "low": found["low"], "high": found["high"], "images": summary["images"]}
        self._add(CERTIFIED, {"accuracy": accuracy, "command": summary["command"], "seconds_per_image": summary["seconds_per_image"]})

    def _add(self, column, cell):
        self.facts["cells"][column] = cell
        self.facts["absent"].pop(column)


# ------------------------------------------------------------------------------------------------------------------------ the files
def _write(out, table):
    data.write_atomically(out / "table.json", lambda file: file.write(json.dumps(table, indent=1).encode()))
    data.write_atomically(out / "table.md", lambda file: file.write(markdown(table).encode()))


def markdown(table: dict) -> str:
    """The text of table.md."""
    rows, notes = table["rows"], []
    if len({tuple(row["settings"][key] for key in ("labels", "order", "images")) for row in rows.values() if "settings" in row}) > 1:
        notes = ["- The rows are of different images: compare none of them."]
    notes += [f"- {defence}: {note}." for defence, row in rows.items() for note in row["notes"]]
    absent = [f"- {defence}{columns}: {reason}." for defence, row in rows.items() for reason, columns in _by_reason(row)]
    parts = ["# Defences under attack"]
    if notes:
        parts += ["**Checks that failed. Until they are explained, read these rows as too favourable.**", "\n".join(notes)]
    parts.append(markdown_table([("accuracy %", *COLUMNS)] + [line for defence, row in rows.items() for line in _lines(defence, row)]))
    parts.append(
        "Mean ± sd over scorings with fresh noise (95 % interval for the choice of images). c: the paper's C&W L2 with fixed c. PGD: 40 "
        "steps, the most draws behind each gradient of those tried; a check fails where the accuracy still falls between the last two. "
        "AutoAttack: version rand for networks with noise, standard for others. Certified: share of images whose label, by votes, is right "
        f"and holds within {RADIUS:g}. In italics the paper's figures (CIFAR-10, VGG16)."
    )
    if absent:
        parts += ["## What is absent", "\n".join(absent)]
    if trained := [f"- {defence}: {_facts(row)}" for defence, row in rows.items() if row["trained"]]:
        parts += ["## What was measured", "\n".join(trained)]
    if measured := {defence: row for defence, row in rows.items() if row["cells"]}:
        parts += ["## Beside the paper's figures", _differences(measured)]
    parts += ["## How to repeat it", f"`{table['command']}`. The command behind each figure, every configuration and seed: table.json."]
    return "\n\n".join(parts) + "\n"


def _by_reason(row):
    """(reason, names of the columns that it concerns, or nothing where these are all) for each reason."""
    for reason in dict.fromkeys(row["absent"].values()):
        columns = [column for column in COLUMNS if row["absent"].get(column) == reason]
        yield reason, f" ({', '.join(columns)})" * (len(columns) < len(COLUMNS))


def _lines(defence, row):
    yield defence, *(percent(row["cells"][column]["accuracy"]) if column in row["cells"] else "–" for column in COLUMNS)
    if defence in PAPER:
        figures = [f"*{figure:.1f}*" for figure in PAPER[defence]]
        yield f"*{defence}, paper*", *figures, *["–"] * (len(COLUMNS) - len(figures))


def _facts(row):
    config, trained = row["config"], row["trained"]
    text = f"{config['model']}, {config['epochs']} epochs of {config['data']}, seed {config['seed']}, test accuracy of one pass "
    text += f"{100 * trained['test_accuracy']:.1f} % on {trained['test_images']} images"
    if config["defence"] in ("adversarial", "rse+adversarial"):
        text += f", trained against {config['attack']} of eps {config['eps']:.4g}"
    if settings := row.get("settings"):
        text += f"; attacked: {settings['images']} images of {settings['data']} ({settings['order']}), weights {settings['weights'][:12]}, "
        text += f"seed {settings['seed']}" + (f", {settings['draws']} draws, sigmas {settings['sigmas']}" if settings["draws"] else "")
    if CERTIFIED in row["cells"]:
        text += f"; certified: {row['cells'][CERTIFIED]['accuracy']['images']} images, evenly spaced over the test part"
    return text + "."


def _differences(measured):
    """What distinguishes these rows from the paper's, and by how much they differ."""
    lines = [
        "The paper's networks are VGG16, trained for 200 epochs on the published CIFAR-10; those here are named above, and a smaller "
        "network or a shorter training costs clean accuracy first.",
        "Here an attack follows the gradient of the mean softmax of as many draws as are deployed, and its images are scored with other "
        "noise, several times; where it has no success, the image that its search ended with counts, not the original.",
    ]
    if any("JPEG" in row["settings"]["data"] for row in measured.values()):
        lines.append("The images went through JPEG, which is lossy: neither clean nor attacked accuracy is that of the published set.")
    if any(row["config"]["defence"] == "adversarial" and row["config"]["attack"] != "fgsm" for row in measured.values()):
        lines.append("The paper retrained on FGSM images; here adversarial training is against PGD, which withstands far more.")
    if "distillation" in measured:
        lines.append(
            "A distilled network is used at temperature 1, with logits as many times those of its training as the temperature there: a "
            "fixed c weighs them as much more, while the softmax saturates and the gradients that PGD follows vanish."
        )
    if "gaussian" in measured:
        lines.append("gaussian is not in the paper: noise on the image alone, the network that Cohen et al. (2019) certify.")
    for defence, row in measured.items():
        own = {column: cell for column, cell in row["cells"].items() if cell.get("paper") is not None}
        if own:
            figures = ", ".join(
                f"{column} {100 * cell['accuracy']['mean'] - cell['paper']:+.1f}"
                + ("" if cell["accuracy"]["low"] <= cell["paper"] / 100 <= cell["accuracy"]["high"] else " (outside the interval)")
                for column, cell in own.items()
            )
            lines.append(f"{defence}, points above the paper: {figures}.")
    return "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
