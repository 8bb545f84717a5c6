"""``rse-fast train``: a flag for each field of `Config`, a run folder, resuming."""

import argparse
import dataclasses
import os
import re
import shlex
import sys
from pathlib import Path

from rse_fast import models, run_inputs
from rse_fast.cli import wrapper
from rse_fast.cli.options import number
from rse_fast.train.checkpoint import CheckpointError
from rse_fast.train.config import Config, size
from rse_fast.train.distributed import ProcessLost, leave
from rse_fast.train.run import train

_METAVARS = {"data": "DATA", "model": "MODEL", "resize": "N|HxW", "device": "DEVICE", "seed": "SEED"}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 at the end and after SIGTERM in the loop; 130 after Ctrl-C, saved as well; 1 when training diverges or the
    disk is full; 2 for bad input. Ends the process with 1 where another one of the run is gone."""
    args = _parser().parse_args(argv)

    def action():
        try:
            return _run(args)
        except (ValueError, TypeError) as error:
            raise ValueError(_in_flags(str(error))) from error

    return wrapper.run("train", action)


def _in_flags(message: str) -> str:
    """A message that names fields of `Config`, with the flags that they are here: the one it begins with, and all of several words."""
    names = [f.name for f in dataclasses.fields(Config)]
    long = "|".join(name for name in names if "_" in name)
    found = rf"^(?:{'|'.join([*names, 'config', 'resume'])})(?=: )|(?<![\w/.'\"-])(?:{long})(?![\w/.'\"-])"
    return re.sub(found, lambda match: _flag(match[0]), message)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _run(args) -> int:
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    if args.resume is not None and (args.out or args.config):
        raise ValueError("--resume: names the run, its folder and its configuration; leave --out and --config out")
    if args.from_step is not None and args.resume is None:
        raise ValueError("--from-step: needs --resume")
    if args.resume is not None:
        run_inputs.check_run(args.resume, "--resume")
    source = args.resume / "config.json" if args.resume else args.config
    config = Config.load(source) if source else Config()
    config = dataclasses.replace(config, **_implied(config, given), **given)
    out = args.resume or args.out or Path("runs") / f"{config.model.replace(':', '.')}-{config.defence}"
    if ":" in config.model:
        if "model" not in given and not args.trust:
            raise ValueError(
                f"--trust: {str(source)!r} names the model {config.model!r}, code that would be imported and run; add --trust if you "
                "trust who wrote that file"
            )
        models.search_working_directory()
    try:
        row = train(config, out, resume=args.resume is not None, from_step=args.from_step)
    except CheckpointError as error:
        hint = f"\nTo continue from that: {_continued(config, out)} --from-step STEP" if "is whole" in str(error) else ""
        raise ValueError(f"{error}{hint}") from error
    except ProcessLost as error:
        leave(f"rse-fast train: {error}; to continue from the newest checkpoint: {_continued(config, out)}")
    except FloatingPointError as error:
        print(f"rse-fast train: {error}; what was saved before is in {out}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"rse-fast train: {wrapper.unwritten(error, out, 'checkpoints/step-*/*', '*/checkpoints/step-*/*')}", file=sys.stderr)
        return 1
    if int(os.environ.get("RANK", 0)) == 0:
        print(_summary(row, config, out))
    return 130 if row.get("signal") == "SIGINT" else 0


def _implied(config: Config, given: dict) -> dict:
    """Another defence than the configuration's brings its own temperature."""
    return {"temperature": None} if given.get("defence", config.defence) != config.defence and "temperature" not in given else {}


def _continued(config, out):
    return f"rse-fast train --resume {shlex.quote(str(out))}" + " --trust" * (":" in config.model)


def _summary(row, config, out):
    if row["event"] == "stop":
        return f"stopped at step {row['step']} and saved; to continue: {_continued(config, out)}"
    ensemble = f", {row['test_ensemble_accuracy']:.2%} with {row['draws']} draws" if "draws" in row else ""
    best = f"best epoch {row['best_epoch']} ({row['best_score']:.2%} in validation)"
    return f"{out}: {best}; test accuracy {row['test_accuracy']:.2%}{ensemble}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rse-fast train", description="Trains a network, plain or defended, in a run folder.", argument_default=argparse.SUPPRESS,
        epilog="On several GPUs: torchrun --nproc-per-node N -m rse_fast.cli train ...",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="run folder, new (default: runs/MODEL-DEFENCE)")
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help="config.json of another run; flags change its fields")
    parser.add_argument("--resume", type=Path, default=None, metavar="DIR", help="continue the run in DIR from its newest checkpoint")
    parser.add_argument(
        "--trust",
        action="store_true",
        default=False,
        help="import the module that --config or --resume names as its model, and so run that code",
    )
    parser.add_argument(
        "--from-step", type=int, default=None, metavar="STEP", help="with --resume: continue from the checkpoint of this step instead"
    )
    for f in dataclasses.fields(Config):
        rule, flag = f.metadata, _flag(f.name)
        flags = [flag, "--defense"] if f.name == "defence" else [flag]  # both spellings of English
        text = rule["text"] + ("" if f.default is None else f" (default: {f.default})")
        if rule["kind"] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            continue
        kind = number if rule["kind"] is float else size if rule["pair"] else rule["kind"]
        if rule["optional"]:
            text += "; 'none' takes back what --config says"
            kind = _or_none(kind)
        choices = rule["choices"] and [*rule["choices"], *[None] * rule["optional"]]
        shown = f"{{{','.join(rule['choices'])}}}" if choices else _METAVARS.get(f.name) or {int: "N", float: "X"}.get(rule["kind"], "TEXT")
        parser.add_argument(*flags, type=kind, choices=choices, help=text, metavar=shown)
    return parser


def _or_none(kind):
    """Reads "none" as None and all else as ``kind``; named as that is, for messages."""

    def read(text: str):
        return None if text == "none" else kind(text)

    read.__name__ = kind.__name__
    return read
