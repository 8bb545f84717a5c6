"""Models that branch on the sizes of their images are fused, for each size by itself."""

import numpy as np
import pytest
import torch
from torch import nn

import rse_fast
from rse_fast.ensemble import Ensemble


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def stem(self, x):
        return self.norm(self.first(x)).relu()

    def end(self, y):
        return self.head(self.second(y).mean((2, 3)))


class Pads(Base):
    """Pads odd maps, as hierarchical transformers do."""

    def forward(self, x):
        y = self.stem(x)
        if y.shape[-1] % 2 or y.size(2) % 2:
            y = nn.functional.pad(y, (0, y.shape[3] % 2, 0, y.size()[2] % 2))
        return self.end(nn.functional.avg_pool2d(y, 2))


class Attends(Base):
    """Attention over positions, in heads, with a loop over a number of them."""

    def forward(self, x):
        y = self.stem(x)
        n, c, h, w = y.shape
        assert h == w and y.dim() == y.ndim == 4
        q, k = y.flatten(2).view(n, 2, 2, c // 4, h * w).unbind(1)
        a = (q.transpose(-1, -2) @ k).softmax(-1)
        y = (a @ q.transpose(-1, -2)).transpose(-1, -2).reshape(n, c // 2, h, w).repeat(1, 2, 1, 1)
        for piece in y.chunk(2, 1):
            y = y + piece.mean(1, keepdim=True)
        return self.end(y)


class Writes(Base):
    """Writes into a part of a map."""

    def forward(self, x):
        y = self.stem(x) * 1
        if y.shape[1] > 4:
            y[:, :4] = y[:, 4:] + 1
        return self.end(y)


class Counts(Base):
    """Branches on the number of images, which no snapshot can know."""

    def forward(self, x):
        y = self.stem(x)
        return self.end(y if y.shape[0] > 1 else y + 1)


@pytest.mark.parametrize("cls", [Pads, Attends, Writes])
def test_a_model_that_branches_on_sizes_is_fused_for_each_size(cls, rng, recwarn):
    model = rse_fast.convert(cls(), 0.2, 0.1)
    seed = int(rng.integers(2**62))
    fused, live = (Ensemble(model, 3, seed=seed, dtype="float32", fuse=fuse) for fuse in (True, False))
    for size, images in ((8, 4), (7, 1), (9, 5), (8, 1)):
        x = torch.from_numpy(rng.random((images, 3, size, size), dtype=np.float32))
        torch.testing.assert_close(fused.predict(x).probs, live.predict(x).probs, rtol=1e-5, atol=1e-6)
        assert fused.prepared(x).problem is None
        gradients = []
        for ensemble in (fused, live):
            value = x.clone().requires_grad_()
            ensemble(value)[:, 0].sum().backward()
            gradients.append(value.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert not recwarn.list


def test_a_model_that_branches_on_the_number_of_images_is_not():
    model = rse_fast.convert(Counts())
    ensemble = Ensemble(model, 2, dtype="float32")
    with pytest.warns(RuntimeWarning, match="runs unfused: it cannot be traced"):
        ensemble.predict(torch.rand(2, 3, 8, 8))


class Guarded(nn.Module):
    """Branches on data, around a noisy convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, y):
        return self.conv(y.clamp(-9, 9) if bool(y.isnan().any()) else y)


class Partly(Base):
    def __init__(self):
        super().__init__()
        self.guarded = nn.Sequential(Guarded(), nn.ReLU(inplace=True), Guarded())

    def forward(self, x):
        y = self.stem(x)
        return self.end(self.guarded(y).relu() + y)


def test_what_cannot_be_traced_is_called_as_it_is_in_a_fused_model(rng, recwarn):
    model = rse_fast.convert(Partly(), 0.2, 0.1)
    x = torch.from_numpy(rng.random((4, 3, 8, 8), dtype=np.float32))
    seed = int(rng.integers(2**62))
    fused, live = (Ensemble(model, 3, seed=seed, dtype="float32", fuse=fuse) for fuse in (True, False))
    torch.testing.assert_close(fused.predict(x).probs, live.predict(x).probs, rtol=1e-5, atol=1e-6)
    snapshot = fused.prepared(x)
    assert snapshot.problem is None
    assert [type(m) for m in snapshot.runner.model.modules()].count(Guarded) == 2
    assert not any(isinstance(m, nn.BatchNorm2d) for m in snapshot.runner.model.modules())  # folded
    assert not recwarn.list
