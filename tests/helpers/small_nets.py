"""Small noisy networks of the kinds that an ensemble has to pack and fuse, their results pass by pass, and what rounding may change.

``NETS[name]()`` is a converted model in eval mode for float images [N, 3, 10, 10], with 5 classes.
"""

import math

import torch
from torch import nn

import rse_fast
from rse_fast.context import NoiseContext
from rse_fast.ensemble.memory import SavedBytes
from rse_fast.nn import GaussianNoise, NoisyConv2d

CLASSES = 5


class Head(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, CLASSES))


class Block(nn.Module):
    """A residual block with a 1x1 shortcut and a grouped convolution."""

    def __init__(self, channels, out):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, groups=2), nn.BatchNorm2d(out, affine=False)
        self.shortcut, self.bn3 = nn.Conv2d(channels, out, 1, stride=2), nn.BatchNorm2d(out)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return nn.functional.relu(y + self.bn3(self.shortcut(x)))


class Bypass(nn.Module):
    """A plain convolution whose output goes through noisy ones and, by a skip connection, around them."""

    def __init__(self):
        super().__init__()
        self.prefix = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = Head(8)

    def forward(self, x):
        y = self.prefix(x)
        return self.head(self.body(y) + y)


class Branches(nn.Module):
    """Two noisy branches that both read the plain prefix, joined by channels."""

    def __init__(self):
        super().__init__()
        self.prefix = nn.Conv2d(3, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding="same", dilation=2)
        self.head = Head(8)

    def forward(self, x):
        y = self.prefix(x).relu()
        return self.head(torch.cat([self.left(y), self.right(y)], 1))


class Shared(nn.Module):
    """One noisy layer and one BatchNorm, called twice each."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.bn, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), Head(4)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            x = self.bn(self.conv(x)).relu()
        return self.head(x)


class DataDependent(nn.Module):
    """Cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Head(4)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.head(y.relu() if y.sum() < 1e9 else y)


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), Head(6),
    )  # fmt: skip


def wide():
    """A layer of few channels, and one of many."""
    return nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 48, 3), nn.ReLU(), Head(48))


def smooth():
    """No kinks: rounding cannot switch a gradient on or off."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.GELU(), Head(6)
    )  # fmt: skip


NETS = {
    "plain": lambda: lively(rse_fast.convert(plain(), 0.3, 0.2)),
    "residual": lambda: lively(rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3), Block(4, 6), Block(6, 8), Head(8)), 0.3, 0.2)),
    "plain prefix": lambda: lively(rse_fast.convert(plain(), 0.4, 0.3, exclude=["0", "3"])),
    "late noise": lambda: lively(nn.Sequential(*plain()[:7], GaussianNoise(0.5), Head(8))),
    "noisy head": lambda: lively(rse_fast.convert(plain(), 0.5, include=nn.Linear)),
    "bypass": lambda: lively(rse_fast.convert(Bypass(), 0.5, exclude="prefix")),
    "branches": lambda: lively(rse_fast.convert(Branches(), 0.4, 0.3, exclude="prefix")),
    "shared": lambda: lively(rse_fast.convert(Shared(), 0.3, 0.2)),
    "norm first": lambda: lively(nn.Sequential(nn.BatchNorm2d(3), NoisyConv2d(3, 6, 3, sigma=0.4), nn.BatchNorm2d(6), Head(6))),
    "smooth": lambda: lively(rse_fast.convert(smooth(), 0.3, 0.2)),
    "wide": lambda: lively(rse_fast.convert(wide(), 0.3, 0.2)),
    "not traceable": lambda: lively(rse_fast.convert(DataDependent(), 0.3, 0.2)),
}  # fmt: skip


def lively(model: nn.Module, spread: float = 1.5, x: torch.Tensor | None = None) -> nn.Module:
    """Gives a new model the statistics of a trained one: activations of variance about 1, logits of standard deviation ``spread``."""
    x = torch.rand(32, 3, 10, 10) if x is None else x
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad(), rse_fast.noise_off(model):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        for norm in norms:
            norm.momentum = 1.0
            if norm.affine:
                norm.weight.uniform_(0.7, 1.3)
                norm.bias.normal_(0, 0.3)
        model.train()(x)
        logits = model.eval()(x)
        head.weight.mul_(spread / logits.std())
        head.bias.sub_(model(x).mean(0))
    for norm in norms:
        norm.momentum = 0.1
    return model


def sequential(model: nn.Module, x: torch.Tensor, draws: int, seed: int, image_offset: int = 0, draw_offset: int = 0) -> torch.Tensor:
    """Logits [draws, N, K] of one pass a draw over the model as it is, in its own dtype."""
    seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    passes = []
    for d in range(draw_offset, draw_offset + draws):
        with NoiseContext(seed, len(x), 1, image_offset, d):
            passes.append(model(x))
    for module, training in modes.items():
        module.training = training
    return torch.stack(passes)


def rounding(model: nn.Module, logits: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    """What two orders of the same sums may make of the logits: a sum of n terms wanders by sqrt(n) roundings (Higham and Mary, 2019).

    The roundings of all layers add up, each relative to the largest logit. Where sums are kept in float32 and stored in a narrower
    ``dtype``, each layer adds one rounding to that, and these wander over the layers.
    """
    terms = [layer.weight[0].numel() for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    terms += [2 for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]  # a scale and a shift
    stored = 0.0 if dtype == torch.float32 else math.sqrt(len(terms)) * torch.finfo(dtype).eps / 2
    return (sum(math.sqrt(n) for n in terms) * torch.finfo(torch.float32).eps + stored) * logits.abs().max().item()


def kept_for_gradient(ensemble, x):
    """Bytes that `Ensemble.forward` of [2, 3, 10, 10] images in 8 draws keeps: (those it planned with, all, those behind the model)."""
    runner = ensemble.prepared(x).runner
    with SavedBytes(runner.model) as saved:
        ensemble(x)
    softmax = 2 * 8 * CLASSES * 4 * 4  # of logits, their softmax and sums
    return 16 * runner.saved_bytes, saved.total, softmax
