"""add_noise against float64: shapes that fit no tile, both layouts, every option; and the laws of the seed."""

import itertools
import math

import pytest
import torch
from conftest import INTERPRETED

from rse_fast import functional, reference
from rse_fast.address import NoiseAddress
from rse_fast.kernels.triton import add_noise as module
from rse_fast.kernels.triton.config import Config
from rse_fast.layout import layout

# How far a normal may be from float64, by the contract for GPUs: where the radius is below 0.05 the fast logarithm is coarse.
NORMAL, SMALL_NORMAL = 2e-5, 2e-5 if INTERPRETED else 1e-3
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def column(value, x):
    return value.double().reshape(-1, *[1] * (x.dim() - 2)) if value.dim() else value.double()


def address(x, seed, *, images=None, draws=1, stream=3, image_offset=5, draw_offset=7, sample_ids=None):
    return NoiseAddress(seed, stream, images or x.shape[0], draws, image_offset, draw_offset, sample_ids)


def launch(x, sigma, seed, *, scale=None, shift=None, relu=False, clean=False, pool=False, **fields):
    """(y, clean) of the launcher, outputs poisoned."""
    at, flat = address(x, seed, **fields), layout(x) == "flat"
    like = torch.nn.functional.max_pool2d(x.float(), 2).to(x.dtype) if pool else x
    out = (channels_last if flat else torch.clone)(like.new_full((at.rows, *like.shape[1:]), math.nan))
    kept = (channels_last if flat else torch.clone)(like.new_full(like.shape, math.nan)) if clean else None
    module.add_noise(x, out, flat, sigma, at, scale, shift, relu, kept, pool)
    return out, kept


def check(x, sigma, seed, *, scale=None, shift=None, relu=False, clean=False, pool=False, **fields):
    """The launcher's result is within the contract's distance of float64: eps within NORMAL, float32 arithmetic, one rounding."""
    at = address(x, seed, **fields)
    y, kept = launch(x, sigma, seed, scale=scale, shift=shift, relu=relu, clean=clean, pool=pool, **fields)
    value = x.double()
    size = value.abs()
    if scale is not None:
        value, size = value * column(scale, x), size * column(scale, x).abs()
    if shift is not None:
        value, size = value + column(shift, x), size + column(shift, x).abs()
    value = value.relu() if relu else value
    if pool:
        value, size = (torch.nn.functional.max_pool2d(v, 2) for v in (value, size))
    arithmetic = 4 * 2.0**-24 * size
    if clean:
        assert kept.dtype == x.dtype
        assert ((kept.double() - value).abs() <= arithmetic + ROUNDING[x.dtype] * value.abs() + SMALLEST[x.dtype]).all()
    expected = reference.add_noise(value, sigma.double(), *at)
    if value.shape[0] != expected.shape[0]:
        arithmetic = arithmetic.repeat(at.draws, *[1] * (x.dim() - 1))
    eps = reference.add_noise(torch.zeros_like(value), torch.ones_like(sigma).double(), *at)
    spread = column(sigma, x) * (torch.where(eps.abs() < 0.05, SMALL_NORMAL, NORMAL) + 4 * 2.0**-24 * 6.77)
    allowed = arithmetic + spread + (ROUNDING[x.dtype] + 2.0**-24) * expected.abs() + SMALLEST[x.dtype]
    wrong = ~((y.double() - expected).abs() <= allowed)
    assert not wrong.any(), (tuple(x.shape), layout(x), int(wrong.sum()), (y.double() - expected).abs().max())
    assert layout(y) == layout(x) or y[0, 0].numel() == 1


SHAPES = [
    # shape, images, draws: channels 1 .. 96, odd sizes, lines, volumes, rows of one tile and of several
    ((2, 3, 9, 7), 2, 2),
    ((4, 5, 5, 3), 2, 2),
    ((2, 64, 8, 8), 1, 2),
    ((2, 96, 3, 4), 2, 2),
    ((1, 1, 7), 1, 2),
    ((3, 12, 1, 1), 3, 2),
    ((2, 130), 2, 1),
    ((2, 7, 2, 3, 2), 1, 2),
    ((1, 3, 47, 45), 1, 1),
    ((1, 20, 23, 21), 1, 1),
]


@pytest.mark.parametrize("shape, images, draws", SHAPES, ids=lambda v: str(v) if isinstance(v, tuple) else "")
@pytest.mark.parametrize("lay", (torch.clone, channels_last), ids=("planar", "flat"))
def test_matches_float64(shape, images, draws, lay, seed):
    channels = shape[1]
    plain = dict(images=images, draws=draws)
    affine = dict(scale=torch.randn(channels), shift=torch.randn(channels), relu=True)
    for index, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        x = lay(torch.randn(shape).to(dtype))
        check(x, torch.tensor(0.7), seed, **plain, relu=index == 1)
        check(x, torch.rand(channels), seed, **plain, **affine, clean=index != 1)


@pytest.mark.parametrize("lay", (torch.clone, channels_last), ids=("planar", "flat"))
def test_affine_parts_and_sigma_in_every_combination(lay, seed):
    x = lay(torch.randn(2, 6, 5, 3))
    for scale, shift, relu, vary in itertools.product((None, torch.randn(6)), (None, torch.randn(6)), (False, True), (False, True)):
        check(x, torch.rand(6) if vary else torch.tensor(0.3), seed, scale=scale, shift=shift, relu=relu)


@pytest.mark.parametrize("lay", (torch.clone, channels_last), ids=("planar", "flat"))
def test_pool_takes_the_largest_and_keys_noise_by_the_pooled_position(lay, seed):
    for shape, dtype in (
        ((2, 5, 9, 7), torch.float32),
        ((1, 32, 8, 8), torch.bfloat16),
        ((1, 3, 6, 70), torch.float16),
        ((2, 6, 3, 2), torch.float32),  # to one position
    ):
        x = lay(torch.randn(shape).to(dtype))
        options = dict(scale=torch.randn(shape[1]), shift=torch.randn(shape[1]), relu=True)
        check(x, torch.tensor(0.5), seed, images=shape[0], draws=2, pool=True, clean=True, **options)
        check(x, torch.tensor(0.5), seed, pool=True)


@pytest.mark.parametrize("lay", (torch.clone, channels_last), ids=("planar", "flat"))
def test_nan_and_infinity_pass(lay, seed):
    x = torch.zeros(1, 4, 4, 4)
    x[0, 1, 2, 3], x[0, 2, 0, 0] = math.nan, math.inf
    for pool in (False, True):
        y, _ = launch(lay(x), torch.tensor(0.1), seed, relu=True, pool=pool)
        assert y.isnan().sum() == 1 and y.isinf().sum() == 1


def test_in_place_is_the_same(seed):
    """Every element is read before it is written, by the thread that writes it."""
    for lay in (torch.clone, channels_last):
        for shape in ((4, 12, 6, 5), (2, 3, 9, 8), (2, 64, 16, 16)):
            x, each = lay(torch.randn(shape).bfloat16()), torch.rand(shape[1])
            want, _ = launch(x, each, seed, images=shape[0] // 2, draws=2, scale=each, shift=-each, relu=True)
            at = address(x, seed, images=shape[0] // 2, draws=2)
            module.add_noise(x, x, lay is channels_last, each, at, each, -each, True)
            assert torch.equal(x, want)


def test_zero_sigma_leaves_the_activation(seed):
    x = torch.randn(2, 5, 7)
    assert torch.equal(launch(x, torch.tensor(0.0), seed)[0], x)


def test_no_rows_launch_nothing(seed):
    x = torch.empty(0, 3, 4)
    module.add_noise(x, x, False, torch.tensor(1.0), NoiseAddress(seed, 0, 0, 2))


def test_offset_slices_and_counters_at_their_end(seed):
    x = torch.randn(3, 9, 5, 5)[1:]
    check(x, torch.tensor(0.5), seed, stream=2**32 - 1, image_offset=2**32 - 2, draw_offset=2**31 + 5)
    wide = torch.randn(2, 5, 5, 9).movedim(-1, 1)[:, :, 1:]
    check(wide.contiguous(memory_format=torch.channels_last), torch.tensor(0.5), seed, draw_offset=2**32 - 1)


# ------------------------------------------------------------------------------------------------------------- laws of the seed
@pytest.mark.parametrize("shape", [(2, 12, 6, 5), (2, 3, 9, 8)], ids=str)
def test_nothing_but_the_arguments_enters(shape, seed, monkeypatch):
    """Tiles, layout, packing, the split of a batch and the width of offsets leave every bit alone."""
    x, sigma = torch.randn(shape), torch.rand(shape[1])
    whole, _ = launch(x, sigma, seed, images=2, draws=3)
    assert torch.equal(launch(channels_last(x), sigma, seed, images=2, draws=3)[0], whole)
    assert torch.equal(launch(x.repeat(3, 1, 1, 1), sigma, seed, images=2, draws=3)[0], whole)
    assert torch.equal(launch(x, sigma, seed, images=2, draws=2)[0], whole[:4])
    assert torch.equal(launch(x[1:], sigma, seed, images=1, draws=3, image_offset=6)[0], whole.unflatten(0, (3, 2))[:, 1:].flatten(0, 1))
    flipped, _ = launch(x.flip(0), sigma, seed, images=2, draws=3, sample_ids=torch.tensor([[6, 7], [5, 7]]))
    assert torch.equal(flipped.unflatten(0, (3, 2)).flip(1).flatten(0, 1), whole)
    monkeypatch.setattr(module, "ENOUGH_32_BITS", 1)
    monkeypatch.setattr("rse_fast.kernels.triton.config._launches", {})  # the others were planned for another limit
    for lay in (torch.clone, channels_last):
        assert torch.equal(launch(lay(x), sigma, seed, images=2, draws=3)[0], whole)
    monkeypatch.setattr("rse_fast.kernels.triton.config.ENOUGH_PROGRAMS", 1)
    for config in (Config(32, 4, 4), Config(64, 8, 1)):
        monkeypatch.setattr(module, "default", lambda *_, config=config: config)
        for lay in (torch.clone, channels_last):
            assert torch.equal(launch(lay(x), sigma, seed, images=2, draws=3)[0], whole), config


def test_every_argument_changes_the_noise(seed):
    x, one = torch.zeros(1, 4, 8, 8), torch.tensor(1.0)
    base = dict(stream=3, image_offset=5, draw_offset=7)
    first, _ = launch(x, one, seed, **base)
    for change in ({"stream": 4}, {"image_offset": 6}, {"draw_offset": 8}):
        assert (launch(x, one, seed, **{**base, **change})[0] == first).float().mean() < 0.02
    assert (launch(x, one, seed + 1, **base)[0] == first).float().mean() < 0.02
    assert (launch(x, one, seed ^ 2**40, **base)[0] == first).float().mean() < 0.02


# -------------------------------------------------------------------------------------------------------------------------- ops
def test_through_the_ops_with_gradients(rng):
    """The public function on this backend: values and every gradient as on the plain one."""
    x = torch.randn(4, 6, 5, 3)
    given = torch.tensor([[9, 1], [0, 4], [3, 3], [7, 0]])
    for lay, vary, sample_ids in (
        (torch.clone, False, None),
        (channels_last, True, given),
        (torch.clone, True, given),
        (channels_last, False, None),
    ):
        found = []
        for backend in ("triton", "torch"):
            leaves = [lay(x), torch.full((6,), 0.3) if vary else torch.tensor(0.3), torch.linspace(-1, 1, 6), torch.linspace(1, -1, 6)]
            inputs = [leaf.requires_grad_() for leaf in leaves]
            y = functional.add_noise(
                inputs[0], inputs[1], seed=11, draws=2, scale=inputs[2], shift=inputs[3], act="relu", backend=backend, sample_ids=sample_ids
            )
            weight = torch.linspace(-1, 2, y.numel()).reshape(y.shape)
            found.append([y, *torch.autograd.grad((y * weight).sum(), inputs)])
        for got, want in zip(*found, strict=True):
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("lay", (torch.clone, channels_last), ids=("planar", "flat"))
def test_activation_and_noise_from_one_pass(lay, seed):
    """The op on this backend: as its plain form, in every dtype; lazy and packed."""
    each = torch.rand(6)
    for dtype, pool, images in ((torch.float32, True, 2), (torch.bfloat16, True, 1), (torch.float16, False, 2)):
        x = lay(torch.randn(2, 6, 5, 7).to(dtype))
        options = dict(seed=seed, images=images, draws=2, scale=each, shift=-each, act="relu", pool=pool)
        got, want = (functional.activate_noise(x, each, backend=backend, **options) for backend in ("triton", "torch"))
        for a, b in zip(got, want, strict=True):
            assert layout(a) == layout(b) and len(a) == len(b)
            assert ((a.double() - b.double()).abs() <= 1e-3 + 2 * ROUNDING[dtype] * b.double().abs()).all()
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        args = (x, each, *NoiseAddress(seed, 0, images, 2), each, each, True, pool, "triton", True)
        torch.library.opcheck(torch.ops.rse_fast.activate_noise, args, test_utils=tests)


def test_opcheck(seed):
    x = torch.randn(2, 5, 4, requires_grad=True)
    sigma = torch.rand(5, requires_grad=True)
    at, options = NoiseAddress(seed, 1, 2, 3), (torch.rand(5), torch.rand(5), True, "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.rse_fast.add_noise, (x, sigma, *at, *options), test_utils=tests)
    g = torch.randn(6, 5, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.rse_fast.sigma_grad, (g, *at, True, "triton"), test_utils=tests)
