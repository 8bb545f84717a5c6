"""The public functions: what they refuse and how they say it, empty batches, and that a named backend never gives way to another."""

import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as plain

from rse_fast import functional

X = torch.zeros(4, 3, 5, 6)
WEIGHT, BIAS = torch.zeros(2, 3, 3, 3), torch.zeros(2)


def add_noise(x=X, sigma=0.1, **options):
    return functional.add_noise(x, sigma, **{"seed": 1, **options})


def noisy_conv2d(x=X, weight=WEIGHT, bias=BIAS, sigma=0.1, **options):
    return functional.noisy_conv2d(x, weight, bias, sigma, **{"seed": 1, **options})


def noisy_conv(x=X, weight=WEIGHT, bias=BIAS, sigma=0.1, **options):
    return functional.noisy_conv(x, weight, bias, sigma, **{"seed": 1, **options})


def noisy_linear(x=torch.zeros(4, 7), weight=torch.zeros(2, 7), bias=BIAS, sigma=0.1, **options):  # noqa: B008 - never changed
    return functional.noisy_linear(x, weight, bias, sigma, **{"seed": 1, **options})


ALL = (add_noise, noisy_conv2d, noisy_conv, noisy_linear)
CONVS = (noisy_conv2d, noisy_conv)
IDS = r"sample_ids must be an int64 tensor \[4, 2\], got "

# Functions, the bad arguments, the error, and its text: the argument's name, what is expected, what was got.
BAD = [
    (ALL, {"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    (ALL, {"x": X.int()}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
    (ALL, {"x": X.to(torch.complex64)}, TypeError, "x must be float32, .* got torch.complex64"),
    ((add_noise, noisy_linear), {"x": torch.zeros(3)}, ValueError, r"x must have at least 2 dimensions, got shape \(3,\)"),
    (CONVS, {"x": X[0]}, ValueError, r"x must have 4 dimensions, got shape \(3, 5, 6\)"),
    (CONVS, {"x": X[:, :2]}, ValueError, r"x must have weight.shape\[1\] \* groups = 3 \* 1 = 3 channels, got shape \(4, 2, 5, 6\)"),
    (ALL, {"sigma": -0.1}, ValueError, "sigma must be finite and not negative, got -0.1"),
    (ALL, {"sigma": math.nan}, ValueError, "sigma must be finite and not negative, got nan"),
    (ALL, {"sigma": math.inf}, ValueError, "sigma must be finite and not negative, got inf"),
    (ALL, {"sigma": 1e39}, ValueError, "sigma must be finite and not negative, got 1e\\+39"),
    (ALL, {"sigma": 10**400}, ValueError, "sigma must be finite and not negative, got 1000"),
    (ALL, {"sigma": "0.1"}, TypeError, "sigma must be a number or a tensor, got str"),
    (ALL, {"sigma": True}, TypeError, "sigma must be a number or a tensor, got bool"),
    (ALL, {"sigma": None}, TypeError, "sigma must be a number or a tensor, got NoneType"),
    (ALL, {"sigma": torch.tensor(-1.0)}, ValueError, "sigma must be finite and not negative, got -1.0"),
    (ALL, {"sigma": torch.tensor(math.inf, dtype=torch.float16)}, ValueError, "sigma must be finite and not negative, got inf"),
    (ALL, {"sigma": torch.tensor(1e39, dtype=torch.float64)}, ValueError, "sigma must be finite and not negative, got 1e\\+39"),
    (ALL, {"sigma": torch.tensor(1)}, TypeError, r"sigma must be a floating-point tensor, got torch.int64 of shape \(\)"),
    ((add_noise, *CONVS), {"sigma": torch.tensor([0.1, math.nan, 0.1])}, ValueError, r"sigma must be finite .* got \[0\.1.*, nan, "),
    ((add_noise, *CONVS), {"sigma": torch.ones(4)}, ValueError, r"sigma must be a scalar or one value .* 3 channels, got shape \(4,\)"),
    ((noisy_linear,), {"sigma": torch.ones(3)}, ValueError, r"sigma must be a scalar or one value .* 7 channels, got shape \(3,\)"),
    (ALL, {"sigma": torch.ones(1, 3)}, ValueError, r"sigma must be a scalar .* got shape \(1, 3\)"),
    (ALL, {"seed": 1.5}, TypeError, "seed must be an integer, got float"),
    (ALL, {"seed": None}, TypeError, "seed must be an integer, got NoneType"),
    (ALL, {"seed": True}, TypeError, "seed must be an integer, got bool"),
    (ALL, {"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "seed must be an int or an int64 tensor of one value, got torch.int32"),
    (ALL, {"seed": torch.tensor([1, 2])}, TypeError, r"seed must be an int or an int64 tensor of one value, got .*\(2,\)"),
    (ALL, {"draws": 0}, ValueError, "draws must be at least 1, got 0"),
    (ALL, {"draws": -2}, ValueError, "draws must be at least 1, got -2"),
    (ALL, {"draws": 2.0}, TypeError, "draws must be an integer, got float"),
    (ALL, {"images": 3}, ValueError, "images must equal the rows .* got images=3, draws=1 for an input of 4 rows"),
    (ALL, {"images": 3, "draws": 2}, ValueError, "images must equal the rows .* got images=3, draws=2 for an input of 4 rows"),
    (ALL, {"images": -4, "draws": 1}, ValueError, "images must equal the rows .* got images=-4"),
    (ALL, {"images": "4"}, TypeError, "images must be an integer, got str"),
    (ALL, {"stream": -1}, ValueError, "stream must not be negative, got -1"),
    (ALL, {"stream": 2**32}, ValueError, r"stream must fit the 32-bit counter \(at most 2\^32\), got 4294967297"),
    (ALL, {"stream": 0.0}, TypeError, "stream must be an integer, got float"),
    (ALL, {"image_offset": -1}, ValueError, "image_offset must not be negative, got -1"),
    (ALL, {"image_offset": 2**32 - 3}, ValueError, r"image_offset \+ images must fit the 32-bit counter \(at most 2\^32\), got 4294967297"),
    (ALL, {"draw_offset": -1}, ValueError, "draw_offset must not be negative, got -1"),
    (ALL, {"draw_offset": 2**32 - 1, "draws": 2}, ValueError, r"draw_offset \+ draws must fit the 32-bit counter .* got 4294967297"),
    (ALL, {"draw_offset": 1.0}, TypeError, "draw_offset must be an integer, got float"),
    (ALL, {"sample_ids": [[0, 0]] * 4}, ValueError, IDS + "list"),
    (ALL, {"sample_ids": torch.zeros(4, 2)}, ValueError, IDS + r"torch.float32 of shape \(4, 2\)"),
    (ALL, {"sample_ids": torch.zeros(3, 2).long()}, ValueError, IDS + r"torch.int64 of shape \(3, 2\)"),
    (ALL, {"sample_ids": torch.full((4, 2), -1)}, ValueError, "sample_ids must hold indices that fit the 32-bit counter with 1 draws, got"),
    (ALL, {"sample_ids": torch.tensor([[2**32, 0]] * 4)}, ValueError, "sample_ids must hold indices that fit the 32-bit counter"),
    (ALL, {"sample_ids": torch.tensor([[0, 2**32 - 1]] * 4), "draws": 2}, ValueError, "sample_ids must hold indices .* with 2 draws"),
    (ALL, {"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton', 'cpu', 'torch', got 'cuda'"),
    (ALL, {"backend": None}, ValueError, "backend must be one of .* got None"),
    ((add_noise,), {"channel_dim": 0}, ValueError, r"channel_dim must name a dimension .* got 0 for x of shape \(4, 3, 5, 6\)"),
    ((add_noise,), {"channel_dim": -4}, ValueError, "channel_dim must name a dimension of x other than 0, got -4"),
    ((add_noise,), {"channel_dim": 4}, ValueError, "channel_dim must name a dimension of x other than 0, got 4"),
    ((add_noise,), {"channel_dim": "C"}, TypeError, "channel_dim must be an integer, got str"),
    ((add_noise,), {"act": "gelu"}, ValueError, "act must be None or 'relu', got 'gelu'"),
    ((add_noise,), {"scale": torch.ones(2)}, ValueError, r"scale must be a float scalar or .* each of the 3 channels, got .*\(2,\)"),
    ((add_noise,), {"shift": torch.ones(3, 1)}, ValueError, r"shift must be a float scalar or .* got torch.float32 of shape \(3, 1\)"),
    ((add_noise,), {"scale": torch.ones(3).int()}, ValueError, "scale must be a float scalar or .* got torch.int32"),
    ((add_noise,), {"shift": "1"}, TypeError, "shift must be None, a number or a tensor, got str"),
    ((noisy_conv2d,), {"weight": WEIGHT[0]}, ValueError, r"weight must be a tensor \[Cout, Cin / groups, kh, kw\], got .*\(3, 3, 3\)"),
    ((noisy_conv,), {"weight": WEIGHT[0, 0]}, ValueError, r"weight must be a tensor .* with 1 to 3 kernel dimensions, got .*\(3, 3\)"),
    (CONVS, {"weight": [1]}, ValueError, r"weight must be a tensor \[Cout, .* got list"),
    ((noisy_linear,), {"weight": WEIGHT}, ValueError, r"weight must be a tensor \[out_features, in_features\], got .*\(2, 3, 3, 3\)"),
    ((noisy_linear,), {"weight": torch.ones(2, 6)}, ValueError, r"x must have weight.shape\[1\] = 6 features .* got shape \(4, 7\)"),
    ((*CONVS, noisy_linear), {"bias": 1.0}, ValueError, r"bias must be None or a tensor \[2\], got float"),
    ((*CONVS, noisy_linear), {"bias": torch.zeros(3)}, ValueError, r"bias must be None or a tensor \[2\], got .*\(3,\)"),
    (CONVS, {"stride": 0}, ValueError, r"stride must be an integer >= 1 or 2 of them, got \(0, 0\)"),
    (CONVS, {"stride": (1, 1, 1)}, ValueError, r"stride must be an integer >= 1 or 2 of them, got \(1, 1, 1\)"),
    (CONVS, {"stride": 2**31}, ValueError, r"stride must be below 2\^31, got \(2147483648, 2147483648\)"),
    (CONVS, {"padding": 2**62}, ValueError, r"padding must be below 2\^31, got"),
    (ALL, {"sigma": torch._efficientzerotensor(3)}, TypeError, "sigma must be a dense tensor, got zeros without memory"),
    (ALL, {"seed": torch._efficientzerotensor((), dtype=torch.int64)}, ValueError, "seed must be a dense tensor with data"),
    (ALL, {"sample_ids": torch._efficientzerotensor((4, 2), dtype=torch.int64)}, ValueError, "sample_ids must be a dense tensor with data"),
    ((add_noise,), {"scale": torch._efficientzerotensor(3)}, TypeError, "scale must be a dense tensor, got zeros without memory"),
    (CONVS, {"stride": 1.5}, TypeError, "stride must be an integer, got float"),
    (CONVS, {"stride": "2"}, TypeError, "stride must be an integer, got str"),
    (CONVS, {"dilation": (1, 0)}, ValueError, r"dilation must be an integer >= 1 or 2 of them, got \(1, 0\)"),
    (CONVS, {"padding": -1}, ValueError, r"padding must be an integer >= 0 or 2 of them, got \(-1, -1\)"),
    (CONVS, {"padding": "full"}, ValueError, "padding must be a number, a tuple, 'valid' or 'same', got 'full'"),
    (CONVS, {"padding": "same", "stride": 2}, ValueError, r"padding 'same' needs stride 1, got stride \(2, 2\)"),
    (CONVS, {"groups": 0}, ValueError, "groups must be at least 1, got 0"),
    (CONVS, {"groups": 1.0}, TypeError, "groups must be an integer, got float"),
]  # fmt: skip


@pytest.mark.parametrize(("functions", "bad", "error", "message"), BAD, ids=[f"{'-'.join(bad)}: {m[:60]}" for _, bad, _, m in BAD])
def test_bad_input_is_named_and_nothing_changes(functions, bad, error, message):
    tensors = {name: value.clone() for name, value in bad.items() if isinstance(value, torch.Tensor)}
    state = torch.get_rng_state()
    for function in functions:
        with pytest.raises(error) as caught:
            function(**bad)
        assert re.match(message, str(caught.value)), (function.__name__, str(caught.value))
    for name, value in tensors.items():
        assert torch.equal(bad[name], value) or value.isnan().any()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_backend_that_cannot_take_the_input_is_an_error(library):
    for function, x in ((add_noise, X), (noisy_conv2d, X), (noisy_linear, torch.zeros(4, 7))):
        with pytest.raises(TypeError, match="backend 'cpu' takes float32, bfloat16 or float16, got torch.float64"):
            function(x.double(), backend="cpu")
        with pytest.raises(ValueError, match="backend 'cpu' needs tensors on the CPU, got meta"):
            function(x.to("meta"), backend="cpu")


def test_the_named_backend_computes_it(library, monkeypatch):
    """ "cpu" and "auto" run the library, "torch" does not: seen by whether the launcher is called."""
    calls = []
    monkeypatch.setattr(functional.cpu, "add_noise", lambda *args: calls.append(args))
    for backend, called in (("cpu", 1), ("auto", 1), ("torch", 0)):
        calls.clear()
        add_noise(backend=backend)
        assert len(calls) == called, backend
    calls.clear()
    add_noise(X.double())  # "auto" falls back for what the library does not take
    assert not calls


WITHOUT_LIBRARY = """
import warnings, torch
from rse_fast import functional

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        auto, named = (functional.add_noise(torch.zeros(2, 3), 0.5, seed=4, backend=name) for name in ("auto", "torch"))
        print(torch.equal(auto, named))
print(len(caught), caught[0].category.__name__, caught[0].message)
try:
    functional.add_noise(torch.zeros(2, 3), 0.5, seed=4, backend="cpu")
except RuntimeError as error:
    print(error)
"""


def test_without_the_library_auto_falls_back_with_one_warning_and_cpu_is_an_error(run_python):
    done = run_python("-c", WITHOUT_LIBRARY, RSE_FAST_CPU_LIBRARY="/nonexistent")
    *same, warned, error = done.stdout.splitlines()
    assert same == ["True"] * 3, done.stderr
    assert warned.startswith("1 RuntimeWarning rse-fast: RSE_FAST_CPU_LIBRARY=/nonexistent does not exist")
    assert error.startswith("backend 'cpu' is not available: RSE_FAST_CPU_LIBRARY=/nonexistent does not exist")


def test_empty_batches_give_empty_results(backend, rng):
    for draws in (1, 3):
        for shape in ((0, 3), (0, 3, 5), (0, 4, 5, 6), (2, 0), (2, 3, 0), (2, 0, 5)):
            x = torch.zeros(shape, requires_grad=True)
            sigma = torch.ones(shape[1], requires_grad=True)
            y = functional.add_noise(x, sigma, seed=1, draws=draws, scale=torch.ones(shape[1]), act="relu", backend=backend)
            assert y.shape == (shape[0] * draws, *shape[1:]) and y.dtype == x.dtype
            y.sum().backward()
            assert x.grad.shape == shape and torch.equal(sigma.grad, torch.zeros(shape[1]))
        x, w, b = (torch.randn(shape, requires_grad=True) for shape in ((0, 3, 8, 8), (5, 3, 3, 3), (5,)))
        y = functional.noisy_conv2d(x, w, b, 0.1, seed=1, draws=draws, stride=2, backend=backend)
        assert y.shape == (0, 5, 3, 3)
        y.sum().backward()
        assert x.grad.shape == x.shape and not w.grad.any() and not b.grad.any()
        x, w = (torch.randn(shape, requires_grad=True) for shape in ((0, 4, 7), (5, 7)))
        y = functional.noisy_linear(x, w, None, 0.1, seed=1, draws=draws, backend=backend)
        assert y.shape == (0, 4, 5)
        y.sum().backward()
        assert x.grad.shape == x.shape and not w.grad.any()


def test_numbers_and_tensors_of_one_value_are_the_same_sigma(backend, rng):
    x = torch.randn(2, 3, 4)
    expected = functional.add_noise(x, 0.25, seed=1, backend=backend)
    one = torch.tensor(0.25)
    for sigma in (one, one.reshape(1), one.expand(3), one.double(), one.half(), np.float32(0.25), np.float64(0.25)):
        y = functional.add_noise(x, sigma, seed=1, backend=backend)
        # One sigma for all channels multiplies the radius, a vector the normal: a rounding apart.
        assert torch.equal(y, expected) if np.size(sigma) == 1 else (y - expected).abs().max() < 2.0**-21


def test_autocast_casts_as_for_the_plain_layers(rng):
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((2, 3, 8, 8), (4, 3, 3, 3), (4,)))
    flat, lw = torch.randn(3, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = functional.noisy_conv2d(x, w, b, 0.1, seed=1), functional.noisy_linear(flat, lw, None, 0.1, seed=1)
            noisy = functional.add_noise(x.to(dtype), 0.1, seed=1), functional.add_noise(flat.to(dtype), 0.1, seed=1)
            expected = plain.conv2d(noisy[0], w, b), plain.linear(noisy[1], lw)
        for leaves, y, z in zip(((x, w, b), (flat, lw)), found, expected, strict=True):
            assert y.dtype == z.dtype == dtype and torch.equal(y, z)
            g = torch.randn(y.shape).to(dtype)
            for one, two in zip(*(torch.autograd.grad(t, leaves, g) for t in (y, z)), strict=True):
                assert one.dtype == two.dtype == torch.float32 and torch.equal(one, two)
    with torch.autocast("cpu", torch.bfloat16):  # autocast leaves float64 alone, and noise alone keeps its dtype
        assert functional.noisy_conv2d(x.double(), w.double(), b.double(), 0.1, seed=1).dtype == torch.float64
        assert functional.add_noise(x, 0.1, seed=1).dtype == torch.float32
