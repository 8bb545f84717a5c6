"""The networks that are measured: those of the paper, ResNet-50, and a chain of any depth."""

import torch
from torch import nn

from rse_fast.models import VGG16, ResNeXt29, SmallNet

SIGMAS = (0.2, 0.1)  # init_sigma, inner_sigma


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 for 224x224 images (He et al. 2016), stride in the 3x3 convolution; 25,557,032 parameters, 4.1 G multiply-adds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        blocks, channels = [], 64
        for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            for i in range(count):
                blocks.append(_Bottleneck(channels, width, 2 if stage and not i else 1))
                channels = 4 * width
        self.blocks, self.pool, self.classifier = nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 1000)

    def forward(self, x):
        return self.classifier(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class _Basic(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet14(nn.Sequential):
    """A small ResNet for 32x32 images: three stages of two basic blocks (He et al. 2016), 32 to 128 channels."""

    def __init__(self) -> None:
        blocks = [
            _Basic(channels, width, stride)
            for channels, width, stride in ((32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))
        ]
        stem = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Chain(nn.Sequential):
    """``depth`` 3x3 convolutions of 64 channels with BatchNorm and ReLU, then a mean and a Linear: time should be linear in depth."""

    def __init__(self, depth: int, channels: int = 64) -> None:
        layers = []
        for i in range(depth):
            layers += [nn.Conv2d(channels if i else 3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


KINDS = {  # class, image side
    "VGG16": (VGG16, 32), "ResNeXt29": (ResNeXt29, 32), "ResNet-50": (ResNet50, 224), "ResNet-14": (ResNet14, 32),
    "SmallNet": (SmallNet, 32),
}  # fmt: skip


def plain(kind: str, device: torch.device) -> nn.Module:
    """A network of random weights in eval mode whose output depends on its input as a trained one's does (`settle`)."""
    network, side = KINDS[kind]
    torch.manual_seed(0)
    return settle(network().to(device), images(4, side, device))


@torch.no_grad()
def settle(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Sets BatchNorm's statistics by one batch, and scales the last layer so that logits have standard deviation 1 over classes."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # this batch replaces what was there
    model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    spread = model.eval()(x).std(-1).mean()
    head.weight.mul_(1 / spread)
    head.bias.mul_(1 / spread)
    return model


def images(count: int, side: int, device: torch.device) -> torch.Tensor:
    """[count, 3, side, side] in [0, 1]: coarse random patches, which differ from each other more than white noise does."""
    coarse = torch.rand(count, 3, 4, 4, device=device)
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
