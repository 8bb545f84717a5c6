"""A classifier of digits that needs no training."""

import torch

import rse_fast
from rse_fast import data


def nearest_mean(noisy: bool) -> torch.nn.Module:
    """Digits by the nearest class mean, as two convolutions with a BatchNorm between them that does nothing."""
    part = data.digits().train
    images = part.images.float() / 255
    means = torch.stack([images[part.labels == k].mean(0) for k in range(10)])
    first, norm, last = torch.nn.Conv2d(1, 10, 8), torch.nn.BatchNorm2d(10, eps=0), torch.nn.Conv2d(10, 10, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(means)
        first.bias.copy_(-means.square().sum((1, 2, 3)) / 2)
        last.weight.copy_(torch.eye(10)[..., None, None])
    net = torch.nn.Sequential(first, norm, last, torch.nn.Flatten())
    return (rse_fast.convert(net, 0.2, 0.1) if noisy else net).eval()
