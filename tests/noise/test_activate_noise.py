"""activate_noise: the activation with and without noise from one op, against float64, on every backend of the CPU."""

import itertools
import math

import pytest
import torch

from rse_fast import functional, ops, reference
from rse_fast.address import NoiseAddress
from rse_fast.layout import layout

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
ADDRESS = {"seed": -77, "stream": 3, "image_offset": 5, "draw_offset": 7}
pytestmark = pytest.mark.usefixtures("one_thread")


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def expected(x, sigma, images, draws, scale, shift, act, pool):
    """(noisy, clean, bound on the float32 arithmetic) in float64."""
    column = lambda p: p.double().reshape(-1, *[1] * (x.dim() - 2))  # noqa: E731
    clean = x.double() * column(scale) + column(shift)
    size = x.double().abs() * column(scale).abs() + column(shift).abs()
    clean = clean.relu() if act else clean
    if pool:
        clean, size = (torch.nn.functional.max_pool2d(t, 2) for t in (clean, size))
    rows, channels, *spatial = clean.shape
    eps = reference.gaussian(-77, 3, images, draws, channels, math.prod(spatial), 5, 7)
    eps = torch.from_numpy(eps).movedim(-1, 1).reshape(images * draws, channels, *spatial)
    repeats = [images * draws // rows, *[1] * (x.dim() - 1)]
    return clean.repeat(repeats) + column(sigma) * eps, clean, 4 * 2.0**-24 * size, repeats


@pytest.mark.parametrize("lay", (torch.clone, channels_last), ids=("planar", "flat"))
@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda d: str(d)[6:])
def test_matches_float64(backend, lay, dtype, rng):
    for (shape, images, draws), act, pool in itertools.product(
        (((2, 3, 9, 7), 2, 3), ((4, 5, 3, 2), 2, 2), ((2, 8, 2, 3), 1, 2), ((3, 1, 6, 6), 3, 2)), (None, "relu"), (False, True)
    ):
        x, sigma = lay(torch.randn(shape).to(dtype)), torch.rand(shape[1])
        scale, shift = torch.randn(shape[1]), torch.randn(shape[1])
        noisy, clean = functional.activate_noise(
            x, sigma, images=images, draws=draws, scale=scale, shift=shift, act=act, pool=pool, backend=backend, **ADDRESS
        )
        want_noisy, want_clean, arithmetic, repeats = expected(x, sigma, images, draws, scale, shift, act, pool)
        for got, want, error in (
            (clean, want_clean, arithmetic),
            (noisy, want_noisy, arithmetic.repeat(repeats) + 2e-6 * sigma.max()),
        ):
            assert got.dtype == dtype and got.shape == want.shape
            error = error + (ROUNDING[dtype] + 4 * 2.0**-24) * want.abs() + SMALLEST[dtype]
            assert ((got.double() - want).abs() <= error).all(), (shape, act, pool)
            assert layout(got) in (layout(x), "planar" if got[0, 0].numel() == 1 else None)


def test_noise_is_that_of_add_noise(backend, rng):
    """Without a pool the noisy output is add_noise's, and noise of a pooled activation is keyed by the pooled position."""
    x = torch.randn(2, 6, 5, 4)
    options = dict(images=2, draws=3, backend=backend, **ADDRESS)
    noisy, clean = functional.activate_noise(x, 0.5, act="relu", **options)
    assert torch.equal(noisy, functional.add_noise(x, 0.5, act="relu", **options)) and torch.equal(clean, x.relu())
    noisy, clean = functional.activate_noise(x, 0.5, pool=True, **options)
    assert torch.equal(noisy, functional.add_noise(clean, 0.5, **options))
    sample_ids = torch.tensor([[9, 2], [4, 0]])
    noisy, clean = functional.activate_noise(x, 0.5, pool=True, sample_ids=sample_ids, **options)
    assert torch.equal(noisy, functional.add_noise(clean, 0.5, sample_ids=sample_ids, **options))


@pytest.mark.parametrize("lay", (torch.clone, channels_last), ids=("planar", "flat"))
@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda d: str(d)[6:])
def test_a_pool_is_torchs_then_the_noise_is_add_noises(backend, lay, dtype, rng):
    """Bit for bit, in samples of many tiles, with channels that fill no vector, and with NaN in every corner of a window."""
    for shape, images, draws in (((1, 132, 9, 14), 1, 2), ((2, 7, 24, 33), 2, 1), ((2, 1040, 2, 5), 2, 2)):
        x = torch.randn(shape)
        x.view(-1)[rng.choice(x.numel(), 40, replace=False)] = math.nan
        x.view(-1)[rng.choice(x.numel(), 40, replace=False)] = -math.inf
        x[0, 0, :2, :2], x[0, 1, 0, 1], x[0, 1, 1, 0] = -math.inf, math.nan, math.inf
        x = lay(x.to(dtype))
        options = dict(images=images, draws=draws, backend=backend, **ADDRESS)
        noisy, clean = functional.activate_noise(x, 0.5, pool=True, **options)
        want = torch.nn.functional.max_pool2d(x, 2)
        torch.testing.assert_close(clean, want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(noisy, functional.add_noise(lay(want), 0.5, **options), rtol=0, atol=0, equal_nan=True)
        assert clean.isnan().any() and clean.isneginf().any()


def test_opcheck(rng):
    at, sample_ids = NoiseAddress(torch.tensor(3), 3, 2, 2, 1, 5), torch.tensor([[4, 0], [2**32 - 1, 7]])
    transposed = torch.randn(2, 3, 4, 5).transpose(-1, -2)  # in neither layout
    for x in (torch.randn(2, 3, 5, 4), channels_last(torch.randn(4, 3, 5, 4)).bfloat16(), transposed, torch.randn(2, 1, 2, 3).double()):
        for backend, pool in (("auto", False), ("auto", True), ("torch", True)):
            each = torch.rand(x.shape[1])
            here = at._replace(sample_ids=sample_ids if pool else None)
            torch.library.opcheck(ops.activate_noise.default, (x, each, *here, each, each, True, pool, backend, True))
    nothing = torch.empty(0, 3, 4, 4)
    args = (nothing, torch.rand(3), *NoiseAddress(at.seed, 0, 0, 2), None, None, False, True, "auto", True)
    torch.library.opcheck(ops.activate_noise.default, args)


def test_a_gradient_is_refused():
    leaf, at = torch.randn(2, 3, 4, 4).requires_grad_(), dict(images=2, backend="torch", **ADDRESS)
    with pytest.raises(RuntimeError, match="has no gradient, but one of its inputs requires one"):
        functional.activate_noise(leaf, 0.1, **at)
    with pytest.raises(RuntimeError, match="has no gradient"):
        functional.activate_noise(leaf.detach(), torch.tensor(0.1, requires_grad=True), **at)
    with torch.no_grad():
        functional.activate_noise(leaf, 0.1, **at)


def test_bad_input_is_named():
    x = torch.randn(2, 3, 4, 4)
    for arguments, message in (
        (dict(x=x[..., :1], pool=True), r"x must be at least 2 pixels high and wide to be pooled, got shape \(2, 3, 4, 1\)"),
        (dict(x=x[0], pool=True), "x must have 4 dimensions"),
        (dict(x=x, act="gelu"), "act must be None or 'relu', got 'gelu'"),
        (dict(x=x, scale=torch.ones(4)), "scale must be a float scalar or have one value for each of the 3 channels"),
        (dict(x=x, images=3), "images must equal the rows of the input"),
        (dict(x=x, sigma=-1.0), "sigma must be finite and not negative"),
    ):
        with pytest.raises(ValueError, match=message):
            functional.activate_noise(**{"sigma": 0.1, "seed": 1, **arguments})


# --------------------------------------------------------------------------------------------------------------------- in place
@pytest.mark.parametrize("lay", (torch.clone, channels_last), ids=("planar", "flat"))
@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda d: str(d)[6:])
def test_in_place_is_add_noise(backend, lay, dtype, rng):
    """Bit for bit, in the memory that was given, for every form of the arguments."""
    for shape, images, draws in (((6, 3, 9, 7), 2, 3), ((4, 8, 3, 2), 4, 1), ((2, 5, 7), 1, 2), ((3, 4), 3, 1), ((0, 3, 4, 4), 0, 2)):
        x, each = lay(torch.randn(shape).to(dtype)), torch.rand(shape[1])
        sample_ids = torch.tensor([[9 - i, i] for i in range(images)], dtype=torch.int64).reshape(-1, 2)
        for sigma, options in (
            (0.3, {}),
            (each, {"scale": each + 1, "shift": each - 1, "act": "relu"}),
            (each, {"act": "relu", "sample_ids": sample_ids}),
        ):
            options = {**ADDRESS, "images": images, "draws": draws, "backend": backend, **options}
            want, y = functional.add_noise(x, sigma, **options), lay(x)
            assert functional.add_noise_(y, sigma, **options) is y
            assert torch.equal(y, want) and y.stride() == x.stride()


def test_in_place_refuses_before_it_writes(rng):
    x, each = torch.randn(4, 3, 5, 5), torch.rand(3)
    kept = x.clone()
    for error, message, call in (
        (ValueError, "rows to be written in place", lambda: functional.add_noise_(x, 0.1, seed=1, images=4, draws=2)),
        (ValueError, "contiguous or channels last", lambda: functional.add_noise_(x[..., ::2], 0.1, seed=1)),
        (ValueError, "act", lambda: functional.add_noise_(x, 0.1, seed=1, act="tanh")),
        (ValueError, "sigma", lambda: functional.add_noise_(x, -0.1, seed=1)),
        (RuntimeError, "no gradient", lambda: functional.add_noise_(x, each.clone().requires_grad_(), seed=1)),
        (RuntimeError, "no gradient", lambda: functional.add_noise_(x, 0.1, seed=1, scale=each.clone().requires_grad_())),
    ):
        with pytest.raises(error, match=message):
            call()
        assert torch.equal(x, kept)


def test_in_place_as_an_op(rng):
    seed, each = torch.tensor(3), torch.rand(5)
    x = torch.randn(6, 5, 4)
    torch.library.opcheck(torch.ops.rse_fast.add_noise_, (x, each, *NoiseAddress(seed, 1, 2, 3), each, None, True, "auto"))
    compiled = torch.compile(lambda x: functional.add_noise_(x * 2, 0.1, seed=seed) + 1, fullgraph=True)
    assert torch.equal(compiled(x), functional.add_noise(x * 2, 0.1, seed=seed) + 1)
