"""What the tests of training share: networks small enough for many runs, and a data set that can be learned in a few steps.

The networks are named to a run as "tiny_training:NAME", in other processes with this folder on PYTHONPATH.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rse_fast import cli
from rse_fast.train import Config


def net(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )  # fmt: skip


def net_without_batch_statistics(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )  # fmt: skip


def net_for_8_pixels(num_classes: int, in_channels: int) -> nn.Module:
    """A network without a pool in front of its head: images of 8x8 only."""
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, num_classes))


class _Named(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.net = net(num_classes, in_channels)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": x, "logits": self.net(x)}


def net_with_names(num_classes: int, in_channels: int) -> nn.Module:
    """`net` that returns its logits in a mapping, as Hugging Face's do, in training and in use."""
    return _Named(num_classes, in_channels)


class _WithAuxiliaryHead(nn.Module):
    """`net`, which in training returns what ``packed`` makes of its logits and of another head's."""

    def __init__(self, num_classes: int, in_channels: int, packed) -> None:
        super().__init__()
        self.net, self.packed = net(num_classes, in_channels), packed

    def forward(self, x: torch.Tensor):
        logits = self.net(x)
        return self.packed(logits, logits.detach() + 1) if self.training else logits


def net_with_a_tuple(num_classes: int, in_channels: int) -> nn.Module:
    return _WithAuxiliaryHead(num_classes, in_channels, lambda main, other: (main, other))


def net_with_a_dict(num_classes: int, in_channels: int) -> nn.Module:
    return _WithAuxiliaryHead(num_classes, in_channels, lambda main, other: {"aux": other, "out": main})


def net_with_a_puzzle(num_classes: int, in_channels: int) -> nn.Module:
    return _WithAuxiliaryHead(num_classes, in_channels, lambda main, other: {"aux": other, "head": main})


def write_images(path: Path, rng: np.random.Generator, train: int = 120, test: int = 30) -> Path:
    """A .npz data set of three kinds of 8x8 RGB images, told apart by which colour is bright, under noise."""
    stored = {}
    for name, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 3
        images = rng.normal(90, 40, (count, 3, 8, 8))
        images[np.arange(count), labels] += 70
        stored |= {f"{name}_images": images.clip(0, 255).astype(np.uint8), f"{name}_labels": labels}
    np.savez(path, **stored)
    return path


def config(path: Path, **fields) -> Config:
    """A run of four epochs of six steps."""
    defaults = {"model": "tiny_training:net", "epochs": 4, "batch_size": 18, "lr": 0.05, "log_steps": 2, "device": "cpu"}
    return Config(data=str(path), **(defaults | fields))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(rows: list[dict]) -> list[dict]:
    """The rows of a log that must not depend on when the run was stopped."""
    kept = [row for row in rows if row["event"] in ("step", "epoch", "end")]
    return [{name: value for name, value in row.items() if name not in ("seconds", "cpu_seconds")} for row in kept]


def _threads() -> list[str]:
    """Names of the threads of this process that belong to a process group."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return sorted(name for name in names if "gloo" in name)


if __name__ == "__main__":  # rse-fast, and a look at what it leaves behind
    status = cli.main()
    print(f"threads left: {_threads()}")
    sys.exit(status)
