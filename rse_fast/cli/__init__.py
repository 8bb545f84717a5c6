"""The command line. A sub-command is a module with ``main(argv)``, imported only when it is called."""

import argparse
import importlib
import sys
from importlib.metadata import version

# name: (module, extra that brings what it imports, one line of help)
COMMANDS = {
    "demo": ("rse_fast.demo", "demo", "train a small network and its RSE version on real images, attack both, write a report"),
    "train": ("rse_fast.train.command", "train", "train a network, plain or defended, with checkpoints that lose nothing"),
    "evaluate": ("rse_fast.evaluate.command", "attacks", "attack a network by a protocol; a report of what is left of its accuracy"),
    "predict": ("rse_fast.predict_cli", "train", "label a data set with the ensemble, on one or many devices"),
    "certify": ("rse_fast.certify_cli", "certify", "certified L2 radius of every image of a test set; a table, a picture, a summary"),
    "bench": ("rse_fast.bench.__main__", "bench", "measure rse-fast beside its peers and limits; tables, pictures, comparisons"),
    "doctor": ("rse_fast.doctor", None, "print versions, devices, the CPU library, the active backends and where seeds come from"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs ``rse-fast COMMAND ...`` and returns the exit status. A missing extra is one line on stderr and status 1."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="rse-fast", description="Random Self-Ensemble for PyTorch: fast noise, packed ensembles.")
    parser.add_argument("--version", action="version", version=f"rse-fast {version('rse-fast')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, _, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(argv[:1]).command  # what follows the name belongs to the sub-command's own parser
    module, extra, _ = COMMANDS[command]
    try:
        return importlib.import_module(module).main(argv[1:]) or 0
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").partition(".")[0] in ("", "rse_fast"):
            raise
        print(f"rse-fast {command}: needs {error.name}: pip install 'rse-fast[{extra}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
