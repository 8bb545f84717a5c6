"""sigma_grad against float64."""

import pytest
import torch

from rse_fast import reference
from rse_fast.address import NoiseAddress
from rse_fast.kernels.triton import config
from rse_fast.kernels.triton import sigma_grad as module
from rse_fast.layout import layout


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize(
    "shape, images, draws",
    [((4, 5, 9, 7), 2, 2), ((2, 3, 33, 31), 1, 2), ((3, 64, 4, 4), 3, 1), ((4, 66), 2, 2), ((1, 7, 2, 3, 2), 1, 1)],
    ids=str,
)
@pytest.mark.parametrize("lay", (torch.clone, channels_last), ids=("planar", "flat"))
@pytest.mark.parametrize("per_channel", (False, True), ids=("total", "channels"))
def test_matches_float64(shape, images, draws, lay, per_channel, seed):
    for dtype, sample_ids in ((torch.float32, None), (torch.bfloat16, torch.arange(2 * images).reshape(images, 2) + 2**32 - 9)):
        g = lay(torch.randn(shape).to(dtype))
        at = NoiseAddress(seed, 3, images, draws, 5, 7, sample_ids)
        got = module.sigma_grad(g, layout(g) == "flat", at, per_channel)
        want = reference.sigma_grad(g.double(), *at, per_channel)
        # Each term: a normal within the contract and float32 arithmetic; the sum's own roundings, at most one a term and level.
        terms = g.double().abs()
        size = terms.movedim(1, 0).flatten(1).sum(1) if per_channel else terms.sum()
        assert got.shape == want.shape and got.dtype == torch.float32
        assert ((got.double() - want).abs() <= size * (2e-5 + 16 * 2.0**-24 * 6.77)).all()


def test_many_pieces_and_partly_filled_ones(seed, monkeypatch):
    g, at = torch.randn(6, 8, 5, 5), NoiseAddress(seed, 0, 3, 2)
    want = reference.sigma_grad(g.double(), *at, True)
    for pieces in (1, 4, 5):  # 6 tiles: one piece of 6, three of 2, three of 2
        monkeypatch.setattr(module, "DEFAULT", module.Cut(128, 4, pieces))
        for lay in (torch.clone, channels_last):
            got = module.sigma_grad(lay(g), lay is channels_last, at, True)
            assert torch.allclose(got.double(), want, atol=1e-3), pieces
            assert torch.equal(got, module.sigma_grad(lay(g), lay is channels_last, at, True))


def test_cuts_that_autotuning_tries(seed, monkeypatch):
    g, at = torch.randn(2, 12, 5, 7), NoiseAddress(seed, 0, 1, 2)
    for lay in (torch.clone, channels_last):
        want = reference.sigma_grad(g.double(), *at, True)
        for cut in module.CANDIDATES[::4]:
            monkeypatch.setattr(module, "DEFAULT", cut)
            got = module.sigma_grad(lay(g), lay is channels_last, at, True)
            assert torch.allclose(got.double(), want, atol=1e-3), cut


def forget():
    """Plans and launches that another limit was planned for."""
    module._plan.cache_clear()
    config._launches.clear()


def test_64_bit_offsets(seed, monkeypatch):
    g = torch.randn(2, 6, 5, 3).half()
    for lay in (torch.clone, channels_last):
        arguments = (lay(g), lay is channels_last, NoiseAddress(seed, 0, 2), True)
        plain = module.sigma_grad(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(module, "ENOUGH_32_BITS", 1)
            forget()
            assert torch.equal(module.sigma_grad(*arguments), plain)
        forget()


def test_nothing_sums_to_zero(seed):
    nothing, at = torch.empty(0, 3, 4), NoiseAddress(seed, 0, 0, 2)
    assert module.sigma_grad(nothing, False, at, True).tolist() == [0, 0, 0]
    assert module.sigma_grad(nothing, False, at, False).item() == 0
