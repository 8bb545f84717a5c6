"""The networks of the Random Self-Ensemble paper in their CIFAR/STL form, and three small networks for CPUs.

All are plain torch modules without noise; ``rse_fast.convert`` puts the noise in. They take float images [B, C, H, W] in [0, 1] and return
logits [B, num_classes]. None of them normalises its input: the first noise layer acts on the pixels, so ``init_sigma`` is in pixel units,
and a mean/std normalisation in front of it would change what sigma means from data set to data set (BatchNorm does the scaling after the
first convolution). All can be traced by ``torch.fx``.

Parameter counts are those of the default arguments (BatchNorm's running statistics not counted).
"""

import importlib
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn


def _conv_bn_relu(in_channels: int, out_channels: int, *, padding: int = 1, bias: bool = True, affine: bool = True) -> list[nn.Module]:
    """A 3x3 convolution, BatchNorm and ReLU, as a list to be spliced into a Sequential."""
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=padding, bias=bias),
        nn.BatchNorm2d(out_channels, affine=affine),
        nn.ReLU(inplace=True),
    ]


class _PooledFeatures(nn.Module):
    """``layers`` that end in ``channels``, their average (or what else ``pool`` makes of a map) and a Linear head."""

    def __init__(self, layers: list[nn.Module], channels: int, num_classes: int, pool: type[nn.Module] = nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.pool = pool(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class VGG16(_PooledFeatures):
    """VGG16 with BatchNorm and a single Linear head, for 32x32 images (Simonyan & Zisserman 2015; this form: Liu et al. 2018).

    13 convolutions, 14,728,266 parameters. As in the authors' code the convolutions keep their bias although BatchNorm follows.
    Images from 32x32 up; larger maps are averaged before the head.
    """

    _STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        layers: list[nn.Module] = []
        for stage in self._STAGES:
            for out_channels in stage:
                layers += _conv_bn_relu(in_channels, out_channels)
                in_channels = out_channels
            layers.append(nn.MaxPool2d(2))
        super().__init__(layers, in_channels, num_classes)


class _ResNeXtBlock(nn.Module):
    """1x1 - grouped 3x3 - 1x1 with a shortcut; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, inner_channels: int, out_channels: int, *, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner_channels)
        self.conv2 = nn.Conv2d(inner_channels, inner_channels, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner_channels)
        self.conv3 = nn.Conv2d(inner_channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNeXt29(nn.Module):
    """ResNeXt-29 2x64d, CIFAR form (Xie et al. 2017; this form: Liu et al. 2018).

    29 layers on the main path (first convolution, 3 stages of 3 blocks of 3 convolutions, Linear) plus 3 projection shortcuts, hence 31
    convolutions; cardinality 2, base width 64, stages of 256, 512 and 1024 channels; 9,128,778 parameters. The first convolution is 1x1 as
    in the code of the self-ensemble paper (3x3 in the ResNeXt paper). Any image size; the last map is averaged.
    """

    _CARDINALITY = 2
    _BASE_WIDTH = 64
    _BLOCKS_PER_STAGE = 3

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        channels = 64
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        blocks: list[nn.Module] = []
        for stage in range(3):
            inner_channels = self._CARDINALITY * self._BASE_WIDTH * 2**stage
            for block in range(self._BLOCKS_PER_STAGE):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_ResNeXtBlock(channels, inner_channels, 2 * inner_channels, groups=self._CARDINALITY, stride=stride))
                channels = 2 * inner_channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return self.classifier(torch.flatten(self.pool(x), 1))


class ModelA(_PooledFeatures):
    """The STL-10 network of the self-ensemble paper ("Model A"), for 96x96 images (Liu et al. 2018).

    Six 3x3 convolutions 32-64-128-128-256-256 with bias, the last two without padding; BatchNorm without affine parameters; max-pooling
    after each but the fifth, which leaves a map of one pixel; 1,128,650 parameters. Images from 96x96 up; larger maps are averaged before
    the head.
    """

    # (channels, padding, pool afterwards)
    _LAYERS = ((32, 1, True), (64, 1, True), (128, 1, True), (128, 1, True), (256, 0, False), (256, 0, True))

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        layers: list[nn.Module] = []
        for out_channels, padding, pool in self._LAYERS:
            layers += _conv_bn_relu(in_channels, out_channels, padding=padding, affine=False)
            if pool:
                layers.append(nn.MaxPool2d(2))
            in_channels = out_channels
        super().__init__(layers, in_channels, num_classes)


class SmallNet(_PooledFeatures):
    """Seven 3x3 convolutions w-w-2w-2w-4w-4w-4w with BatchNorm and ReLU, two max-pools and a global average: the network of the demo.

    436,458 parameters at ``width=32``, ``in_channels=3``. Images from 4x4 up (8x8 digits as well as 32x32 photos): only two pools, so that
    the last convolutions still see a map of 2x2 on an 8x8 image.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 32) -> None:
        layers: list[nn.Module] = []
        stages = ((width, width), (2 * width, 2 * width), (4 * width, 4 * width, 4 * width))
        for index, stage in enumerate(stages):
            for out_channels in stage:
                layers += _conv_bn_relu(in_channels, out_channels, bias=False)
                in_channels = out_channels
            if index < len(stages) - 1:
                layers.append(nn.MaxPool2d(2))
        super().__init__(layers, in_channels, num_classes)


class _ResidualConv(nn.Module):
    """x + relu(bn(conv(x))), a 3x3 convolution that keeps the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.relu(self.bn(self.conv(x)))


class SmallResNet(_PooledFeatures):
    """Seven 3x3 convolutions for photographs of 32x32, small enough to be trained on a CPU.

    One to 32 channels and a max-pool, then stages of 48, 96 and 192 channels, a max-pool before the second and third, each of a convolution
    and a residual one (as in the networks of the DAWNBench competition); BatchNorm and ReLU after each, and a global average.
    660,842 parameters, 25.6 million multiplications an image of 32x32: half of `SmallNet`'s, because all but the first convolution follow
    a pool.
    Images from 8x8 up.
    """

    _STEM, _STAGES = 32, (48, 96, 192)

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        # Pooled before BatchNorm and ReLU, which then have a quarter of the map; where BatchNorm's scale is positive that changes nothing.
        conv, *rest = _conv_bn_relu(in_channels, self._STEM, bias=False)
        layers = [conv, nn.MaxPool2d(2), *rest]
        in_channels = self._STEM
        for index, out_channels in enumerate(self._STAGES):
            if index:
                layers.append(nn.MaxPool2d(2))
            layers += [*_conv_bn_relu(in_channels, out_channels, bias=False), _ResidualConv(out_channels)]
            in_channels = out_channels
        super().__init__(layers, in_channels, num_classes)


class SmallVGG(_PooledFeatures):
    """Seven 3x3 convolutions for photographs of 32x32, half as many multiplications again as `SmallResNet` takes.

    One to 24 channels, then stages of 32, 96 and 192 channels, each of two convolutions with a max-pool behind the first, so that the wide
    ones see small maps; BatchNorm and ReLU after each, the largest value of each channel, and a Linear head (the shape of the networks that
    are trained in seconds on GPUs: Jordan, "94% on CIFAR-10 in 3.29 Seconds", 2024, but narrower).
    628,290 parameters, 38.4 million multiplications an image of 32x32. Images from 8x8 up.
    """

    _STEM, _STAGES = 24, (32, 96, 192)

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        layers = _conv_bn_relu(in_channels, self._STEM, bias=False)
        in_channels = self._STEM
        for out_channels in self._STAGES:
            conv, *rest = _conv_bn_relu(in_channels, out_channels, bias=False)
            layers += [conv, nn.MaxPool2d(2), *rest, *_conv_bn_relu(out_channels, out_channels, bias=False)]
            in_channels = out_channels
        super().__init__(layers, in_channels, num_classes, nn.AdaptiveMaxPool2d)


MODELS = {"small": SmallNet, "small-vgg": SmallVGG, "small-resnet": SmallResNet, "vgg16": VGG16, "resnext29": ResNeXt29, "model-a": ModelA}


def make(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """A network by its name, without noise.

    Args:
        name: a key of `MODELS`, or "package.module:function", which is imported and called with num_classes and in_channels as keywords.
        num_classes: logits of an image.
        in_channels: channels of an image.

    Returns:
        An `nn.Module` that maps float images [B, in_channels, H, W] in [0, 1] to logits [B, num_classes].

    Raises:
        ValueError: the name is unknown, cannot be imported, or gives something else than an `nn.Module`.

    Examples:
        >>> network = rse_fast.models.make("small-vgg", num_classes=10, in_channels=3)
    """
    if name in MODELS:
        return MODELS[name](num_classes=num_classes, in_channels=in_channels)
    if ":" not in name:
        raise ValueError(f"model: expected one of {', '.join(MODELS)} or package.module:function, got {name!r}")
    try:
        factory = function(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model: cannot import {name!r}: {error}") from error
    model = factory(num_classes=num_classes, in_channels=in_channels)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected {name!r} to return an nn.Module, got {type(model).__name__}")
    return model


def function(name: str) -> Callable:
    """What "package.module:function" names, imported: the code of its author runs. ImportError, AttributeError or ValueError if there is
    none."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def search_working_directory() -> None:
    """For the commands: "module:function" may name a module in the working directory, which replaces no installed one."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
