"""A table of defences on a data set of one's own, from training to Markdown: ``python -m rse_fast.evaluate.table``.

For each defence a network is trained, attacked by protocol ``table`` of `rse-fast evaluate` and, where it has noise, certified by `rse-fast
certify`, each in a folder below OUT/DEFENCE. Cheap attacks come first, on all networks, so a table that is not complete says most. After
each step OUT/table.md and OUT/table.json are written anew from what is there, with the number of images where not all were attacked and
the reason for whatever is absent. The same command continues after a kill; what is complete is not done again. ``--beside`` adds the rows
of a table that was made elsewhere, and what it says of the same network where nothing was measured here.
"""

import argparse
import dataclasses
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rse_fast import certify_cli, data, run_inputs, train
from rse_fast.cli import wrapper
from rse_fast.evaluate import command, rows
from rse_fast.evaluate.estimate import mcnemar
from rse_fast.evaluate.protocols import PROTOCOLS
from rse_fast.render import markdown_table, percent
from rse_fast.train.log import read

EPS, L2 = {f"{n}/255": n / 255 for n in (2, 4, 8)}, 0.5  # L-infinity radii by name, the last is the main one; L2 radius
RADIUS = 0.25  # L2 that is certified


def _pgd(steps, eps, norm="Linf"):
    return {"method": "pgd", "steps": steps, "norm": norm, "eps": eps, "source": "deployed"}


# The columns, by section and in the order of what they cost. Of a column, what its cases have in common; of several the one with the most
# draws behind each gradient is shown.
_MAIN = 8 / 255
SECTIONS = {
    "Accuracy under the paper's attack": {
        "clean": {"method": "clean"}, **{f"c = {c:g}": {"method": "cw-c", "c": c} for c in (0.01, 0.03, 0.06, 0.1, 0.2)},
    },
    "Accuracy under attack: L-infinity": {
        **{f"PGD-20 {text}": _pgd(20, eps) for text, eps in EPS.items()},
        "PGD-40 8/255": _pgd(40, _MAIN), "AutoAttack 8/255": {"method": "autoattack", "eps": _MAIN}, "Square 8/255": {"method": "square"},
        "transfer": {"source": "plain"}, "noise off": {"source": "noise-off"}, "fixed draw": {"source": "fixed-draw"},
    },
    "L2": {
        "PGD-40 L2 0.5": _pgd(40, L2, "L2"), "AutoAttack L2 0.5": {"method": "autoattack", "eps": L2}, "C&W median L2": {"method": "cw"},
    },
}  # fmt: skip
ATTACKED = dict(itertools.chain.from_iterable(columns.items() for columns in SECTIONS.values()))
PARTS = {"APGD-CE 8/255": "apgd-ce", "APGD-DLR 8/255": "apgd-dlr"}  # what AutoAttack's version rand is made of
SECTIONS["Accuracy under attack: L-infinity"] |= dict.fromkeys(PARTS)
CERTIFIED = f"certified L2 {RADIUS:g}"
SECTIONS["L2"][CERTIFIED] = None
COLUMNS = tuple(itertools.chain.from_iterable(SECTIONS.values()))
CHECKS = ({"method": "noise"}, {"method": "fgsm"}, {"method": "pgd", "eps": 1.0})  # cases that no column shows
STAGES = (
    ("clean", "PGD-20 8/255"), ("PGD-20 2/255", "PGD-20 4/255", "transfer", "noise off", "fixed draw", "PGD-40 L2 0.5"),
    ("c = 0.03", "c = 0.1"), ("PGD-40 8/255",), ("AutoAttack 8/255",), ("c = 0.01", "c = 0.06", "c = 0.2"), ("AutoAttack L2 0.5",),
    ("Square 8/255",), ("C&W median L2",),
)  # fmt: skip
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
    if unknown := set(args.columns) - {*COLUMNS}:
        raise ValueError(f"--columns: expected some of {', '.join(COLUMNS)}, got {', '.join(sorted(unknown))}")
    runs = _runs(args)
    beside = _read(args.beside) if args.beside else {"rows": {}, "compared": []}
    args.out.mkdir(parents=True, exist_ok=True)
    found = [_Row(name, run, config, beside["rows"].get(name)) for name, (run, config) in runs.items()]
    table = {
        "command": shlex.join(["python", "-m", "rse_fast.evaluate.table", *argv]), "images": args.images,
        "sections": {title: list(columns) for title, columns in SECTIONS.items()},
        "rows": beside["rows"] | {row.name: row.facts for row in found},
    }  # fmt: skip
    _write(args.out, table, beside["compared"])

    def do(stage: str, action: Callable) -> None:
        for row in [row for row in found if not row.failed]:
            print(f"{row.name}: {stage}", flush=True)
            row.attempt(stage.partition(":")[0], action)
            _write(args.out, table, beside["compared"])  # after each step: whatever ends the process, the table is that of now

    do("train", lambda row: row.train(args))
    plain = next((str(row.run) for row in found if row.name == "plain" and not row.failed), None)
    if args.report:
        do("attack", lambda row: row.attack(args, plain, ()))
    for stage in STAGES if not args.report else ():
        if columns := [column for column in stage if column in args.columns]:
            do(f"attack: {', '.join(columns)}", lambda row, columns=columns: row.attack(args, plain, columns))
    if CERTIFIED in args.columns:
        do("certify", lambda row: row.certify(args))
    print(f"table: {args.out / 'table.md'}")
    return 1 if any(row.facts["absent"] for row in found) else 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m rse_fast.evaluate.table", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--data", metavar="DATA", help="data set to train on, as in rse-fast train (default: the configuration's)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the table, new or to continue")
    parser.add_argument("--defences", nargs="*", choices=DEFENCES, default=DEFENCES, help="to train, or to reuse (default: all)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json of rse-fast train for all networks, their defence apart")
    text = "run folders that are trained; only read. NAME is that of the row (default: the run's defence)"
    parser.add_argument("--reuse", nargs="+", default=[], metavar="[NAME=]RUN", help=text)
    parser.add_argument(
        "--columns", nargs="+", default=COLUMNS, metavar="COLUMN", help=f"what to measure (default: all): {', '.join(COLUMNS)}"
    )
    text = "table.json made elsewhere: its rows stand beside those of this command"
    parser.add_argument("--beside", type=Path, metavar="FILE", help=text)
    parser.add_argument("--report", action="store_true", help="train, attack and certify nothing: the table of what is there")
    images = PROTOCOLS["table"].images
    parser.add_argument("--images", type=int, default=images, metavar="N", help="test images of attacks and certificates (%(default)s)")
    parser.add_argument("--draws", type=int, default=10, metavar="N", help="of the deployed ensembles (default: %(default)s)")
    parser.add_argument("--n", type=int, default=10_000, help="draws of a certificate, fewer where that decides it (default: %(default)s)")
    parser.add_argument("--seed", type=int, metavar="SEED", help="of attacks and scoring (default: fresh, kept in the folders)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    return parser


def _runs(args) -> dict[str, tuple[Path, train.Config | None]]:
    """The run folder of each row, and the configuration to train it with; None: it is another's, and only read."""
    reused = {}
    for text in args.reuse:
        name, equals, path = text.partition("=")
        run = Path(path if equals else text)
        run_inputs.check_run(run, "--reuse")
        name = name if equals else train.Config.load(run / "config.json").defence
        if name in reused:
            raise ValueError(f"--reuse: {str(reused[name])!r} and {str(run)!r} are both called {name}; name them by NAME=RUN")
        reused[name] = run
    base = train.Config.load(args.config) if args.config else train.Config()
    base = dataclasses.replace(base, data=args.data or base.data, device=args.device)
    found = {}
    for name in dict.fromkeys([*args.defences, *reused]):
        if name in reused:
            found[name] = reused[name], None
        else:  # a defence brings its own temperature
            found[name] = args.out / name / "run", dataclasses.replace(base, defence=name, temperature=None)
    return found


_FACTS = {"config": dict, "trained": dict, "cells": dict, "absent": dict, "notes": list}
_TEST = {"column": str, "first": str, "second": str, "images": int, "only_first": int, "only_second": int, "p": (int, float)}
_SAME = ("weights", "data", "labels", "order", "draws", "sigmas", "l2", "repeats", "resize", "logits")  # settings that cells rest on


def _read(path: Path) -> dict:
    """A table.json. Raises ValueError naming the option for anything else."""
    try:
        table = data.read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--beside: expected a table.json, got {str(path)!r} ({error})") from error
    rows = table.get("rows") if isinstance(table, dict) else None
    if not isinstance(rows, dict) or not isinstance(table.get("compared"), list):
        raise ValueError(f"--beside: expected a table.json, with rows and comparisons, got {str(path)!r}")
    for name, row in rows.items():
        if not _is_whole(row):
            raise ValueError(f"--beside: row {name!r} of {str(path)!r} does not have the form of a table.json; make it by this command")
    if not all(
        isinstance(test, dict) and all(isinstance(test.get(key), kind) for key, kind in _TEST.items()) for test in table["compared"]
    ):
        raise ValueError(f"--beside: a comparison in {str(path)!r} does not have the form of a table.json; make it by this command")
    return table


def _is_whole(row) -> bool:
    """Whether a row has what a table shows of it, and what it is told from other networks by."""
    if not isinstance(row, dict) or not {"run", *_FACTS} <= row.keys():
        return False
    optional = ("config", "trained")  # None where the network was never trained
    if not all(isinstance(row[key], kind) or (row[key] is None and key in optional) for key, kind in _FACTS.items()):
        return False
    if "settings" in row and not (isinstance(row["settings"], dict) and isinstance(row["settings"].get("weights"), str)):
        return False
    if not all(isinstance(cell, dict) and isinstance(cell.get("right", ""), str) for cell in row["cells"].values()):
        return False
    sections = {title: list(columns) for title, columns in SECTIONS.items()}
    try:
        markdown({"rows": {"": row}, "images": 1, "sections": sections, "compared": [], "command": ""})
    except (KeyError, TypeError, AttributeError, ValueError):
        return False
    return True


class _Row:
    """A network on its way through the stages, and what the table knows of it: ``facts``, JSON-serialisable.

    facts: run (folder), config (fields), trained (last row of the log), cells (column -> accuracy with its interval, the command that made
    it, and "right": for each image whether its first scoring was, "1" or "0", or "-" where there is none), absent (column -> why), notes
    (failed checks). beside: the facts of the same network in a table made elsewhere.
    """

    def __init__(self, name: str, run: Path, config: train.Config | None, beside: dict | None):
        self.name, self.run, self.config, self.failed, self.beside = name, run, config, False, beside
        self.checked: tuple[str, ...] = ()
        self.facts = {"run": str(run), "config": None, "trained": None, "cells": {}, "absent": dict.fromkeys(COLUMNS, "not done yet")}
        self.facts["notes"] = []

    def attempt(self, stage: str, action: Callable) -> None:
        """A defence that fails is a row with a reason; the others are not held up."""
        try:
            action(self)
            if stage != "train":  # which may not know yet how its network is attacked
                self._take_over()
        except (ValueError, TypeError, OSError, FloatingPointError, RuntimeError) as error:
            self.failed = True
            self.facts["absent"] = {column: f"{stage}: {error}" for column in COLUMNS if column not in self.facts["cells"]}
            print(f"{self.name}: {stage}: {error}", file=sys.stderr)

    def train(self, args) -> None:
        path = self.run / "config.json"
        found = train.Config.load(path) if path.exists() else None
        if self.config is None or args.report:
            last = (read(self.run / "log.jsonl") or [{"event": "no row"}])[-1] if found else {"event": "no row"}
            if last["event"] != "end":
                raise ValueError(f"the run {str(self.run)!r} is not complete (its log ends with {last['event']!r})")
        else:
            if found is not None and (found.fingerprint, found.data) != (self.config.fingerprint, self.config.data):
                raise ValueError(f"{str(self.run)!r} holds a run of another configuration; name another --out, or --reuse it")
            last = train.train(self.config, self.run, resume=found is not None)
            if last["event"] != "end":
                raise KeyboardInterrupt
        self.facts |= {"config": dataclasses.asdict(train.Config.load(path)), "trained": last}
        if self.beside and (there := self.beside.get("settings")):
            own = run_inputs.digest(run_inputs.model_of(self.run, True, args.device).state_dict())
            if own != there["weights"]:
                was = f"{own[:12]}, got one of weights {there['weights'][:12]}"
                raise ValueError(f"--beside: expected a row {self.name!r} of weights {was}; name the run otherwise by --reuse NAME=RUN")

    def attack(self, args, plain: str | None, columns) -> None:
        """Attacks for some columns, or for none, and takes over all that is there."""
        out = args.out / self.name / "evaluation"
        cases = PROTOCOLS["table"].cases(list(EPS.values()), L2, args.draws if self._noisy() else 0, plain not in (None, str(self.run)))
        wanted = [ATTACKED[column] for column in columns] + [what for what in CHECKS if "clean" in columns]
        if args.report and not (out / "evaluation.json").exists():
            return
        only = [case.name for case in cases if any(what.items() <= vars(case).items() for what in wanted)]
        if columns and not only:
            for column in columns:
                self.facts["absent"][column] = "not for this network"
            return
        results = command.run([
            str(self.run), "--protocol", "table", "--eps", *EPS, "--l2", str(L2), "--draws", str(args.draws), "--images", str(args.images),
            "--device", args.device, "--out", str(out), "--trust", "--calibration", "0",
            *(["--plain", plain] if plain not in (None, str(self.run)) else []),
            *(["--seed", str(args.seed)] if args.seed is not None else []), *(["--only", *only] if only else ["--report"]),
        ])  # fmt: skip
        self.facts["settings"], self.facts["versions"] = results["settings"], results["versions"]
        self._take(results, rows.read(out), args.images, cases)
        self.facts["notes"] = [f"{c['name']}: {c['text']}" for c in results["checks"] if not c["passed"]]
        self.checked = tuple(f"{c['name']}: " for c in results["checks"])

    def _take_over(self) -> None:
        """Adds the cells of the other table that are absent here, or of fewer images, and the notes on what was not checked here."""
        if not self.beside:
            return
        settings = self.beside.get("settings")
        if settings:
            self.facts.setdefault("settings", settings)
        here = self.facts.get("settings")
        if here and settings and (other := [key for key in _SAME if here.get(key) != settings.get(key)]):
            raise ValueError(f"--beside: expected a row {self.name!r} with the settings of this one, got another {', '.join(other)}")
        own = self.facts["notes"]
        own += [note for note in self.beside["notes"] if note not in own and not note.startswith(self.checked)]
        for column, cell in self.beside["cells"].items():
            if cell["images"] > self.facts["cells"].get(column, {"images": 0})["images"]:
                self._add(column, cell)

    def _noisy(self) -> bool:
        return train.Config.load(self.run / "config.json").noisy

    def _take(self, results, scored, images, cases) -> None:
        for column, what in ATTACKED.items():
            found = [
                max((e for e in results[kind].values() if what.items() <= e.items()), key=lambda e: (e["images"], e["eot"]), default=None)
                for kind in ("cases", "incomplete")
            ]
            if (e := found[0] or found[1]) is None:
                continue
            kept = ("accuracy", "name", "mean_l2", "eot", "seconds_per_image", "images", "median_l2", "won")
            cell = {name: e[name] for name in kept if name in e} | {"command": e.get("command")}
            cell["most_draws"] = max(case.eot for case in cases if what.items() <= vars(case).items())
            if self.facts["config"]["defence"] == self.name:
                cell["paper"] = dict(zip(COLUMNS, PAPER.get(self.name, ()), strict=False)).get(column)
            own = {index: row for (name, index), row in scored.items() if name == e["name"] and index < images}
            right = {index: row["answers"][0] == row["target"] for index, row in own.items()}
            self._add(column, cell | {"right": _marks(right, images)})
            for part in e.get("parts", {}) if column == "AutoAttack 8/255" else ():
                (title,) = [title for title, name in PARTS.items() if name == part]
                right = {index: row["parts"][part][0] == row["target"] for index, row in own.items()}
                self._add(title, cell | {"accuracy": e["parts"][part], "right": _marks(right, images)})
        for column, what in ATTACKED.items():
            noise_alone = what.get("source") in ("noise-off", "fixed-draw") and not results["settings"]["draws"]
            if noise_alone or (what.get("source") == "plain" and not results["settings"]["plain"]):
                self.facts["absent"][column] = "not for this network"
        if "AutoAttack 8/255" in self.facts["cells"] and not results["settings"]["draws"]:
            self.facts["absent"] |= dict.fromkeys(PARTS, "AutoAttack's version standard scores no part alone")

    def certify(self, args) -> None:
        if not self._noisy():
            self.facts["absent"][CERTIFIED] = "a deterministic network has no certificate of this kind"
            return
        out = args.out / self.name / "certified"
        if args.report:
            if not (out / "summary.json").exists():
                return
            summary = data.read_json(out / "summary.json")
        else:
            splits = train.load_data(train.Config.load(self.run / "config.json"))
            # Where the part is sorted by class the attacks take a shuffle of it, and certificates every so many-th.
            every = 1 if command.image_order(splits.test)[1] == "first" else max(1, len(splits.test) // args.images)
            summary = certify_cli.run([
                str(self.run), "--images", str(args.images), "--every", str(every), "--n", str(args.n), "--radius", str(RADIUS),
                "--device", args.device, "--out", str(out), "--trust",
            ])  # fmt: skip
        (found,) = [c for c in summary["certified"] if c["radius"] == RADIUS]
        accuracy = {"mean": found["accuracy"], "sd": None, "low": found["low"], "high": found["high"], "images": summary["images"]}
        cell = {"accuracy": accuracy, "command": summary["command"], "seconds_per_image": summary["seconds_per_image"]}
        self._add(CERTIFIED, cell | {"images": summary["images"]})

    def _add(self, column, cell):
        self.facts["cells"][column] = cell
        self.facts["absent"].pop(column, None)


# ------------------------------------------------------------------------------------------------------------------------ the files
def _marks(right: dict[int, bool], images: int) -> str:
    return "".join("-" if index not in right else "01"[right[index]] for index in range(images))


def _write(out, table, compared):
    right = {
        name: {column: cell["right"] for column, cell in row["cells"].items() if "right" in cell} for name, row in table["rows"].items()
    }
    table["compared"] = compare(right, compared)
    data.write_atomically(out / "table.json", lambda file: file.write(json.dumps(table, indent=1).encode()))
    data.write_atomically(out / "table.md", lambda file: file.write(markdown(table).encode()))


def compare(right: dict[str, dict[str, str]], known: Sequence[dict] = ()) -> list[dict]:
    """McNemar's test of each network against the one called rse (the first, if there is none) in each column, on the images that both have:
    {column, first, second, images, only_first, only_second, p, holm}. right: network -> column -> "1", "0" or "-" for each image. known:
    tests of a table made elsewhere, for pairs that ``right`` says less of. holm: p, corrected for the number of tests (Holm 1979)."""
    reference = "rse" if "rse" in right else next(iter(right), None)
    there = {(test["column"], test["first"], test["second"]): test for test in known}
    made = []
    for column in [column for column in (*ATTACKED, *PARTS) if column != "C&W median L2"]:
        for name in (name for name in right if name != reference):
            pairs = list(zip(right[name].get(column, ""), right[reference].get(column, ""), strict=False))
            pairs = [(mine == "1", other == "1") for mine, other in pairs if "-" not in (mine, other)]
            test = there.get((column, name, reference))
            if pairs and (test is None or len(pairs) >= test["images"]):
                split = mcnemar(*map(list, zip(*pairs, strict=True)))
                made.append({"column": column, "first": name, "second": reference, "images": len(pairs), "only_first": split["first"],
                             "only_second": split["second"], "p": split["p"]})  # fmt: skip
            elif test is not None:
                made.append(dict(test))
    largest = 0.0
    for rank, test in enumerate(sorted(made, key=lambda test: test["p"])):
        largest = test["holm"] = min(1.0, max(largest, test["p"] * (len(made) - rank)))
    return made


def markdown(table: dict) -> str:
    """The text of table.md."""
    rows, notes = table["rows"], []
    if len({tuple(row["settings"][key] for key in ("labels", "order", "images")) for row in rows.values() if "settings" in row}) > 1:
        notes = ["- The rows are of different images: compare none of them."]
    notes += [f"- {name}: {note}." for name, row in rows.items() for note in row["notes"]]
    absent = [f"- {name}{columns}: {reason}." for name, row in rows.items() for reason, columns in _by_reason(row)]
    parts = ["# Defences under attack"]
    if notes:
        parts += ["**Checks that failed. Until they are explained, read these rows as too favourable.**", "\n".join(notes)]
    partial = [c for row in rows.values() for c in row["cells"].values() if c["images"] < table["images"]]
    todo = sum(reason == "not done yet" for row in rows.values() for reason in row["absent"].values())
    if partial or todo:
        text = f"**This table is not complete.** {todo} cells are not yet measured"
        parts.append(text + f", and {len(partial)} are of fewer than {table['images']} images, with their number in the cell.")
    for title, columns in table["sections"].items():
        parts.append(f"## {title}")
        lines = [line for name, row in rows.items() for line in _lines(name, row, columns, table["images"])]
        parts.append(markdown_table([("accuracy %", *columns), *lines]))
    parts.append(
        "Mean ± sd over scorings with fresh noise (95 % interval for the choice of images). c: the paper's C&W L2 with fixed c. PGD-40: "
        "50 draws behind each gradient, or as many as the cell says; a check fails where the accuracy still falls between the last two. "
        "PGD-20: 20 draws. AutoAttack: version rand for networks with noise, standard for others; APGD: what the two of rand find alone. "
        "Square: 5000 queries. Transfer: PGD-20 on the plain network; noise off, fixed draw: on the network without noise, and with the "
        "same noise at each step. C&W median L2: the distance within which half of the images are wrong in most scorings. Certified: share "
        f"of images whose label, by votes, is right and holds within {RADIUS:g}. In italics the paper's figures (CIFAR-10, VGG16)."
    )
    parts += _comparisons(table["compared"])
    if absent:
        parts += ["## What is absent", "\n".join(absent)]
    if trained := {name: row for name, row in rows.items() if row["trained"]}:
        parts += ["## What training cost", *_cost(trained)]
        parts += ["## What was measured", "\n".join(f"- {name}: {_facts(row)}" for name, row in trained.items())]
    if measured := {name: row for name, row in rows.items() if "settings" in row}:
        parts += ["## Beside the paper's figures", _differences(measured)]
    parts += ["## How to repeat it", f"`{table['command']}`. The command behind each figure, every configuration and seed: table.json."]
    return "\n\n".join(parts) + "\n"


def _by_reason(row):
    """(reason, names of the columns that it concerns, or nothing where these are all) for each reason."""
    for reason in dict.fromkeys(row["absent"].values()):
        columns = [column for column in COLUMNS if row["absent"].get(column) == reason]
        yield reason, f" ({', '.join(columns)})" * (len(columns) < len(COLUMNS))


def _lines(name, row, columns, images):
    yield name, *(_cell(row["cells"].get(column), row["absent"].get(column), images) for column in columns)
    published = dict(zip(COLUMNS, PAPER.get(name, ()), strict=False))
    if published.keys() & columns:
        yield f"*{name}, paper*", *(f"*{published[column]:.1f}*" if column in published else "–" for column in columns)


def _cell(cell, reason, images):
    if cell is None:
        return "not yet" if reason == "not done yet" else "–"
    text = percent(cell["accuracy"])
    if "won" in cell:
        text = f"{cell['median_l2']:.3f}" if cell["median_l2"] is not None else f"more: {100 * cell['won']:.0f} % won"
    if cell.get("eot", 0) < cell.get("most_draws", 0):  # the case with more is not complete
        text += f", EOT {cell['eot']}"
    return text + (f", {cell['images']} of {images} images" if cell["images"] < images else "")


def _comparisons(compared):
    if not compared:
        return
    reference, columns = compared[0]["second"], list(dict.fromkeys(test["column"] for test in compared))
    yield f"## Which differences from {reference} are more than chance"
    lines = []
    for name in dict.fromkeys(test["first"] for test in compared):
        own = {test["column"]: test for test in compared if test["first"] == name}
        lines.append((name, *(_verdict(own.get(column)) for column in columns)))
    yield markdown_table([(f"against {reference}", *columns), *lines])
    yield (
        f"+a −b: images that only this network had right, and only {reference}, in the first scoring of each. McNemar's exact test, "
        f"corrected for {len(compared)} tests (Holm): **bold** where p < 0.05; otherwise the two are not told apart."
    )


def _verdict(test):
    if test is None:
        return "–"
    text = f"+{test['only_first']} −{test['only_second']}"
    if test["holm"] >= 0.05:
        return text
    return f"**{'better' if test['only_first'] > test['only_second'] else 'worse'}** {text}"


def _cost(trained):
    header = ("network", "epochs", "CPU minutes", "clean %", "per CPU minute", "PGD-40 8/255 %", "per CPU minute")
    lines = []
    for name, row in trained.items():
        minutes = row["trained"]["cpu_seconds"] / 60 if "cpu_seconds" in row["trained"] else None
        line = [name, str(row["config"]["epochs"]), f"{minutes:.1f}" if minutes else "–"]
        for column in ("clean", "PGD-40 8/255"):
            accuracy = 100 * row["cells"][column]["accuracy"]["mean"] if column in row["cells"] else None
            line += [
                f"{accuracy:.1f}" if accuracy is not None else "–",
                f"{accuracy / minutes:.2f}" if accuracy is not None and minutes else "–",
            ]
        lines.append(tuple(line))
    yield markdown_table([header, *lines])
    yield "CPU minutes: processor time of the training process, all its threads. Per CPU minute: points of accuracy."


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
            "A distilled network is trained at a temperature T and used at temperature 1. Its logits are then T times as large, so a fixed "
            "c gives them T times the weight. The softmax saturates, and the gradients that PGD follows vanish."
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
