"""``python -m rse_fast.bench.trained_run RUN``: early exit and int8 on a run of `rse-fast train` and its test images."""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from rse_fast import data, run_inputs, train
from rse_fast.cli import wrapper

from . import early_exit, int8, report, results
from .measure import default_device


def of_run(folder: Path, images: int) -> tuple[str, nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(name, noisy network, test images, their labels, validation images to calibrate on) of a run folder of `rse-fast train`.

    ``images``: so many of the test set, evenly spread over it, since a folder is sorted by class.
    """
    model = run_inputs.model_of(folder, trust=True, device=default_device())
    config = train.Config.load(folder / "config.json")
    splits = train.load_data(config)
    picked = torch.arange(min(images, len(splits.test))) * len(splits.test) // min(images, len(splits.test))
    (x,) = splits.test.fetch([picked])
    calibration, _ = next(data.batches(splits.val, 256))
    x, y = x.to(default_device()).float().div_(255), splits.test.labels[picked].to(default_device())
    return f"{config.model} network on {splits.name}", model, x, y, calibration.to(default_device())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rse_fast.bench.trained_run", description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of rse-fast train, of a network with noise")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="test images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench-results.json"), metavar="FILE", help="merged into, as by rse-fast bench")
    arguments = parser.parse_args(argv)
    return wrapper.run("bench", lambda: _measure(arguments))


def _measure(arguments: argparse.Namespace) -> int:
    name, model, x, y, calibration = of_run(arguments.run, arguments.images)
    pieces = [lambda: early_exit.ten_draws(name, model, x, y), lambda: early_exit.hundred_draws(name, model, x),
              lambda: early_exit.agreement(name, model, x, y)]  # fmt: skip
    if default_device().type == "cpu":
        pieces.append(lambda: int8.compared(f"{name} n=10", model, x, y, calibration))
    for piece in pieces:
        found = piece()
        environment = results.environment()
        results.save(arguments.out, results.merge(results.load(arguments.out), *found, environment))
        report.show(results.merge({"rows": [], "targets": []}, *found, environment))
    return 0


if __name__ == "__main__":
    sys.exit(main())
