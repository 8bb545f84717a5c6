"""Views, values and tensors at the edge of what the public functions take: the reference's value, or an error that names the argument."""

import math

import pytest
import torch

import rse_fast
from rse_fast import functional

pytestmark = pytest.mark.usefixtures("one_thread")
X, WEIGHT = torch.rand(2, 4, 6, 5), torch.rand(8, 4, 3, 3)


def negative_view(x):
    """A tensor with the values of ``x`` whose memory holds their opposites."""
    return torch._neg_view(-x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_views_have_the_values_they_show(backend, dtype, rng):
    seed, options = int(rng.integers(2**63)), {"stream": 3, "backend": backend}
    x, sigma, shift = torch.randn(2, 5, 4, 4).to(dtype), torch.rand(5), torch.randn(5)
    for scale in (None, torch.randn(5)):
        affine = {"scale": scale, "shift": None if scale is None else shift}
        views = {name: None if v is None else negative_view(v) for name, v in affine.items()}
        expected = functional.add_noise(x, sigma, seed=seed, **affine, **options)
        assert torch.equal(functional.add_noise(negative_view(x), negative_view(sigma), seed=seed, **views, **options), expected)
        written = negative_view(x)
        assert functional.add_noise_(written, sigma, seed=negative_view(torch.tensor(seed)), **views, **options) is written
        assert torch.equal(written, expected) and torch.equal(torch._neg_view(written), -expected)
    pooled = functional.activate_noise(x, sigma, seed=seed, pool=True, **options)
    assert all(map(torch.equal, functional.activate_noise(negative_view(x), sigma, seed=seed, pool=True, **options), pooled))
    bytes_ = functional.add_noise_u8(x, sigma, 0.1, 9, seed=seed, **options)
    assert torch.equal(functional.add_noise_u8(negative_view(x), sigma, 0.1, 9, seed=seed, **options), bytes_)
    imaginary = torch.complex(torch.zeros_like(x, dtype=torch.float32), x.float()).conj().imag
    assert imaginary.is_neg() and torch.equal(
        functional.add_noise(imaginary.contiguous(), sigma, seed=seed, **options),
        functional.add_noise(-x.float(), sigma, seed=seed, **options),
    )


def test_gradients_of_negative_views(backend, rng):
    g, sigma = torch.randn(2, 5, 4, 4), torch.tensor(0.5, requires_grad=True)
    y = functional.add_noise(torch.zeros_like(g), sigma, seed=7, backend=backend)
    (expected,) = torch.autograd.grad(y, sigma, g, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, sigma, negative_view(g))[0], expected)


@pytest.mark.parametrize("shape", [(3, 4, 4, 4), (3, 3, 2), (2, 8, 33)])
def test_sigma_up_to_the_largest_float(backend, shape, rng):
    """The product with a normal overflows only where it is too large itself."""
    seed, x = int(rng.integers(2**63)), torch.randn(shape)
    eps = functional.add_noise(torch.zeros(shape), 1.0, seed=seed, backend="torch").double()
    for sigma in (5e37, 1e38, 3.4e38, torch.finfo(torch.float32).max):
        y = functional.add_noise(x, sigma, seed=seed, backend=backend)
        product = eps * torch.tensor(sigma, dtype=torch.float32).double()
        largest = torch.finfo(torch.float32).max
        assert not y.isnan().any() and torch.equal(y.sign(), product.sign().float())
        finite = product.abs() < 0.999 * largest
        assert y[finite].isfinite().all() and y[product.abs() > 1.001 * largest].isinf().all()
        # The normals agree to 1e-6, in units of sigma.
        assert (y[finite].double() - product[finite]).abs().max() <= 3e-6 * sigma


def test_bytes_of_extreme_units_are_the_same_on_every_backend(backend, rng):
    """What is beyond floats in units of a step, 0 * inf and inf - inf, was 0 in one backend and 255 in another."""
    refused = same = 0
    for _ in range(200):
        kind = rng.choice([torch.float32, torch.uint8, torch.int32])
        x = torch.randn(2, 4, 3, 3) if kind == torch.float32 else torch.randint(0, 200, (2, 4, 3, 3)).to(kind)
        scale, shift, sigma = (torch.tensor(10.0 ** rng.uniform(-40, 38.4, 4), dtype=torch.float32) for _ in range(3))
        scale, shift = scale * torch.randint(-1, 2, (4,)), shift * torch.randint(-1, 2, (4,))
        step = 10.0 ** rng.uniform(-30, 30)
        arguments = {"seed": 5, "scale": scale, "shift": shift, "backend": backend}
        beyond = max(p.abs().max().item() for p in (scale, shift, sigma)) / step > 2.0**124
        if beyond:
            refused += 1
            with pytest.raises(ValueError, match="step must be large enough for sigma, scale and shift"):
                functional.add_noise_u8(x, sigma, step, 40, **arguments)
            continue
        same += 1
        y = functional.add_noise_u8(x, sigma, step, 40, **arguments).int()
        value = (x.double() * scale.double()[:, None, None] + shift.double()[:, None, None]) / step
        eps = functional.add_noise(torch.zeros(2, 4, 3, 3, dtype=torch.float64), 1.0, seed=5, backend="torch")
        noise = sigma.double()[:, None, None] * eps / step
        # Rounding in float32 is relative to the terms, which may cancel.
        terms = (x.double() * scale.double()[:, None, None]).abs() / step + shift.double().abs()[:, None, None] / step + noise.abs()
        off = (y - (value + noise + 40).clamp(0, 255)).abs()
        assert (off <= 0.5 + 1e-3 + 1e-5 * terms).all()
    assert refused > 10 and same > 10


# --------------------------------------------------------------------------------------------------------------------------- errors
def conv(**changes):
    arguments = {"x": X, "weight": WEIGHT, "bias": torch.rand(8), "sigma": 0.1, "seed": 0} | changes
    return functional.noisy_conv2d(**arguments)


def linear(**changes):
    arguments = {"x": torch.rand(2, 4), "weight": torch.rand(3, 4), "bias": torch.rand(3), "sigma": 0.1, "seed": 0} | changes
    return functional.noisy_linear(**arguments)


def noise(**changes):
    return functional.add_noise(**({"x": X, "sigma": 0.1, "seed": 0} | changes))


META = {"device": "meta"}
BAD = [
    (conv, {"x": X[:, :, :0], "padding": 1}, ValueError, r"x must have at least one pixel in each dimension, got shape \(2, 4, 0, 5\)"),
    (conv, {"x": X[:, :, :2]}, ValueError, r"x must be as large as the kernel's reach \[3, 3\]"),
    (conv, {"dilation": 4, "padding": 1}, ValueError, r"x must be as large as the kernel's reach \[9, 9\] less its padding \[2, 2\]"),
    (conv, {"x": X[:, :3], "weight": torch.rand(8, 1, 3, 3), "groups": 3}, ValueError, "groups must divide the 8 output channels"),
    (conv, {"weight": WEIGHT.double()}, TypeError, "weight must be float32 as x is, got float64"),
    (conv, {"weight": WEIGHT.bfloat16()}, TypeError, "weight must be float32 as x is, got bfloat16"),
    (conv, {"bias": torch.rand(8).half()}, TypeError, "bias must be float32 as x is, got float16"),
    (conv, {"weight": WEIGHT.to_sparse()}, TypeError, "weight must be a dense tensor, got layout torch.sparse_coo"),
    (conv, {"weight": torch.rand(8, 4, 3, 3, **META)}, ValueError, "weight must have data, got a tensor on the meta device"),
    (conv, {"bias": torch.rand(8, **META)}, ValueError, "bias must have data"),
    (conv, {"x": X.to_sparse()}, TypeError, "x must be a dense tensor"),
    (linear, {"weight": torch.rand(3, 4).half()}, TypeError, "weight must be float32"),
    (linear, {"weight": torch.rand(3, 4, **META)}, ValueError, "weight must have data"),
    (noise, {"x": X.to_sparse()}, TypeError, "x must be a dense tensor"),
    (noise, {"x": X.to_mkldnn()}, TypeError, "x must be a dense tensor"),
    (noise, {"sigma": torch.tensor(0.1, **META)}, ValueError, "sigma must have data"),
    (noise, {"sigma": torch.rand(4).to_sparse()}, TypeError, "sigma must be a dense tensor"),
    (noise, {"scale": torch.rand(4, **META)}, ValueError, "scale must have data"),
    (noise, {"shift": torch.rand(4).to_sparse()}, TypeError, "shift must be a dense tensor"),
    (noise, {"seed": torch.tensor(1, **META)}, ValueError, "seed must be a dense tensor with data"),
    (noise, {"seed": torch.tensor(True)}, TypeError, "seed must be an int or an int64 tensor"),
    (noise, {"sample_ids": torch.zeros(2, 2, dtype=torch.int64, **META)}, ValueError, "sample_ids must be a dense tensor with data"),
    (noise, {"stream": torch.tensor(True)}, TypeError, "stream must be an integer, got bool"),
]  # fmt: skip


@pytest.mark.parametrize("function, changes, error, message", BAD)
def test_errors_name_the_argument(function, changes, error, message):
    function()
    with pytest.raises(error, match=message):
        function(**changes)


def test_errors_of_ensembles_name_the_argument():
    ensemble = rse_fast.Ensemble(rse_fast.convert(torch.nn.Sequential(torch.nn.Conv2d(4, 3, 3), torch.nn.Flatten())), 2)
    with pytest.raises(TypeError, match="seed must be an integer, got bool"):
        ensemble.predict(X, seed=torch.tensor(True))
    with pytest.raises(TypeError, match="x must be a dense tensor"):
        ensemble.predict(X.to_sparse())
    with pytest.raises(ValueError, match="x must have data"):
        ensemble.predict(X.to("meta"))
    for radii in ("x", ["x"], None.__class__, [0.1, "y"], [True], torch.tensor(True)):
        with pytest.raises(TypeError, match="radii must be None, a number or several"):
            rse_fast.certify(ensemble, X, radii=radii)
    with pytest.raises(ValueError, match="radii must be finite and not negative"):
        rse_fast.certify(ensemble, X, radii=[math.nan])
