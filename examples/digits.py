"""What the examples of training loops share: handwritten digits, a small noisy network, and the accuracy of its ensemble."""

import torch
from torch import nn

import rse_fast
from rse_fast import data, models

splits = data.digits()


def dataset(part: str) -> torch.utils.data.TensorDataset:
    """Pairs of an image float32 [1, 8, 8] in [0, 1] and a label; part: train, val or test."""
    found = getattr(splits, part)
    return torch.utils.data.TensorDataset(found.images.float() / 255, found.labels)


def network() -> nn.Module:
    """Seven convolutions with noise in front of each. Converted before an optimiser, or anything around the model, is made."""
    return rse_fast.convert(models.SmallNet(num_classes=10, in_channels=1, width=16), init_sigma=0.2, inner_sigma=0.1)


def report(model: nn.Module) -> None:
    images, labels = dataset("test").tensors
    found = rse_fast.Ensemble(model, draws=10).predict(images)
    print(f"test accuracy of 10 draws: {(found.labels == labels).double().mean():.3f}", flush=True)
