"""Networks trained on real images, for what random weights cannot show: how sure a prediction is.

``python -m rse_fast.bench.trained RUN`` measures early exit and int8 on a run of `rse-fast train` and its test images. The suites take
networks trained on handwritten digits, for a few minutes.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

import rse_fast
from rse_fast import data, train
from rse_fast.models import VGG16

from .measure import device
from .networks import SIGMAS


def digits(network: type[nn.Module] = VGG16, side: int = 32, steps: int = 120, **options) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(noisy network, test images [N, 3, side, side], test labels [N]): noisy SGD on those that come with scikit-learn.

    side: what their 8x8 pixels are scaled up to. options: of the network. Kept in the cache folder (RSE_FAST_CACHE, by default
    ``~/.cache/rse-fast``): on a small CPU the training of VGG16 takes minutes.
    """
    from sklearn.datasets import load_digits

    found, where = load_digits(), device()
    x = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    x = nn.functional.interpolate(x, size=(side, side), mode="bilinear").expand(-1, 3, -1, -1).contiguous().to(where)
    y = torch.from_numpy(found.target).to(where)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(where)
    train, test = order[:1400], order[1400:]
    torch.manual_seed(0)
    model = rse_fast.convert(network(**options), *SIGMAS).to(where)
    folder = Path(os.environ.get("RSE_FAST_CACHE") or Path.home() / ".cache" / "rse-fast")
    kind = "-".join([network.__name__.lower(), *map(str, options.values()), f"digits{side}", str(steps), torch.__version__])
    file = folder / f"bench-{kind}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file, device=str(where)))
        return model.eval(), x[test], y[test]
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (64,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    data.write_atomically(file, lambda out: out.write(save(weights)))
    return model.eval(), x[test], y[test]


def of_run(folder: Path, images: int) -> tuple[str, nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(name, noisy network, test images, their labels, validation images to calibrate on) of a run folder of `rse-fast train`.

    ``images``: so many of the test set, evenly spread over it, since a folder is sorted by class.
    """
    config = train.Config.load(folder / "config.json")
    splits = train.load_data(config)
    picked = torch.arange(min(images, len(splits.test))) * len(splits.test) // min(images, len(splits.test))
    (x,) = splits.test.fetch([picked])
    calibration, _ = next(data.batches(splits.val, 256))
    x, y = x.to(device()).float().div_(255), splits.test.labels[picked].to(device())
    return f"{config.model} network on {splits.name}", train.load_model(folder, device=device(), trust=True), x, y, calibration.to(device())


def main(argv: list[str] | None = None) -> int:
    from . import early_exit, int8, report, results

    parser = argparse.ArgumentParser(prog="python -m rse_fast.bench.trained", description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of rse-fast train, of a network with noise")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="test images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench-results.json"), metavar="FILE", help="merged into, as by rse-fast bench")
    arguments = parser.parse_args(argv)
    try:
        name, model, x, y, calibration = of_run(arguments.run, arguments.images)
    except ValueError as error:
        print(f"rse-fast bench: {error}", file=sys.stderr)
        return 2
    pieces = [lambda: early_exit.ten_draws(name, model, x, y), lambda: early_exit.hundred_draws(name, model, x),
              lambda: early_exit.agreement(name, model, x, y)]  # fmt: skip
    if device().type == "cpu":
        pieces.append(lambda: int8.compared(f"{name} n=10", model, x, y, calibration))
    for piece in pieces:
        found = piece()
        where = results.environment()
        results.save(arguments.out, results.merge(results.load(arguments.out), *found, where))
        report.show(results.merge({"rows": [], "targets": []}, *found, where))
    return 0


if __name__ == "__main__":
    sys.exit(main())
