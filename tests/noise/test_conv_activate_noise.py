"""conv_activate_noise: a convolution with affine map, ReLU and the next layer's noise, against float64; its plain form is the fallback."""

import math

import pytest
import torch

from rse_fast import functional, ops, reference
from rse_fast.address import NoiseAddress

OPERAND = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ADDRESS = {"seed": -77, "stream": 3, "image_offset": 5, "draw_offset": 7}
pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [  # x, weight, geometry, images, draws
    ((2, 3, 7, 6), (5, 3, 3, 3), {"padding": 1}, 2, 2),
    ((4, 8, 5, 5), (8, 4, 3, 3), {"stride": 2, "padding": (1, 0), "dilation": (1, 2), "groups": 2}, 2, 2),
    ((2, 4, 9), (6, 4, 3), {"padding": "same"}, 1, 2),
]


def expected(x, weight, sigma, images, draws, scale, shift, relu, geometry):
    """(result, sum of the products' sizes) in float64."""
    convolution = (torch.nn.functional.conv1d, torch.nn.functional.conv2d)[x.dim() - 3]
    column = lambda p: p.double().reshape(-1, *[1] * (x.dim() - 2))  # noqa: E731
    y = convolution(x.double(), weight.double(), **geometry) * column(scale) + column(shift)
    size = convolution(x.double().abs(), weight.double().abs(), **geometry) * column(scale).abs() + column(shift).abs()
    y = y.relu() if relu else y
    repeats = [images * draws // len(y), *[1] * (x.dim() - 1)]
    eps = reference.gaussian(-77, 3, images, draws, y.shape[1], math.prod(y.shape[2:]), 5, 7)
    eps = torch.from_numpy(eps).movedim(-1, 1).reshape(images * draws, *y.shape[1:])
    return y.repeat(repeats) + column(sigma) * eps, size.repeat(repeats)


@pytest.mark.parametrize("dtype", OPERAND, ids=lambda d: str(d)[6:])
def test_matches_float64(backend, dtype, rng):
    for index, (shape, weight, geometry, images, draws) in enumerate(CASES):
        x, w = torch.randn(shape).to(dtype), torch.randn(weight).to(dtype)
        scale, shift, sigma = torch.randn(weight[0]), torch.randn(weight[0]), torch.rand(weight[0])
        y = functional.conv_activate_noise(
            x, w, sigma, images=images, draws=draws, scale=scale, shift=shift, act="relu" if index else None, backend=backend,
            **geometry, **ADDRESS,
        )  # fmt: skip
        want, size = expected(x, w, sigma, images, draws, scale, shift, index, geometry)
        assert y.dtype == dtype and y.movedim(1, -1).is_contiguous() and y.shape == want.shape
        # Roundings of each sum and of the vendor's result, of the arithmetic behind it, and of what comes out.
        n = math.prod(weight[1:])
        error = (n + 8) * 2.0**-24 * size + OPERAND[dtype] * (size + want.abs()) + 2e-6 * sigma.max()
        assert ((y.double() - want).abs() <= error).all(), shape


def test_int8_sums_are_exact_and_rounded_once_with_the_noise(backend, rng):
    x, w = torch.randint(-128, 128, (2, 64, 5, 5), dtype=torch.int8), torch.randint(-128, 128, (6, 64, 3, 3), dtype=torch.int8)
    scale, shift, sigma = torch.rand(6) * 1e-4, torch.randn(6), torch.full((6,), 5.0)
    options = dict(images=2, draws=2, scale=scale, shift=shift, act="relu", padding=1, backend=backend, **ADDRESS)
    want, size = expected(x, w, sigma, 2, 2, scale, shift, True, {"padding": 1})
    y = functional.conv_activate_noise(x, w, sigma, **options)
    assert y.dtype == torch.int8 and ((y.double() - want.clamp(-128, 127)).abs() <= 0.5 + 2e-5 + 4 * 2.0**-24 * size).all()
    assert y.float().std() > 1
    y = functional.conv_activate_noise(x, w, sigma, dtype=torch.float32, **options)
    assert y.dtype == torch.float32 and ((y.double() - want).abs() <= 2e-5 + 4 * 2.0**-24 * size).all()
    y = functional.conv_activate_noise(x, w, sigma, **{**options, "scale": scale * 1000, "act": None})
    assert {y.min().item(), y.max().item()} == {-128, 127}


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.float8_e4m3fnuz), ids=lambda d: str(d)[6:])
def test_fp8_is_rounded_once_with_the_noise_and_saturates(backend, dtype, rng):
    x, w = torch.randn(2, 16, 5, 5).to(dtype), torch.randn(6, 16, 3, 3).to(dtype)
    scale, shift, sigma = torch.rand(6), torch.randn(6), torch.full((6,), 0.5)
    options = dict(images=2, draws=2, scale=scale, shift=shift, padding=1, backend=backend, **ADDRESS)
    want, size = expected(x, w, sigma, 2, 2, scale, shift, False, {"padding": 1})
    y = functional.conv_activate_noise(x, w, sigma, **options)
    error = 2.0**-4 * want.abs() + 2.0**-10 + 2e-6 + (16 * 9 + 8) * 2.0**-24 * size
    assert y.dtype == dtype and ((y.double() - want).abs() <= error).all()
    y = functional.conv_activate_noise(x, w, sigma, **{**options, "scale": scale * 1000})
    assert y.float().abs().max() == torch.finfo(dtype).max and y.float().isfinite().all()


def test_a_result_of_another_dtype_is_rounded_once(backend, rng):
    x, w = torch.zeros(2, 3, 4, 4).bfloat16(), torch.randn(5, 3, 1, 1).bfloat16()
    options = dict(images=2, draws=2, backend=backend, **ADDRESS)
    noise = functional.add_noise(torch.zeros(2, 5, 4, 4), 30.0, **options)
    assert torch.equal(functional.conv_activate_noise(x, w, 30.0, dtype=torch.float32, **options), noise)
    assert torch.equal(
        functional.conv_activate_noise(x, w, 30.0, dtype=torch.int8, **options), noise.round().clamp(-128, 127).to(torch.int8)
    )


def test_opcheck(rng):
    at, each = NoiseAddress(torch.tensor(3), 3, 2, 2, 1, 5), torch.rand(6)
    byte = torch.randint(-9, 9, (2, 4, 5, 6), dtype=torch.int8), torch.randint(-9, 9, (6, 4, 1, 1), dtype=torch.int8)
    for x, w, geometry, dtype, backend in (
        (torch.randn(2, 4, 7, 6).bfloat16(), torch.randn(6, 2, 3, 3).bfloat16(), ([2, 1], [1, 0], [1, 2], 2), None, "auto"),
        (torch.randn(4, 4, 9), torch.randn(6, 4, 3), ([1], [0], [1], 1), torch.bfloat16, "torch"),
        (*byte, ([1, 1], [0, 0], [1, 1], 1), None, "auto"),
        (torch.randn(0, 4, 5, 5), torch.randn(6, 4, 3, 3), ([1, 1], [0, 0], [1, 1], 1), None, "auto"),
    ):
        here = at if len(x) else at._replace(images=0)
        torch.library.opcheck(ops.conv_activate_noise.default, (x, w, each, *here, each, None, True, *geometry, dtype, backend))


def test_a_gradient_is_refused():
    x, w = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 1, 1, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no gradient, but one of its inputs requires one"):
        functional.conv_activate_noise(x, w, 0.1, seed=1)


def test_under_autocast(rng):
    """The policy: convolutions and linear layers cast as the plain ones; noise alone, int8 and fp8 keep their dtype."""
    x, w, low = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.bfloat16
    byte = torch.randint(-128, 128, (2, 64, 5, 5), dtype=torch.int8), torch.randint(-128, 128, (6, 64, 3, 3), dtype=torch.int8)
    at = dict(sigma=0.1, seed=1)
    cast = [
        (lambda x, w: functional.conv_activate_noise(x, w, act="relu", **at), (x, w)),
        (lambda x, w: functional.noisy_conv2d(x, w, None, **at), (x, w)),
        (lambda x, w: functional.noisy_linear(x, w, None, **at), (x[..., 0, :], torch.randn(7, 5))),
    ]
    kept = [
        (lambda x: functional.add_noise(x, **at), (x,)),
        (lambda x: functional.activate_noise(x, act="relu", **at)[1], (x,)),
        (lambda x, w: functional.conv_activate_noise(x, w, **at), byte),
        (lambda x: ops.sigma_grad(x, *NoiseAddress(torch.tensor(1), 0, 2), False, "auto"), (x,)),
    ]
    for function, inputs in cast:
        with torch.autocast("cpu", low):
            y = function(*inputs)
        assert y.dtype == low and torch.equal(y, function(*(t.to(low) for t in inputs)))
    for function, inputs in kept:
        with torch.autocast("cpu", low):
            y = function(*inputs)
        assert y.dtype == inputs[0].dtype and torch.equal(y, function(*inputs))


def test_bad_input_is_named():
    x, w = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3)
    byte = torch.zeros(2, 3, 4, 4, dtype=torch.int8)
    for error, arguments, message in (
        (TypeError, dict(x=byte), "weight must be torch.int8 as x is, got torch.float32"),
        (TypeError, dict(dtype=torch.int16), "dtype must be None, float32, .* got torch.int16"),
        (TypeError, dict(x=byte.short()), "x must be float32, bfloat16, float16, float64, int8, float8_e4m3fn or float8_e4m3fnuz"),
        (ValueError, dict(sigma=torch.ones(3)), "sigma must be a scalar or one value for each of 5 channels"),
        (ValueError, dict(weight=torch.randn(5, 4, 3, 3)), r"x must have weight.shape\[1\] \* groups = 4 \* 1 = 4 channels"),
        (ValueError, dict(x=x[..., :2]), r"x must be as large as the kernel's reach \[3, 3\]"),
        (ValueError, dict(weight=torch.randn(5, 3, 2, 3), padding="same"), "padding must be symmetric"),
        (ValueError, dict(act="gelu"), "act must be None or 'relu', got 'gelu'"),
        (ValueError, dict(images=3), "images must equal the rows of the input"),
    ):
        with pytest.raises(error, match=message):
            functional.conv_activate_noise(**{"x": x, "weight": w, "sigma": 0.1, "seed": 1, **arguments})
