"""The ops as torch sees them: schemas and fakes, every gradient, and what is held for backward."""

import functools
import itertools
import math

import pytest
import torch
from torch.nn import functional as plain

from rse_fast import autograd, functional, ops, reference
from rse_fast.address import NoiseAddress

U = 2.0**-24  # one float32 rounding
SEED = torch.tensor(-123456789)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=("cpu", "torch"))
def backend(request):
    if request.param == "cpu":  # in its best unit: units differ in add_noise alone, which test_noise_contract.py compares
        request.getfixturevalue("library")
    return request.param


def noise_of(images, draws):
    return {"seed": SEED, "images": images, "draws": draws, "image_offset": 4, "draw_offset": 1}


def eps_like(x, images, draws):
    """Float64 eps of `where` for a batch x [*, C, *spatial]."""
    z = reference.gaussian(int(SEED), 0, images, draws, x.shape[1], math.prod(x.shape[2:]), image_offset=4, draw_offset=1)
    return torch.from_numpy(z).movedim(-1, 1).reshape(images * draws, *x.shape[1:])


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def column(p, x):
    return p.reshape(-1, *[1] * (x.dim() - 2)) if p.dim() else p


# ------------------------------------------------------------------------------------------------------------------------- opcheck
def leaf(*shape, dtype=torch.float32, layout=torch.clone):
    return layout(torch.randn(shape).to(dtype)).requires_grad_()


def op_calls():
    """Op and arguments: dtypes, layouts, lazy and packed, with and without the optional arguments."""
    at, sigma = NoiseAddress(SEED, 3, 2, 2, 1, 5), torch.tensor(0.3)
    own = at._replace(sample_ids=torch.tensor([[4, 0], [2**32 - 1, 7]]))
    learnt = sigma.clone().requires_grad_()
    for dtype, layout in ((torch.float32, torch.clone), (torch.float32, channels_last), (torch.bfloat16, torch.clone)):
        x, parameter = functools.partial(leaf, dtype=dtype, layout=layout), functools.partial(leaf, dtype=dtype)
        yield ops.add_noise, (x(2, 3, 5, 4), learnt, *at, None, None, False, "auto")
        yield ops.noisy_conv, (x(2, 4, 6, 5), parameter(6, 2, 3, 3), parameter(6), sigma, *at, [2, 1], [1, 0], [1, 2], 2, "auto")
    for backend in ("auto", "torch"):
        yield ops.add_noise, (leaf(4, 3, 5), torch.rand(3, requires_grad=True), *own, leaf(3), leaf(3), True, backend)
        per_channel = torch.rand(2, requires_grad=True)
        yield ops.noisy_conv, (leaf(4, 2, 9), leaf(3, 2, 4), None, per_channel, *own, [1], [0], [1], 1, backend)
        yield ops.noisy_linear, (leaf(2, 4, 5), leaf(3, 5), leaf(3), torch.rand(5, requires_grad=True), *own, backend)
        yield ops.sigma_grad, (leaf(4, 3, 5, 4), *own, True, backend)
    yield ops.add_noise, (leaf(2, 3, 1, 5).transpose(-1, -2), sigma, *at, None, None, True, "auto")
    yield ops.add_noise, (leaf(0, 3), sigma, *NoiseAddress(SEED, 0, 0, 2), None, None, False, "auto")
    yield ops.noisy_linear, (parameter(2, 5), parameter(3, 5), None, learnt, *at, "auto")
    yield ops.sigma_grad, (parameter(4, 3), *at, False, "auto")


def test_opcheck(rng):
    for op, args in op_calls():
        try:
            torch.library.opcheck(op.default, args)
        except Exception as error:
            raise AssertionError(f"{op}{tuple(a.shape if isinstance(a, torch.Tensor) else a for a in args)}") from error


def test_each_kind_of_device_has_an_implementation_of_one_schema():
    for op in (ops.add_noise, ops.activate_noise, ops.conv_activate_noise, ops.noisy_conv, ops.noisy_linear, ops.sigma_grad):
        for key in ("CPU", "CUDA", "XPU", "MPS"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(op.default.name(), key), (op, key)


# ----------------------------------------------------------------------------------------------- gradients in float64, torch backend
def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def away_from_zero(*shape):
    """Random values that a ReLU's kink, or a finite difference across it, does not touch."""
    return (torch.rand(shape, dtype=torch.float64) + 0.1) * torch.randint(0, 2, shape).mul(2).sub(1)


def gradient_cases(per_channel):
    """Name, function and float64 inputs."""
    at = {"stream": 2, "backend": "torch", **noise_of(2, 3)}

    def sigma(channels):
        return (torch.rand((channels,) if per_channel else ()).double() + 0.1).requires_grad_()

    def noise(x, s, scale, shift, **options):
        return functional.add_noise(x, s, scale=scale, shift=shift, **options, **at)

    for act in (None, "relu"):
        scale, shift = away_from_zero(3).requires_grad_(), double(3)
        x = ((away_from_zero(2, 3, 4) - shift.detach()[:, None]) / scale.detach()[:, None]).requires_grad_()
        yield f"add_noise {act}", functools.partial(noise, act=act), (x, sigma(3), scale, shift)
    ends = functools.partial(functional.add_noise, act="relu", channel_dim=-1, **at)
    yield "add_noise packed, channels at the end", ends, (away_from_zero(6, 2, 3).requires_grad_(), sigma(3))
    for size, kernel in (((5,), (3,)), ((4, 3), (2, 3)), ((3, 2, 3), (2, 1, 2))):
        conv = functools.partial(functional.noisy_conv, stride=2, padding=1, **at)
        yield f"noisy_conv {kernel}", conv, (double(2, 2, *size), double(3, 2, *kernel), double(3), sigma(2))
    for kernel in ((3, 3), (2, 3)):
        same = functools.partial(functional.noisy_conv2d, padding="same", dilation=(1, 2), groups=2, **at)
        yield f"noisy_conv2d 'same' {kernel}", same, (double(2, 4, 3, 4), double(2, 2, *kernel), double(2), sigma(4))
    for rows in ((2,), (6, 2)):
        linear = functools.partial(functional.noisy_linear, **at)
        yield f"noisy_linear {rows}", linear, (double(*rows, 4), double(3, 4), double(3), sigma(4))
    address = NoiseAddress(SEED, 2, 2, 3, 4, 1)
    yield "sigma_grad", lambda g: autograd.sigma_grad(g, address, per_channel, "torch"), (double(6, 3, 4),)


@pytest.mark.parametrize("per_channel", (False, True), ids=("scalar sigma", "sigma per channel"))
def test_gradients_and_their_gradients_in_float64(per_channel, rng):
    for name, function, inputs in gradient_cases(per_channel):
        # Along random directions, not element by element; in reverse and in forward mode.
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True), name
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True), name


def test_the_gradient_of_sigma_grad_as_an_op(rng):
    for per_channel in (False, True):
        op = lambda g: ops.sigma_grad(g, *NoiseAddress(SEED, 2, 2, 3, 4, 1), per_channel, "torch")  # noqa: B023, E731 - called at once
        assert torch.autograd.gradcheck(op, double(6, 3, 4), fast_mode=True)
        assert torch.autograd.gradgradcheck(op, double(6, 3, 4), fast_mode=True)


# ------------------------------------------------------------------------------------------------- gradients in float32, all backends
def check_against_float64(call, model, tensors, eps, what):
    """Output and gradients of ``call(*tensors)`` in float32 against ``model(*tensors, eps)`` in float64.

    A sum of n products, in any order, is within n roundings of the sum of their absolute values: the same model on absolute values.
    The roundings of its terms (at most 6) come on top; an error of 1e-6 in eps counts like noise of 1e-6 everywhere.
    """
    given = [i for i, t in enumerate(tensors) if t is not None]

    def run(function, inputs, g=None):
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        y = function(*leaves)
        g = torch.randn(y.shape) if g is None else g.to(y.dtype)
        return g, [y, *torch.autograd.grad(y, [leaves[i] for i in given], g)]

    wide = [None if t is None else t.double() for t in tensors]
    sizes = [None if t is None else t.abs() for t in wide]
    g, found = run(call, tensors)
    _, expected = run(functools.partial(model, eps=eps), wide, g)
    _, terms = run(functools.partial(model, eps=eps.abs()), sizes, g.abs())
    _, noise = run(functools.partial(model, eps=torch.full_like(eps, 1e-6)), sizes, g.abs())
    n = g.numel() + sum(tensors[i].numel() for i in given[1:]) + 6
    for i, a in enumerate(found):
        assert a.dtype == torch.float32 and a.shape == expected[i].shape, (what, i, a.shape)
        error = n * U * terms[i] + noise[i]
        assert ((a - expected[i]).abs() <= error).all(), (what, i, (a - expected[i]).abs().max().item(), error.max().item())


def packed(x, eps):
    return x.repeat(len(eps) // len(x), *[1] * (x.dim() - 1))


CONVS = [  # x without its rows, weight, options
    ((4, 11), (6, 4, 3), {"stride": 2, "padding": 1}),
    ((3, 8, 7), (5, 3, 3, 3), {"padding": 1}),
    ((4, 8, 7), (6, 4, 1, 1), {"stride": 2}),
    ((4, 9, 8), (6, 2, 3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
    ((6, 7, 7), (6, 1, 3, 3), {"padding": "same", "dilation": 2, "groups": 6}),
    ((3, 7, 6), (4, 3, 4, 2), {"padding": "same"}),
    ((3, 7, 6), (4, 3, 3, 2), {"padding": "valid"}),
    ((2, 4, 5, 6), (3, 2, 2, 3, 3), {"padding": (0, 1, 1), "stride": (1, 2, 1)}),
]
PACKINGS = ((3, 1, 3), (2, 3, 2), (2, 2, 4))  # images, draws, rows of the input: one draw, lazy, packed


@pytest.mark.usefixtures("gradients_of_small_inputs")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_gradients_of_noisy_conv(backend, case, rng):
    shape, weight, options = case
    convolution = (plain.conv1d, plain.conv2d, plain.conv3d)[len(shape) - 2]

    def model(x, w, b, s, eps):
        return convolution(packed(x, eps) + column(s, x) * eps, w, b, **options)

    for (images, draws, rows), (per_channel, bias) in zip(PACKINGS, ((0, 1), (1, 0), (0, 1)), strict=True):
        call = functools.partial(functional.noisy_conv, backend=backend, **noise_of(images, draws), **options)
        for layout in (torch.clone, channels_last):
            x, w, b = layout(torch.randn(rows, *shape)), torch.randn(weight), torch.randn(weight[0]) if bias else None
            sigma = torch.rand(shape[0]) + 0.1 if per_channel else torch.tensor(0.3)
            check_against_float64(call, model, (x, w, b, sigma), eps_like(x, images, draws), (images, draws, rows, layout))


@pytest.mark.usefixtures("gradients_of_small_inputs")
def test_gradients_of_noisy_linear(backend, rng):
    def model(x, w, b, s, eps):
        return plain.linear(packed(x, eps) + s * eps, w, b)

    for shape, (images, draws, rows), bias in itertools.product(((9,), (5, 12)), PACKINGS, (False, True)):
        call = functools.partial(functional.noisy_linear, backend=backend, **noise_of(images, draws))
        for sigma in (torch.tensor(0.3), torch.rand(shape[-1]) + 0.1):
            x, w, b = torch.randn(rows, *shape), torch.randn(7, shape[-1]), torch.randn(7) if bias else None
            eps = eps_like(x.movedim(-1, 1), images, draws).movedim(1, -1)
            check_against_float64(call, model, (x, w, b, sigma), eps, (shape, rows, bias, sigma))


@pytest.mark.usefixtures("gradients_of_small_inputs")
@pytest.mark.parametrize("act", (None, "relu"))
def test_gradients_of_add_noise(backend, act, rng):
    for shape, (images, draws, rows), layout in itertools.product(((3, 7, 5), (8, 33), (6,)), PACKINGS, (torch.clone, channels_last)):
        scale, shift, clean = torch.rand(shape[0]) + 0.5, torch.randn(shape[0]), away_from_zero(rows, *shape)
        kept = packed((clean > 0).double() if act else torch.ones_like(clean), range(images * draws))
        x = layout(((clean - column(shift, clean)) / column(scale, clean)).float())

        def model(x, s, scale, shift, eps, kept=kept):
            return kept * packed(x * column(scale, x) + column(shift, x), eps) + column(s, x) * eps

        def call(x, s, scale, shift, at=noise_of(images, draws)):  # noqa: B008 - bound now, in the loop
            return functional.add_noise(x, s, scale=scale, shift=shift, act=act, backend=backend, **at)

        for sigma in (torch.tensor(0.3), torch.rand(shape[0]) + 0.1):
            check_against_float64(call, model, (x, sigma, scale, shift), eps_like(x, images, draws), (shape, rows, layout, sigma))


@pytest.mark.usefixtures("gradients_of_small_inputs")
def test_noise_alone_passes_the_gradient_through(backend, rng):
    x, g = leaf(2, 3, 5), torch.randn(4, 3, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = functional.add_noise(x.to(dtype), 0.5, backend=backend, **noise_of(2, 2))
        assert torch.equal(torch.autograd.grad(y, x, g.to(dtype))[0], (g[:2].to(dtype) + g[2:].to(dtype)).float())


# --------------------------------------------------------------------------------------------------------- what is held for backward
def held(function, *args, **options):
    """Bytes of the storages that a call saves for backward, each counted once, and the addresses of the saved tensors."""
    storages, addresses = {}, set()

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        addresses.add(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*args, **options)  # noqa: F841 - alive until the sum is taken, so that no address comes twice
        return sum(storages.values()), addresses


SMALL = 4 + 8  # sigma and the seed


def test_a_noisy_layer_holds_what_the_plain_one_holds(backend, rng):
    w, b = leaf(4, 8, 3, 3), leaf(4)
    for x in (torch.randn(2, 8, 24, 24), leaf(2, 8, 24, 24)):
        bytes_plain, _ = held(plain.conv2d, x, w, b, padding=1)
        for draws in (1, 4):  # lazy packing: the images are held once, for all their draws
            bytes_noisy, addresses = held(functional.noisy_conv2d, x, w, b, 0.1, padding=1, backend=backend, **noise_of(2, draws))
            assert bytes_noisy == bytes_plain + SMALL and x.data_ptr() in addresses
    x, w = leaf(150, 32), leaf(5, 32)
    bytes_noisy, addresses = held(functional.noisy_linear, x, w, None, 0.1, seed=SEED, backend=backend)
    assert bytes_noisy == held(plain.linear, x, w)[0] + SMALL and x.data_ptr() in addresses


def test_a_small_layer_holds_its_noisy_input_in_place_of_the_clean_one(backend, rng):
    """Where that is faster: at most 16 KiB each."""
    kept = 0 if backend != "torch" else SMALL
    x, w, b = leaf(2, 8, 16, 16), leaf(4, 8, 3, 3), leaf(4)
    assert x.nbytes == autograd.STORED
    found, addresses = held(functional.noisy_conv2d, x, w, b, 0.1, padding=1, backend=backend, seed=SEED)
    assert found == held(plain.conv2d, x, w, b, padding=1)[0] + kept and (x.data_ptr() in addresses) == (backend == "torch")
    x, w = leaf(128, 32), leaf(5, 32)
    assert held(functional.noisy_linear, x, w, None, 0.1, seed=SEED, backend=backend)[0] == held(plain.linear, x, w)[0] + kept
    assert held(functional.add_noise, leaf(2, 8, 16, 16), 0.1, seed=SEED, backend=backend)[0] == kept


def test_noise_alone_holds_nothing(backend, rng):
    x, scale, shift = leaf(2, 8, 24, 24), torch.rand(8), torch.rand(8)
    assert held(functional.add_noise, x, 0.1, seed=SEED, backend=backend)[0] == SMALL
    # With ReLU the input, which the layer that made it holds as a rule.
    bytes_held, addresses = held(functional.add_noise, x, 0.1, seed=SEED, scale=scale, shift=shift, act="relu", backend=backend)
    assert bytes_held == SMALL + x.nbytes + scale.nbytes + shift.nbytes and x.data_ptr() in addresses


# ---------------------------------------------------------------------------------------------------------------- what would go wrong
def test_ops_without_a_derivative_refuse_forward_mode():
    """Below autograd the tangents would be lost, and every derivative be zero."""
    x, weight = torch.rand(2, 3, 4, 4), torch.rand(4, 3, 2, 2)
    for function in (
        lambda x: functional.add_noise_(x, 0.1, seed=1),
        lambda x: functional.activate_noise(x, 0.1, seed=1)[0],
        lambda x: functional.conv_activate_noise(x, weight, 0.1, seed=1),
    ):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))


def test_rows_that_are_neither_images_nor_draws_are_refused(backend):
    """A traced graph holds the number of images it was traced with; the kernels would read beyond a smaller batch."""
    args = torch.tensor(0.1), *NoiseAddress(SEED, 0, 4, 2)
    for rows in (1, 3, 5, 16):
        x = torch.zeros(rows, 3, 2, 2)
        with pytest.raises(ValueError, match=f"the input must have images=4 or draws . images=8 rows, got {rows}"):
            ops.add_noise(x, *args, None, None, False, backend)
        with pytest.raises(ValueError, match=f"the input must have .* rows, got {rows}"):
            ops.noisy_conv(x, torch.zeros(2, 3, 1, 1), None, *args, [1, 1], [0, 0], [1, 1], 1, backend)


@pytest.mark.usefixtures("gradients_of_small_inputs")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gradients_do_not_depend_on_the_default_type(dtype, backend):
    x, w, g = torch.rand(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 4, 4)
    sigma = torch.tensor(0.5, requires_grad=True)

    def found():
        return torch.autograd.grad(functional.noisy_conv2d(x, w, None, sigma, seed=1, backend=backend), sigma, g)[0]

    want = found()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(found(), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_noise_in_place_is_seen_by_autograd(backend):
    x, w = torch.rand(2, 3, 4, 4), torch.ones((), requires_grad=True)
    kept = (w * x).sum()
    functional.add_noise_(x, 0.1, seed=1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    with torch.inference_mode():
        functional.add_noise_(torch.rand(2, 3, 4, 4), 0.1, seed=1, backend=backend)  # which counts no versions
