"""A model for `rse-fast certify --model`: sees the mean brightness of two halves of an 8x8 digit; fast, and not always right."""

import torch
from torch import nn

import rse_fast


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 4, 10)

    def forward(self, x):
        return self.head(nn.functional.adaptive_avg_pool2d(self.conv(x).relu(), 2).flatten(1))


def make():
    return rse_fast.convert(Network(), 0.25, 0.1)


def plain():
    return Network()
