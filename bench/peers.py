"""What a user would run instead: the eager noise layer, its ensemble loop, and the deterministic network as the limit."""

import copy

import torch
from torch import nn

from rse_fast.ensemble import fuse


def eager_noise(x, sigma):
    return x + sigma * torch.randn_like(x)


def eager_rse(model: nn.Module, init_sigma: float, inner_sigma: float) -> nn.Module:
    """A copy of a plain model with eager noise in front of every convolution."""
    model = copy.deepcopy(model).eval()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for i, conv in enumerate(convolutions):
        sigma = init_sigma if i == 0 else inner_sigma
        conv.register_forward_pre_hook(lambda module, args, sigma=sigma: (eager_noise(args[0], sigma),))
    return model


@torch.no_grad()
def loop(model, x, draws):
    """Mean softmax of ``draws`` passes, one after the other."""
    return sum(model(x).float().softmax(-1) for _ in range(draws)) / draws


@torch.no_grad()
def packed(model, x, draws):
    """Mean softmax of ``draws`` passes packed into the batch."""
    return model(x.repeat(draws, 1, 1, 1)).float().softmax(-1).view(draws, len(x), -1).mean(0)


def deterministic(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The plain network at its best: eval mode, BatchNorm folded, channels last."""
    return fuse.snapshot(model, dtype)[0]
