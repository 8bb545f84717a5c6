"""Layers whose rows are not the images: windows, heads and patches, and tables that all images share."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import rse_fast
from rse_fast import reference
from rse_fast.context import NoiseContext
from rse_fast.ensemble import Ensemble
from rse_fast.nn import GaussianNoise

PARTS = 4


class Parts(nn.Module):
    """Adds noise to the parts [N * PARTS, 3, 5] of sequences [N, 3 * PARTS, 5]; the logits are what comes out."""

    def __init__(self, sigma=1.0):
        super().__init__()
        self.noise = GaussianNoise(sigma)

    def forward(self, x):
        return self.noise(x.reshape(-1, 3, 5)).reshape(-1, PARTS * 15)


class Windows(nn.Module):
    """Convolves an image, then its four quarters by themselves; ``outer`` puts the quarters outermost, where an image's are apart."""

    def __init__(self, outer=False):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.outer = nn.Linear(8 * PARTS, 5), outer

    def forward(self, x):
        y = self.first(x).relu()
        n, c, h, w = y.shape
        y = y.view(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(n, PARTS, c, h // 2, w // 2)
        y = y.transpose(0, 1) if self.outer else y
        y = self.second(y.reshape(n * PARTS, c, h // 2, w // 2)).mean((2, 3))
        y = y.view(PARTS, n, c).transpose(0, 1) if self.outer else y.view(n, PARTS, c)
        return self.head(y.flatten(1))


class Table(nn.Module):
    """Adds a convolved table of positions to the images."""

    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.rand(1, 2, 8, 8))
        self.table, self.body, self.head = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x + self.table(self.positions)).relu().mean((2, 3)))


def test_the_noise_of_a_part_is_that_of_its_own_number(rng):
    seed, draws, offset = int(rng.integers(2**62)), 3, int(rng.integers(1000))
    x = torch.from_numpy(rng.random((2, 3 * PARTS, 5), dtype=np.float32))
    model = Parts()
    with NoiseContext(torch.tensor(seed), 2, draws, offset, 7, packed=True):
        found = model(x.repeat(draws, 1, 1)).view(draws, 2, PARTS, 3, 5).double() - x.view(2, PARTS, 3, 5).double()
    for draw, image, part in np.ndindex(draws, 2, PARTS):
        eps = reference.gaussian(seed, 0, 1, 1, 3, 5, (offset + image) * PARTS + part, 7 + draw)[0].T
        torch.testing.assert_close(found[draw, image, part], torch.from_numpy(eps.copy()), rtol=0, atol=2e-6)


def test_parts_are_refused_where_a_batch_is_not_packed_yet():
    with pytest.raises(ValueError, match="must have one row an image"), NoiseContext(torch.tensor(0), 2, 3):
        Parts()(torch.rand(2, 3 * PARTS, 5))


@pytest.mark.parametrize("fuse", [True, False])
def test_an_image_with_parts_has_its_result_whatever_is_beside_it(rng, fuse, recwarn):
    model = rse_fast.convert(Windows(), 0.2, 0.5).eval()
    x = torch.from_numpy(rng.random((5, 3, 8, 8), dtype=np.float32))
    seed = int(rng.integers(2**62))
    expected = Ensemble(model, 6, dtype="float32", fuse=fuse).predict(x, seed, image_offset=11)
    for max_rows in (1, 7, 13):
        found = Ensemble(model, 6, dtype="float32", fuse=fuse, max_rows=max_rows).predict(x, seed, image_offset=11)
        torch.testing.assert_close(found.probs, expected.probs, rtol=1e-5, atol=1e-6)
    alone = Ensemble(model, 6, dtype="float32", fuse=fuse).predict(x[3:4], seed, image_offset=14)
    torch.testing.assert_close(alone.probs, expected.probs[3:4], rtol=1e-5, atol=1e-6)
    stopped = Ensemble(model, 6, dtype="float32", fuse=fuse, early_exit="exact").predict(x, seed, image_offset=11)
    assert torch.equal(stopped.labels, expected.labels)
    assert not recwarn.list


def test_parts_have_independent_noise():
    torch.manual_seed(0)  # 2000 draws: the bound is of chance
    with NoiseContext(torch.tensor(5), 1, 2000, packed=True):
        eps = Parts()(torch.zeros(2000, 3 * PARTS, 5)).view(2000, PARTS, 15)
    flat = eps.transpose(0, 1).reshape(PARTS, -1).double()
    correlation = torch.corrcoef(flat) - torch.eye(PARTS)
    assert correlation.abs().max() < 5 / flat.shape[1] ** 0.5
    assert (flat.std(1) - 1).abs().max() < 5 / (2 * flat.shape[1]) ** 0.5


def test_parts_that_are_not_beside_each_other_are_refused():
    with pytest.raises(ValueError, match="'second' gets several rows for each image.*exclude='second'"):
        Ensemble(rse_fast.convert(Windows(outer=True), 0.2, 0.5), 2).predict(torch.rand(3, 3, 8, 8))
    model = rse_fast.convert(Windows(outer=True), exclude="second")
    assert Ensemble(model, 2).predict(torch.rand(3, 3, 8, 8)).probs.shape == (3, 5)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_table_that_all_images_share_gets_no_noise_and_a_warning(rng, fuse):
    model = Table()
    x = torch.from_numpy(rng.random((3, 3, 8, 8), dtype=np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ensemble(rse_fast.convert(model, 0.1, 0.1, exclude="table"), 4, seed=3, dtype="float32", fuse=fuse).predict(x)
    rse_fast.revert(model)
    rse_fast.convert(model, 0.1, 0.1)
    with pytest.warns(RuntimeWarning, match="'table' get one row for all images.*exclude="):
        ensemble = Ensemble(model, 4, seed=3, dtype="float32", fuse=fuse)
        found = ensemble.predict(x)
    # One image in one draw has one row as well: no noise there either.
    single = Ensemble(model, 1, seed=3, dtype="float32", fuse=fuse)
    with pytest.warns(RuntimeWarning):
        first = single.predict(x[:1])
    model.table.noise_enabled = False
    torch.testing.assert_close(ensemble.predict(x).probs, found.probs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(single.predict(x[:1]).probs, first.probs, rtol=1e-6, atol=1e-6)
