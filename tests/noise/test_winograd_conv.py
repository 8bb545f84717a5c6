"""Noisy convolutions that run by Winograd's algorithm on a CPU: results and gradients against float64, and what takes the direct one."""

import pytest
import torch
from winograd_bound import bound, weight_gradient_bound

from rse_fast import functional, nn, noise
from rse_fast.kernels.cpu import winograd

AT = {"seed": 11, "stream": 3, "image_offset": 5}
# rows, inputs, outputs, H, W, padding
SHAPES = ((6, 64, 72, 13, 17, 1), (16, 64, 64, 16, 16, 0), (40, 32, 20, 7, 9, 2), (33, 100, 64, 8, 8, 1))


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def with_library(library):
    if library.unit == "baseline":
        pytest.skip("a processor without AVX2 runs direct convolutions")


def made(rows, inputs, outputs, height, width, padding, per_channel):
    x = channels_last(torch.randn(rows, inputs, height, width)).requires_grad_()
    weight = (torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5).requires_grad_()
    return x, weight, torch.randn(outputs, requires_grad=True), torch.rand(inputs if per_channel else ()).requires_grad_()


@pytest.mark.parametrize("draws", (1, 3))
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients(shape, draws, rng):
    rows, inputs, outputs, height, width, padding = shape
    x, weight, bias, sigma = made(*shape, per_channel=draws == 3)
    tile = winograd.best_tile(winograd.CONVOLUTION, rows * draws, *shape[1:])
    assert tile is not None
    y = functional.noisy_conv2d(x, weight, bias, sigma, padding=padding, draws=draws, **AT)
    g = channels_last(torch.randn(y.shape))
    g_x, g_weight, g_bias, g_sigma = torch.autograd.grad(y, (x, weight, bias, sigma), g)
    z = functional.add_noise(x.detach(), sigma.detach(), draws=draws, **AT)  # what is convolved, in float32
    exact = [t.detach().double().requires_grad_() for t in (z, weight, bias)]
    want = torch.nn.functional.conv2d(*exact, padding=padding)
    assert ((y - want).abs() <= bound(z, weight, tile, padding, torch.float32, torch.float32, bias.detach()[:, None, None])).all()
    want_z, want_weight, want_bias = torch.autograd.grad(want, exact, g.double())
    turned, back = winograd.turned(weight.detach()), 2 - padding
    tile = winograd.best_tile(winograd.CONVOLUTION, rows * draws, outputs, inputs, *y.shape[2:], back)
    limit = bound(g, turned, tile or 4, back, torch.float32)
    over = draws * 2.0**-24 * want_z.abs().unflatten(0, (draws, rows)).sum(0)
    assert ((g_x - want_z.unflatten(0, (draws, rows)).sum(0)).abs() <= limit.unflatten(0, (draws, rows)).sum(0) + over).all()
    assert ((g_weight - want_weight).abs() <= weight_gradient_bound(z, g, 4, padding)).all()
    assert ((g_bias - want_bias).abs() <= y.numel() / outputs * 2.0**-24 * g.abs().sum((0, 2, 3))).all()
    eps = functional.add_noise(torch.zeros(x.shape), 1.0, draws=draws, **AT).double()
    product = want_z * eps
    want_sigma = product.sum((0, 2, 3)) if sigma.dim() else product.sum()
    slack = (limit * eps.abs() + 3 * 2.0**-24 * product.abs()).sum((0, 2, 3))
    assert ((g_sigma - want_sigma).abs() <= (slack if sigma.dim() else slack.sum()) + 2.0**-24 * want_sigma.abs()).all()


def test_the_noise_is_made_inside(rng, monkeypatch):
    """Neither direction makes the noisy input: add_noise is not called."""
    x, weight, bias, _ = made(*SHAPES[1], per_channel=False)
    y = functional.noisy_conv2d(x, weight, bias, 0.1, **AT)
    monkeypatch.setattr(noise, "add_noise", None)
    again = functional.noisy_conv2d(x, weight, bias, 0.1, **AT)
    again.sum().backward()
    assert torch.equal(y, again) and weight.grad is not None and x.grad is not None


def test_a_part_of_the_gradients_is_the_same(rng):
    """An attack wants that of the input alone, a first layer those of its parameters."""
    x, weight, bias, sigma = made(*SHAPES[0], per_channel=True)
    g = channels_last(torch.randn(6, 72, 13, 17))

    def gradients(*leaves):
        arguments = (t if any(t is leaf for leaf in leaves) else t.detach() for t in (x, weight, bias, sigma))
        y = functional.noisy_conv2d(*arguments, padding=1, **AT)
        return torch.autograd.grad(y, leaves, g)

    together = gradients(x, weight, bias, sigma)
    for leaf, want in zip((x, weight, bias, sigma), together, strict=True):
        (got,) = gradients(leaf)
        # bias: alone it is a sum of its own, of other order
        assert torch.equal(got, want) if leaf is not bias else torch.allclose(got, want, rtol=1e-4, atol=1e-3)


def test_batched_gradients(rng):
    """As of torch.autograd.grad(..., is_grads_batched=True) and of vectorised Jacobians."""
    leaves = made(*SHAPES[1], per_channel=False)
    y = functional.noisy_conv2d(*leaves, **AT)
    gs = torch.randn(2, *y.shape)
    together = torch.autograd.grad(y, leaves, gs, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(gs):
        for got, want in zip(together, torch.autograd.grad(y, leaves, g, retain_graph=True), strict=True):
            assert (got[i] - want).abs().max() <= 1e-4 * want.abs().max()


def test_second_derivatives(rng):
    """The gradient of a gradient takes torch's own convolutions: it agrees with that of the direct algorithm."""
    x, weight, bias, _ = made(*SHAPES[1], per_channel=False)

    def penalty(backend):
        y = functional.noisy_conv2d(x, weight, bias, 0.1, backend=backend, **AT)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, weight))

    for got, want in zip(penalty("cpu"), penalty("torch"), strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_what_runs_directly(rng):
    """Other layouts, dtypes and geometries, the torch backend, and narrow layers: bit for bit the noise, then torch's convolution."""
    x, weight, bias, _ = (t.detach() for t in made(*SHAPES[0], per_channel=False))
    cases = [
        (x.contiguous(), weight, bias, {"padding": 1}),
        (x.double(), weight.double(), bias.double(), {"padding": 1}),
        (x.bfloat16(), weight.bfloat16(), bias.bfloat16(), {"padding": 1}),
        (x, weight, bias, {"padding": 1, "stride": 2}),
        (x, weight, bias, {"padding": 2, "dilation": 2}),
        (x, weight, bias, {"padding": (1, 0)}),
        (x, weight, bias, {"padding": 3}),
        (x, weight[:, :32], bias, {"padding": 1, "groups": 2}),
        (x, weight[:, :, :1], bias, {"padding": (0, 1)}),
        (channels_last(x[:, :8]), weight[:, :8], bias, {"padding": 1}),
        (x, weight, bias, {"padding": 1, "backend": "torch"}),
        (channels_last(x[:1, :, :1, :1]), weight, bias, {"padding": 1}),
    ]
    for a, w, b, options in cases:
        got = functional.noisy_conv2d(a, w, b, 0.1, **options, **AT)
        z = functional.add_noise(a, 0.1, **AT, backend=options.pop("backend", "auto"))
        assert torch.equal(got, torch.nn.functional.conv2d(z, w, b, **options)), options
    # and the first does not
    z = functional.add_noise(x, 0.1, **AT)
    got = functional.noisy_conv2d(x, weight, bias, 0.1, padding=1, **AT)
    assert not torch.equal(got, torch.nn.functional.conv2d(z, weight, bias, padding=1))


def test_every_layout_of_a_weight(rng):
    x, weight, bias, _ = (t.detach() for t in made(*SHAPES[0], per_channel=False))
    want = functional.noisy_conv2d(x, weight, bias, 0.1, padding=1, **AT)
    strided = torch.randn(2 * len(bias))[::2].copy_(bias)
    for other in (channels_last(weight), weight.mT.contiguous().mT, weight.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(functional.noisy_conv2d(x, other, strided, 0.1, padding=1, **AT), want)
    negative = torch.complex(torch.zeros_like(weight), -weight).conj().imag
    assert negative.is_neg() and torch.equal(functional.noisy_conv2d(x, negative, bias, 0.1, padding=1, **AT), want)


@pytest.mark.parametrize(
    "name, value",
    (
        ("weight", torch.zeros(64, 32, 3, 3)),
        ("weight", torch.zeros(48, 64, 3, 3)),
        ("bias", torch.zeros(5)),
        ("bias", torch.zeros(64, dtype=torch.float64)),
    ),
)
def test_parameters_that_were_put_into_a_layer(name, value, rng):
    """What does not go with the layer is refused by name, and not read as what it is not."""
    layer = nn.NoisyConv2d(64, 64, 3, padding=1, sigma=0.1)
    setattr(layer, name, torch.nn.Parameter(value))
    assert winograd.best_tile(winograd.CONVOLUTION, 16, 64, 64, 16, 16, 1) is not None
    with pytest.raises((ValueError, TypeError), match="channels|bias must be"):
        layer(channels_last(torch.randn(16, 64, 16, 16)))


def test_a_weight_without_memory(rng):
    zeros, x = torch._efficientzerotensor((64, 64, 3, 3)), channels_last(torch.randn(16, 64, 16, 16))
    with pytest.raises(TypeError, match="weight must be a dense tensor, got zeros without memory"):
        functional.noisy_conv2d(x, zeros, None, 0.1, padding=1, **AT)


class Wrapped(torch.Tensor):
    """A subclass with no memory of its own, as of quantised and of distributed weights."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*(t.inner if isinstance(t, Wrapped) else t for t in args), **(kwargs or {}))


def test_parameters_of_a_subclass(rng):
    x, weight, bias, _ = made(*SHAPES[1], per_channel=False)
    want = functional.noisy_conv2d(x, weight, bias, 0.1, **AT)
    for w, b in ((Wrapped(weight.detach()), bias), (weight, Wrapped(bias.detach()))):
        got = functional.noisy_conv2d(x, w, b, 0.1, **AT)
        assert (got - want).abs().max() <= 1e-4
        with torch.no_grad():
            assert (functional.noisy_conv2d(x, w, b, 0.1, **AT) - want).abs().max() <= 1e-4
        (g,) = torch.autograd.grad(got.sum(), x)
        assert (g - torch.autograd.grad(want.sum(), x, retain_graph=True)[0]).abs().max() <= 1e-4


def test_a_profile_is_of_what_a_step_computes(rng):
    """A profiler names the op, and changes neither the algorithm nor a bit of what it computes."""
    leaves = made(*SHAPES[1], per_channel=True)

    def step():
        y = functional.noisy_conv2d(*leaves, **AT)
        with torch.no_grad():
            assert torch.equal(functional.noisy_conv2d(*leaves, **AT), y)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    want = step()
    with torch.profiler.profile() as profile:
        got = step()
    names = {event.name for event in profile.events()}
    assert "rse_fast::noisy_conv" in names and not any("mkldnn" in name for name in names)
    assert all(map(torch.equal, got, want))
