"""Convolution with noise at its input, and with the next layer's noise in its epilogue, against float64."""

import math

import pytest
import torch

from rse_fast import functional, reference
from rse_fast.address import NoiseAddress
from rse_fast.kernels.triton import conv, runs_on

# A product of operands has an 11-bit mantissa at least (tf32, float16), bfloat16's 8; the interpreter does not round to tf32.
OPERAND = {torch.float32: 2.0**-11, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


SAME = (1, 1), (1, 1), (1, 1)  # stride, padding, dilation of a 3x3 kernel


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


# x, Cout, kernel, stride, padding, dilation, images, draws
CASES = {
    "first 3x3": ((2, 3, 9, 7), 16, (3, 3), (1, 1), (1, 1), (1, 1), 2, 2),
    "5 channels, stride 2": ((2, 5, 9, 8), 7, (3, 3), (2, 2), (1, 0), (1, 1), 1, 2),
    "pointwise": ((2, 64, 5, 5), 24, (1, 1), (1, 1), (0, 0), (1, 1), 2, 1),
    "dilation": ((1, 16, 9, 9), 20, (3, 3), (1, 1), (2, 2), (2, 2), 1, 2),
    "uneven kernel": ((2, 12, 7, 6), 5, (2, 3), (1, 2), (1, 1), (1, 1), 2, 2),
    "more rows than a block": ((3, 4, 11, 11), 4, (1, 1), (1, 1), (0, 0), (1, 1), 3, 2),
    "64 channels 3x3": ((1, 64, 4, 5), 16, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
}


def close(y, want, scale, dtype):
    """Within the roundings of operands, each product's size taken whole, and of the result."""
    assert y.shape == want.shape and y.isfinite().all()
    return ((y.double() - want).abs() <= OPERAND[dtype] * scale + OPERAND[dtype] * want.abs() + 1e-4).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_noise_at_the_input(case, dtype, seed):
    shape, c_out, kernel, stride, padding, dilation, images, draws = CASES[case]
    x, w = channels_last(torch.randn(shape).to(dtype)), torch.randn(c_out, shape[1], *kernel).to(dtype)
    bias = torch.randn(c_out).to(dtype) if dtype != torch.float16 else None
    sigma = torch.rand(shape[1]) if dtype == torch.float32 else torch.tensor(0.5)
    sample_ids = torch.tensor([[7 + i, 3] for i in range(images)]) if dtype == torch.float16 else None
    at = NoiseAddress(seed, 3, images, draws, 5, 9, sample_ids)
    y = conv.noisy_conv(x, w, bias, sigma, at, stride, padding, dilation)
    noisy = reference.add_noise(x.double(), sigma.double(), *at)
    options = (stride, padding, dilation, False, (0, 0), 1)
    want = torch.convolution(noisy, w.double(), None if bias is None else bias.double(), *options)
    scale = torch.convolution(noisy.abs(), w.double().abs(), None, *options)
    assert close(y, want, 3 * scale, dtype)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last) or y.shape[1] == 1
    # The same numbers enter as in the two steps: with weights of one nonzero they come out alike.
    if kernel == (1, 1) and bias is None:
        one = torch.zeros_like(w)
        one[0, 0] = 1
        got = conv.noisy_conv(x, one, None, sigma, at, stride, padding, dilation)[:, :1]
        assert torch.equal(got, functional.add_noise(x, sigma, **at._asdict(), backend="triton")[:, :1])


def test_padding_has_no_noise(seed):
    x, w = channels_last(torch.zeros(1, 4, 3, 3)), torch.ones(16, 4, 1, 1)
    y = conv.noisy_conv(x, w, None, torch.tensor(1.0), NoiseAddress(seed, 0, 1), (1, 1), (2, 2), (1, 1))
    assert (y[..., :2, :] == 0).all() and (y[..., :, -2:] == 0).all() and (y[..., 2:5, 2:5] != 0).all()


@pytest.mark.parametrize("case", [name for name in CASES if "rows" not in name])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_noise_in_the_epilogue(case, dtype, seed):
    shape, c_out, kernel, stride, padding, dilation, images, draws = CASES[case]
    x, w = channels_last(torch.randn(shape).to(dtype)), torch.randn(c_out, shape[1], *kernel).to(dtype)
    scale, shift = torch.randn(c_out), torch.randn(c_out)
    sigma = torch.rand(c_out) if dtype == torch.float32 else torch.tensor(0.5)
    at = NoiseAddress(seed, 3, images, draws, 5, 9)
    y = conv.conv_activate_noise(x, w, sigma, at, scale, shift, True, stride, padding, dilation)
    options = (stride, padding, dilation, False, (0, 0), 1)
    clean = torch.convolution(x.double(), w.double(), None, *options)
    size = torch.convolution(x.double().abs(), w.double().abs(), None, *options) * scale.abs().double().view(-1, 1, 1)
    want = reference.add_noise(clean, sigma.double(), *at, scale.double(), shift.double(), True)
    size = size.repeat(len(want) // len(size), 1, 1, 1)
    assert close(y, want, 2 * size + 4e-4, dtype)


def test_int8_rounds_once_with_the_noise_as_dither(seed):
    shape, c_out = (2, 32, 5, 5), 20
    x, w = channels_last(torch.randint(-100, 100, shape, dtype=torch.int8)), torch.randint(-100, 100, (c_out, 32, 3, 3), dtype=torch.int8)
    scale, shift, sigma = torch.rand(c_out) * 1e-3, torch.randn(c_out), torch.tensor(5.0)
    at = NoiseAddress(seed, 3, 2, 2, 5, 9)
    y = conv.conv_activate_noise(x, w, sigma, at, scale, shift, True, *SAME)
    exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    want = reference.add_noise(exact, sigma.double(), *at, scale.double(), shift.double(), True).clamp(-128, 127)
    assert y.dtype == torch.int8 and len(y) == 4
    off = (y.double() - want).abs()
    assert off.max() <= 0.5 + 0.01 and (y.float().std() > 1)
    saturated = conv.conv_activate_noise(x, w, sigma, at, scale * 1000, shift, False, *SAME)
    assert {saturated.min().item(), saturated.max().item()} == {-128, 127}


@pytest.mark.parametrize("e4m3", (torch.float8_e4m3fn, torch.float8_e4m3fnuz), ids=lambda d: str(d)[6:])
def test_fp8_rounds_once_with_the_noise_as_dither(e4m3, seed):
    if not runs_on(torch.empty(0, dtype=e4m3)):
        pytest.skip("this device multiplies no such numbers")
    x, w = channels_last(torch.randn(2, 32, 5, 5)).to(e4m3), torch.randn(20, 32, 3, 3).to(e4m3)
    scale, shift, sigma = torch.rand(20), torch.randn(20), torch.tensor(0.5)
    at = NoiseAddress(seed, 3, 2, 2, 5, 9)
    exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    want = reference.add_noise(exact, sigma.double(), *at, scale.double(), shift.double(), False)
    # Hopper's units cut each product to 13 bits behind the largest one's first (DeepSeek-V3 report, section 3.5.2).
    size = torch.nn.functional.conv2d(x.double().abs(), w.double().abs(), padding=1) * scale.double().view(-1, 1, 1)
    allowed = 4e-4 + (2.0**-11 if x.is_cuda else 2.0**-20) * size.repeat(2, 1, 1, 1)
    in_float = conv.conv_activate_noise(x, w, sigma, at, scale, shift, False, *SAME, dtype=torch.float32)
    assert ((in_float.double() - want).abs() <= allowed).all()
    y = conv.conv_activate_noise(x, w, sigma, at, scale, shift, False, *SAME)
    limit = torch.finfo(e4m3).max
    saturated = conv.conv_activate_noise(x, w, sigma, at, scale * 1000, shift, False, *SAME)
    assert saturated.float().abs().max() == limit and saturated.float().isfinite().all()
    assert y.dtype == e4m3 and ((y.double() - want).abs() <= (want.abs() + allowed) * 2.0**-4 + 2.0**-10 + allowed).all()


def test_through_the_op_with_gradients(seed):
    """Where the table says in_kernel, where it says separate, and grouped: values and gradients of the two steps."""
    for shape, c_out, kernel, groups in (
        ((2, 3, 7, 6), 8, 3, 1),
        ((2, 16, 5, 5), 12, 1, 1),
        ((2, 8, 5, 5), 8, 3, 1),
        ((2, 8, 5, 5), 8, 3, 4),
    ):
        x, w = (
            channels_last(torch.randn(shape)).half().requires_grad_(),
            torch.randn(c_out, shape[1] // groups, kernel, kernel).half().requires_grad_(),
        )
        bias, sigma = torch.randn(c_out).half().requires_grad_(), torch.tensor(0.3, requires_grad=True)
        found = []
        for backend in ("triton", "torch"):
            y = functional.noisy_conv2d(
                x, w, bias, sigma, seed=seed, images=2, draws=2, padding=kernel // 2, groups=groups, backend=backend
            )
            weight = torch.linspace(-1, 2, y.numel()).reshape(y.shape)
            found.append([y.float(), *torch.autograd.grad((y.float() * weight).sum() / 64, (x, w, bias, sigma))])
        for got, want in zip(*found, strict=True):
            assert ((got - want).abs() <= 0.02 * want.abs() + 0.02 * math.sqrt(x[0].numel())).all(), (shape, groups)


def test_the_op_of_the_epilogue(seed):
    """In the kernel where the table says so, else by the vendor's convolution and one pass; as the plain form either way."""
    for shape, c_out, kernel, groups, dtype in (
        ((2, 8, 5, 6), 12, 1, 1, torch.float16),
        ((2, 8, 5, 6), 8, 3, 1, torch.float16),
        ((2, 8, 5, 6), 8, 3, 4, torch.float16),
        ((2, 32, 4, 4), 8, 3, 1, torch.int8),
    ):
        x, w = torch.randn(shape), torch.randn(c_out, shape[1] // groups, kernel, kernel)
        x, w = (x * 40, w * 40) if dtype == torch.int8 else (x, w)
        x, w, each = x.clamp(-120, 120).to(dtype), w.clamp(-120, 120).to(dtype), torch.rand(c_out)
        scale = each * 1e-3 if dtype == torch.int8 else each
        options = dict(seed=seed, images=2, draws=2, scale=scale, shift=-each, act="relu", padding=kernel // 2, groups=groups)
        got, want = (functional.conv_activate_noise(x, w, each, backend=backend, **options) for backend in ("triton", "torch"))
        assert got.stride() == want.stride() and got.dtype == dtype
        off = (got.float() - want.float()).abs()
        assert (off <= (1.01 if dtype == torch.int8 else 0.02 + 2.0**-9 * want.float().abs())).all(), (kernel, groups, dtype)
        geometry = ([1, 1], [kernel // 2] * 2, [1, 1], groups)
        args = (x, w, each, *NoiseAddress(seed, 0, 2, 2), scale, None, True, *geometry, None, "triton")
        torch.library.opcheck(torch.ops.rse_fast.conv_activate_noise, args, test_utils=("test_schema", "test_faketensor"))


def test_tiles_that_autotuning_tries_change_only_the_order_of_sums(seed, monkeypatch):
    """Integers are summed exactly, so the epilogue's noise must come out bit for bit; noise at the input meets float sums of 32 terms."""
    x, w = channels_last(torch.randint(-9, 9, (1, 32, 5, 5), dtype=torch.int8)), torch.randint(-9, 9, (40, 32, 1, 1), dtype=torch.int8)
    sigma, at, geometry = torch.tensor(5.0), NoiseAddress(seed, 3, 1, 2, 5, 9), ((1, 1), (0, 0), (1, 1))
    calls = (
        lambda: conv.conv_activate_noise(x, w, sigma, at, None, None, True, *geometry),
        lambda: conv.noisy_conv(x.float(), w.float(), None, sigma, at, *geometry),
    )
    wanted = [call() for call in calls]
    for tile in conv.candidates(conv.default_tile(40, 32, 1, False))[::5]:
        monkeypatch.setattr(conv, "default_tile", lambda *_, tile=tile: tile)
        assert torch.equal(calls[0](), wanted[0]), tile
        assert torch.allclose(calls[1](), wanted[1], rtol=0, atol=0.05), tile


def test_what_the_fake_promises(seed):
    """Shape, dtype and strides, for each way a convolution is made."""
    for shape, c_out, kernel in (((2, 3, 7, 6), 8, 3), ((2, 16, 5, 5), 12, 1), ((2, 8, 5, 5), 8, 3)):
        for layout in (torch.clone, channels_last):
            arguments = (layout(torch.randn(shape)).half(), torch.randn(c_out, shape[1], kernel, kernel).half(), None, torch.tensor(0.3))
            options = (*NoiseAddress(seed, 0, 2, 2), [1, 1], [1, 1], [1, 1], 1, "triton")
            torch.library.opcheck(torch.ops.rse_fast.noisy_conv, (*arguments, *options), test_utils=("test_schema", "test_faketensor"))
