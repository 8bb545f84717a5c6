"""The functions on any input: the value of the reference in float64, or an error that names the argument; inputs stay as they were."""

import math

import numpy as np
import pytest
import torch
from fuzzing import BAD_SEEDS, DTYPES, NO_COUNTS, SEEDS, THREADS, Unchanged, cases, integers, names, shapes, tensors
from hypothesis import event, given
from hypothesis import strategies as st

from rse_fast import functional, reference

pytestmark = pytest.mark.usefixtures("one_thread")  # which restores the number of threads that a case sets
WORD = 2**32
REAL = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit of the last place
LEAST = {torch.float64: 2.0**-1075, torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # the smallest number


# ---------------------------------------------------------------------------------------------------------------------- arguments
@st.composite
def addresses(draw, rows, channels, positions):
    """(images, keyword arguments of a right call) for an input of ``rows`` rows."""
    draws = draw(st.sampled_from([1, 1, 2, 3]))
    packed = rows % draws == 0 and draw(st.booleans())
    images = rows // draws if packed else rows
    options = {"seed": draw(SEEDS), "draws": draw(integers(st.just(draws)))}
    if packed or draw(st.booleans()):
        options["images"] = draw(integers(st.just(images)))

    def near(most):
        return integers(st.one_of(st.integers(0, 9), st.just(most), st.integers(max(0, most - 5), most), st.integers(0, most)))

    if draw(st.booleans()):
        options["stream"] = draw(near(WORD - 1))
    if draw(st.booleans()):
        options["image_offset"] = draw(near(WORD - images))
    if draw(st.booleans()):
        options["draw_offset"] = draw(near(WORD - draws))
    if draw(st.integers(0, 3)) == 0:
        ids = [[int(draw(near(WORD - 1))), int(draw(near(WORD - draws)))] for _ in range(images)]
        ids = torch.tensor(ids, dtype=torch.int64).reshape(images, 2)
        options["sample_ids"] = ids.t().contiguous().t() if draw(st.booleans()) else ids
    return images, draws, options


@st.composite
def sigmas(draw, channels, most=20.0):
    """sigma in any form, and its float64 values [channels] or []."""
    value = draw(st.one_of(st.sampled_from([0, 0.0, 1, 1.0, 0.1, most]), st.floats(0, most, width=32)))
    form = draw(st.sampled_from(["number", "numpy", "0-dim", "one", "float64", "bfloat16", "channels", "strided"]))
    if form == "number":
        return value, np.float64(value)
    if form == "numpy":
        return np.float32(value), np.float64(np.float32(value))
    if form in ("channels", "strided"):
        values = np.random.default_rng(draw(st.integers(0, 99))).random(channels).astype(np.float32) * np.float32(value)
        room = torch.zeros(channels, 2)
        room[:, 0] = torch.from_numpy(values)
        return (room[:, 0] if form == "strided" else torch.from_numpy(values.copy())), values.astype(np.float64)
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(form, torch.float32)
    tensor = torch.full((1,) if form == "one" else (), float(value), dtype=dtype)
    return tensor, np.float64(tensor.double().item())


BAD = {
    "x": st.sampled_from([None, 1.0, [1.0], np.zeros((2, 3)), torch.tensor(1.0), torch.zeros(3), torch.zeros(2, 3).int()])
    | st.sampled_from([torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3, dtype=torch.complex64), "x", torch.zeros(2, 3) > 0]),
    "sigma": st.sampled_from([-1.0, math.nan, math.inf, "1", None, True, [0.1], 1j, 10**400, torch.tensor(-1.0), torch.tensor(1)])
    | st.sampled_from([torch.tensor(math.nan), torch.ones(1, 1), torch.ones(41), torch.ones(0, 2), torch.tensor(1.0, device="meta")]),
    "seed": BAD_SEEDS,
    "stream": NO_COUNTS | st.sampled_from([-1, WORD, 2**70]),
    "images": st.sampled_from([True, 1.0, "2", [1], torch.tensor([1, 2])]) | st.sampled_from([-1, 99, 2**63, 2**70, -(2**70)]),
    "draws": NO_COUNTS | st.sampled_from([0, -1, -(2**70)]),
    "image_offset": NO_COUNTS | st.sampled_from([-1, WORD + 1, 2**64, 2**70]),
    "draw_offset": NO_COUNTS | st.sampled_from([-1, WORD + 1, 2**64, 2**70]),
    "sample_ids": st.sampled_from(
        [[[0, 0]], 3, torch.zeros(2, 2), torch.zeros(99, 2).long(), torch.zeros(2).long(), torch.tensor(0), "ids"]
    ),
    "backend": st.sampled_from([None, "", "cuda", 1, "CPU", b"cpu", ["cpu"]]),
}


def spoil(data, call: dict, bad: dict) -> str | None:
    """Replaces one argument of a right call by a wrong value, in a third of all cases; returns its name."""
    if data.draw(st.integers(0, 2), label="spoil"):
        return None
    name = data.draw(st.sampled_from(sorted(bad)), label="argument")
    call[name] = data.draw(bad[name], label="bad value")
    return name


def refused(function, call: dict, name: str) -> None:
    with Unchanged(*call.values()), pytest.raises((ValueError, TypeError)) as caught:
        function(**call)
    assert names(caught.value, name), f"{name} is not named: {caught.value}"
    event(f"refused: {name}")


# ---------------------------------------------------------------------------------------------------------------------- reference
def normals(shape, images, draws, options) -> np.ndarray:
    """eps of the contract, float64 [draws * images, C, *spatial], for samples of ``shape`` [C, *spatial]."""
    channels, spatial = shape[0], math.prod(shape[1:])
    seed, stream = int(options["seed"]), int(options.get("stream", 0))
    ids = options.get("sample_ids")
    if ids is None:
        offsets = int(options.get("image_offset", 0)), int(options.get("draw_offset", 0))
        eps = reference.gaussian(seed, stream, images, draws, channels, spatial, *offsets)
    else:
        one = [reference.gaussian(seed, stream, 1, draws, channels, spatial, i, d) for i, d in ids.tolist()]
        eps = np.stack(one, 1) if images else np.zeros(0)
        eps = eps.reshape(draws * images, spatial, channels)
    return eps.transpose(0, 2, 1).reshape(draws * images, *shape)


def per_channel(p, rank):
    return p if p is None or not np.ndim(p) else np.asarray(p).reshape(-1, *[1] * (rank - 2))


def in_range(value, dtype):
    """Float64 as the arithmetic of add_noise would hold it: beyond the largest number is infinite."""
    if dtype == torch.float64:
        return value
    return np.where(np.abs(value) > np.finfo(np.float32).max, np.copysign(np.inf, value), value)


def expected(x, sigma, eps, draws, scale=None, shift=None, act=None):
    """(value in float64, bound of the error) of add_noise without its rounding to a dtype; channels are dimension 1."""
    with np.errstate(all="ignore"):
        rank, a = x.dim(), x.double().resolve_neg().numpy()
        sigma = sigma if x.dtype == torch.float64 else np.float32(sigma).astype(np.float64)
        if a.shape[0] != eps.shape[0]:
            a = np.concatenate([a] * draws)
        terms = np.abs(a)
        if scale is not None:
            a = in_range(a * per_channel(scale, rank), x.dtype)
            terms = np.abs(a)
        if shift is not None:
            a = in_range(a + per_channel(shift, rank), x.dtype)
            terms = terms + np.abs(per_channel(shift, rank))
        if act == "relu":
            a = np.where(a > 0, a, np.where(np.isnan(a), a, 0.0))
        s = per_channel(sigma, rank)
        noise = s * eps
        value = a + noise
        unit = REAL[x.dtype if x.dtype == torch.float64 else torch.float32]
        # The normals agree to 1e-6; float64 starts from float32 uniforms as the reference does.
        bound = 8 * unit * (terms + np.abs(noise)) + (2e-6 if x.dtype != torch.float64 else 1e-12) * s + LEAST[torch.float32]
    return value, bound


def agree(got, value, bound, dtype):
    """Whether the tensor is the value, rounded once to its dtype, within the bound."""
    assert got.dtype == dtype and tuple(got.shape) == value.shape
    got = got.detach().double().resolve_neg().numpy()
    with np.errstate(all="ignore"):
        largest, unit = torch.finfo(dtype).max, REAL[dtype]
        exact = np.isnan(value) | np.isinf(value)
        assert np.array_equal(got[exact], value[exact], equal_nan=True), "what is not finite differs"
        room = bound + 2 * unit * (np.abs(value) + bound) + LEAST[dtype]
        edge = np.abs(value) + room >= largest  # may round to infinity
        right = (np.abs(got - value) <= room) | (edge & (np.sign(got) == np.sign(value)) & (np.abs(got) + room >= largest))
        assert right[~exact].all(), f"differs by {np.nanmax(np.where(exact | right, 0, np.abs(got - value)))}"


# -------------------------------------------------------------------------------------------------------------------------- tests
@st.composite
def affines(draw, channels):
    """scale or shift in any form, and its float64 values or None."""
    form = draw(st.sampled_from(["none", "none", "number", "0-dim", "channels"]))
    if form == "none":
        return None, None
    value = np.float32(draw(st.floats(-3, 3, width=32)))
    if form == "number":
        return float(value), np.float64(value)
    if form == "0-dim":
        return torch.tensor(value), np.float64(value)
    values = (np.random.default_rng(draw(st.integers(0, 99))).standard_normal(channels)).astype(np.float32)
    return torch.from_numpy(values), values.astype(np.float64)


@st.composite
def batches(draw):
    """(dtype, shape, x, images, draws, options): a batch of any rank, and which noise it gets."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes(2, 6))
    return dtype, shape, draw(tensors(shape, dtype)), *draw(addresses(shape[0], shape[1], math.prod(shape[2:])))


AFFINE = st.sampled_from(["1", True, [1.0], torch.ones(2, 2), torch.ones(41), torch.tensor(1), torch.tensor(1.0, device="meta")])


@cases(0.3)
@given(data=st.data())
def test_add_noise(data):
    dtype, shape, x, images, draws, options = data.draw(batches())
    channel_dim = data.draw(st.integers(1, len(shape) - 1)) if data.draw(st.booleans()) else 1
    channels = shape[channel_dim]
    sigma, sigma_values = data.draw(sigmas(channels))
    call = {"x": x, "sigma": sigma, **options}
    (scale, scale_values), (shift, shift_values) = data.draw(affines(channels)), data.draw(affines(channels))
    act = data.draw(st.sampled_from([None, None, "relu"]))
    call |= {
        "scale": scale,
        "shift": shift,
        "act": act,
        "channel_dim": channel_dim if data.draw(st.booleans()) else channel_dim - len(shape),
    }
    call["backend"] = data.draw(st.sampled_from(["auto", "torch", "auto" if dtype == torch.float64 else "cpu"]))
    torch.set_num_threads(data.draw(THREADS))
    bad = {"act": st.sampled_from(["gelu", 1, "", ["relu"]]), "channel_dim": st.sampled_from([0, 9, -9, 1.0, "1", None, True, 2**70])}
    name = spoil(data, call, {**BAD, **bad, "scale": AFFINE, "shift": AFFINE})
    if name is not None:
        return refused(functional.add_noise, call, name)
    with Unchanged(*call.values()):
        y = functional.add_noise(**call)
    if x.is_contiguous():
        assert y.is_contiguous()
    x, y = x.movedim(channel_dim, 1), y.movedim(channel_dim, 1)
    eps = normals(tuple(x.shape[1:]), images, draws, options)
    value, bound = expected(x, sigma_values, eps, draws, scale_values, shift_values, act)
    agree(y, value, bound, dtype)
    event(f"right: {dtype}, rank {len(shape)}")


@cases(0.1)
@given(data=st.data())
def test_add_noise_in_place(data):
    dtype, shape, x, images, draws, options = data.draw(batches())
    sigma, values = data.draw(sigmas(shape[1]))
    call = {"x": x, "sigma": sigma, **options, "backend": data.draw(st.sampled_from(["auto", "torch"]))}
    torch.set_num_threads(data.draw(THREADS))
    name = spoil(data, call, BAD)
    dense = x.is_contiguous() or (x.dim() > 2 and x.movedim(1, -1).is_contiguous())
    if name is None and (shape[0] != images * draws or not dense):
        name = "x"
    if name is not None:
        # Where the input cannot be written in place either, that may be said first.
        with Unchanged(*call.values()), pytest.raises((ValueError, TypeError)) as caught:
            functional.add_noise_(**call)
        assert names(caught.value, name) or names(caught.value, "x"), f"{name} is not named: {caught.value}"
        return
    before = x.clone()
    base = x.untyped_storage().nbytes()
    assert functional.add_noise_(**call) is x and x.untyped_storage().nbytes() == base
    agree(x, *expected(before, values, normals(shape[1:], images, draws, options), draws), dtype)


@cases(0.2)
@given(data=st.data())
def test_noisy_convolutions(data):
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
    spatial = data.draw(st.integers(1, 3))
    groups, inner, outer = (data.draw(st.sampled_from([1, 1, 2, 3])) for _ in range(3))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(spatial)]
    rows = data.draw(st.sampled_from([0, 1, 2, 3, 4, 6]))
    sides = [data.draw(st.integers(0, 7)) for _ in range(spatial)]
    x = data.draw(tensors((rows, inner * groups, *sides), dtype, special=False))
    weight = data.draw(tensors((outer * groups, inner, *kernel), dtype, special=False))
    bias = data.draw(st.none() | tensors((outer * groups,), dtype, special=False))
    images, draws, options = data.draw(addresses(rows, inner * groups, math.prod(sides)))
    sigma, values = data.draw(sigmas(inner * groups))
    stride, dilation = ([data.draw(st.integers(1, 2)) for _ in range(spatial)] for _ in range(2))
    padding = data.draw(st.sampled_from(["valid", "same"]) | st.lists(st.integers(0, 2), min_size=spatial, max_size=spatial))
    if padding == "same":
        stride = [1] * spatial
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    around = {"valid": [(0, 0)] * spatial, "same": [(t // 2, t - t // 2) for t in total]}.get(str(padding)) or [(p, p) for p in padding]
    call = {"x": x, "weight": weight, "bias": bias, "sigma": sigma, **options, "stride": stride, "padding": padding, "dilation": dilation}
    call |= {"groups": groups, "backend": data.draw(st.sampled_from(["auto", "torch"]))}
    function = functional.noisy_conv2d if spatial == 2 and data.draw(st.booleans()) else functional.noisy_conv
    torch.set_num_threads(data.draw(THREADS))
    bad = {
        **BAD,
        "weight": st.sampled_from(
            [None, 1.0, [1], torch.ones(3), torch.ones(2, 2), torch.ones(5, 41, *kernel), torch.tensor(1.0), weight.int()]
        ),
        "bias": st.sampled_from([1.0, [0.0], torch.ones(41), torch.tensor(1.0), torch.ones(outer * groups, device="meta", dtype=dtype)]),
        "stride": st.sampled_from([0, -1, 1.0, "1", None, [1] * 4, (), [0] * spatial, True]),
        "dilation": st.sampled_from([0, -1, 1.0, "1", None, [1] * 4, ()]),
        "padding": st.sampled_from([-1, 1.0, "full", None, [1] * 4, (), [-1] * spatial, ""]),
        "groups": st.sampled_from([0, -1, 1.0, "1", None, 41, True, [1]]),
    }
    name = spoil(data, call, bad)
    if name is None and any(n == 0 or n + sum(p) - t - 1 < 0 for n, p, t in zip(sides, around, total, strict=True)):
        name = "x"
    if name is not None:
        return refused(function, call, name) if name not in ("weight", "groups") else refused_as(function, call, ("weight", "groups", "x"))
    with Unchanged(*call.values()):
        y = function(**call)
    eps = normals(tuple(x.shape[1:]), images, draws, options)
    noisy, bound = expected(x, values, eps, draws)
    flat = [side for pair in reversed(around) for side in pair]
    run = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[spatial]

    def convolve(a, w, b):
        padded = torch.nn.functional.pad(torch.from_numpy(a), flat)
        return run(padded, w.double(), None if b is None else b.double(), stride=stride, dilation=dilation, groups=groups).numpy()

    wanted = convolve(noisy, weight, bias)
    size = convolve(np.abs(noisy) + bound, weight.abs(), None if bias is None else bias.abs())
    taps = math.prod(kernel) * inner + 2
    agree(y, wanted, (taps * REAL[dtype] + 4e-6 * (dtype != torch.float64)) * size + convolve(bound, weight.abs(), None), dtype)


def refused_as(function, call, any_of):
    """A wrong shape of one operand is told of either."""
    with Unchanged(*call.values()), pytest.raises((ValueError, TypeError)) as caught:
        function(**call)
    assert any(names(caught.value, name) for name in any_of), caught.value


@cases(0.1)
@given(data=st.data())
def test_noisy_linear(data):
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
    shape, out = data.draw(shapes(2, 5, 800)), data.draw(st.sampled_from([0, 1, 2, 5]))
    x, weight = data.draw(tensors(shape, dtype, special=False)), data.draw(tensors((out, shape[-1]), dtype, special=False))
    bias = data.draw(st.none() | tensors((out,), dtype, special=False))
    images, draws, options = data.draw(addresses(shape[0], shape[-1], math.prod(shape[1:-1])))
    sigma, values = data.draw(sigmas(shape[-1]))
    call = {"x": x, "weight": weight, "bias": bias, "sigma": sigma, **options, "backend": data.draw(st.sampled_from(["auto", "torch"]))}
    torch.set_num_threads(data.draw(THREADS))
    bad = {"weight": st.sampled_from([None, 1.0, [1], torch.ones(3), torch.ones(2, 41), torch.tensor(1.0), weight.int(), weight[None]])}
    name = spoil(data, call, {**BAD, **bad, "bias": st.sampled_from([1.0, [0.0], torch.ones(41), torch.tensor(1.0)])})
    if name is not None:
        return refused_as(functional.noisy_linear, call, (name, "weight") if name == "x" else (name,))
    with Unchanged(*call.values()):
        y = functional.noisy_linear(**call)
    moved = x.movedim(-1, 1)
    noisy, bound = expected(moved, values, normals(tuple(moved.shape[1:]), images, draws, options), draws)
    noisy, bound = np.moveaxis(noisy, 1, -1), np.moveaxis(np.broadcast_to(bound, noisy.shape), 1, -1)
    w, b = weight.double().resolve_neg().numpy(), 0.0 if bias is None else bias.double().resolve_neg().numpy()
    size = (np.abs(noisy) + bound) @ np.abs(w).T + np.abs(b)
    agree(y, noisy @ w.T + b, ((shape[-1] + 2) * REAL[dtype] + 4e-6 * (dtype != torch.float64)) * size + bound @ np.abs(w).T, dtype)


@cases(0.06)
@given(data=st.data())
def test_gradients_of_the_noise(data):
    """x's gradient is that of the draws of each image together, sigma's the sum of g * eps."""
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    shape = data.draw(shapes(2, 5, 600))
    x = data.draw(tensors(shape, dtype, special=False)).clone().requires_grad_()
    images, draws, options = data.draw(addresses(shape[0], shape[1], math.prod(shape[2:])))
    kind = data.draw(st.sampled_from(["scalar", "channels"]))
    # Without a gradient of sigma, small inputs take a way of their own.
    sigma = torch.full((shape[1],) if kind == "channels" else (), 0.5, requires_grad=data.draw(st.booleans()))
    backend = data.draw(st.sampled_from(["auto", "torch"]))
    torch.set_num_threads(data.draw(THREADS))
    y = functional.add_noise(x, sigma, **options, backend=backend)
    g = data.draw(tensors(tuple(y.shape), dtype, special=False))
    with Unchanged(x.detach(), g):
        of_x, *of_sigma = torch.autograd.grad(y, (x, sigma) if sigma.requires_grad else (x,), g)
    assert of_x.shape == x.shape and all(found.shape == sigma.shape for found in of_sigma)
    rows = g.double().resolve_neg().numpy()
    wanted = rows if y.shape[0] == shape[0] else rows.reshape(draws, *shape).sum(0)
    size = np.abs(rows) if y.shape[0] == shape[0] else np.abs(rows).reshape(draws, *shape).sum(0)
    agree(of_x, wanted, 4 * REAL[dtype] * size, dtype)
    if not of_sigma:
        return
    eps = normals(shape[1:], images, draws, options)
    over = tuple(d for d in range(len(shape)) if d != 1 or kind == "scalar")
    product = (rows * eps).sum(over)
    agree(of_sigma[0], np.asarray(product), np.asarray((np.abs(rows) * (1e-6 + 4e-7 * np.abs(eps))).sum(over) + 1e-9), torch.float32)


@cases(0.04)
@given(data=st.data())
def test_bytes(data):
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int32)))
    shape = data.draw(shapes(2, 5))
    x = data.draw(tensors(shape, torch.float32)).nan_to_num(5.0, 200.0, -200.0).clamp(0, 255).to(dtype)
    images, draws, options = data.draw(addresses(shape[0], shape[1], math.prod(shape[2:])))
    sigma, values = data.draw(sigmas(shape[1], most=30.0))
    step, zero_point = data.draw(st.floats(0.25, 8, width=32)), data.draw(st.integers(0, 255))
    call = {
        "x": x,
        "sigma": sigma,
        "step": step,
        "zero_point": zero_point,
        **options,
        "backend": data.draw(st.sampled_from(["auto", "torch"])),
    }
    torch.set_num_threads(data.draw(THREADS))
    bad = {
        **BAD,
        "step": st.sampled_from([0, -1.0, math.nan, math.inf, "1", None, True, 1j]),
        "zero_point": st.sampled_from([-1, 256, 1.0, None]),
    }
    bad["x"] = st.sampled_from([None, 1.0, torch.zeros(3), torch.zeros(2, 3).bool(), torch.tensor(1), torch.zeros(2, 3).double()])
    name = spoil(data, call, bad)
    if name is not None:
        return refused(functional.add_noise_u8, call, name)
    with Unchanged(*call.values()):
        y = functional.add_noise_u8(**call)
    value, bound = expected(x.to(torch.float32), values, normals(shape[1:], images, draws, options), draws)
    value, bound = value / step + zero_point, bound / step + 1e-4
    assert y.dtype == torch.uint8 and tuple(y.shape) == value.shape
    assert (np.abs(y.double().resolve_neg().numpy() - np.clip(value, 0, 255)) <= 0.5 + bound).all()
