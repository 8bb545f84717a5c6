"""The noise contract: Philox words, uniforms and normals of every backend, and what add_noise makes of every input.

Expected values are float64: numpy's eps, and exact arithmetic on the float32 inputs. `bound` says how far float32 may stray from
them; a result must lie between the roundings of both ends, so a narrow dtype may differ from the float64 result rounded once only
where that lies within the float32 error of a rounding boundary.
"""

import ctypes
import functools
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rse_fast import functional, ops, reference
from rse_fast.address import NoiseAddress
from rse_fast.layout import layout, packed_like

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPATIAL = [(), (1,), (2,), (5,), (16,), (17,), (3, 3), (7, 5), (33, 2), (3, 4, 5)]
KATS = [
    {name: np.array([int(word, 16) for word in text.split()], np.uint32) for name, text in vector.items()}
    for vector in json.loads(Path(__file__).parents[1].joinpath("helpers", "kat_philox.json").read_text())["vectors"]
]
TOP = 2**32
pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ expected values and their bound
@functools.lru_cache(maxsize=64)
def eps_rows(seed, stream, images, draws, shape, image_offset=0, draw_offset=0):
    """numpy's eps as a float64 tensor [draws * images, C, *spatial] for samples of ``shape`` (C, *spatial)."""
    z = reference.gaussian(seed, stream, images, draws, shape[0], math.prod(shape[1:]), image_offset, draw_offset)
    return torch.from_numpy(z).movedim(-1, 1).reshape(-1, *shape)


def column(value, x):
    value = torch.as_tensor(value, dtype=torch.float64)
    return value.reshape(-1, *[1] * (x.dim() - 2)) if value.dim() else value


def bound(x, sigma, eps, scale=None, shift=None, relu=False):
    """The float64 result of add_noise on ``x`` (one row for each of eps), and how far float32 arithmetic may be from it.

    Every operation of a float32 evaluation rounds by at most 2^-24 of its result (and 2^-150 where that is subnormal): the product
    and the sum of the affine part, two products that bring sigma in, the last sum. eps itself is within 1e-6. Float64 input is
    computed in float64, eps within 1e-12.
    """
    exact = x.dtype == torch.float64
    rounding, normal = (2.0**-53, 1e-12) if exact else (2.0**-24, 1e-6)
    x, sigma = x.double(), column(sigma, x)
    product = x if scale is None else x * column(scale, x)
    value = product if shift is None else product + column(shift, x)
    value = value.relu() if relu else value
    noise = sigma * eps
    result = value + noise
    error = sigma * normal + rounding * 1.001 * (product.abs() + value.abs() + 2 * noise.abs() + result.abs()) + 5 * 2.0**-150
    return result, torch.where(result.isfinite(), error, 0.0)


def check(y, dtype, result, error, what):
    """``y`` lies between ``result -+ error``, each rounded to float32 and then to ``dtype``: rounding keeps the order."""
    assert y.dtype == dtype and y.shape == result.shape, (what, y.dtype, y.shape)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    low, high = ((result + sign * error).to(real).to(dtype).double() for sign in (-1, 1))
    y = y.double()
    wrong = ~((low <= y) & (y <= high)) & ~(y.isnan() & result.isnan())
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        pytest.fail(f"{what}: {int(wrong.sum())} of {y.numel()} wrong, at {at} {y[at]}, expected {low[at]} .. {high[at]}")


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.fixture
def poisoned(monkeypatch):
    """Fills every output with NaN before the kernel runs: an element that is not written shows."""
    for module in ("noise", "reference"):
        monkeypatch.setattr(f"rse_fast.{module}.packed_like", lambda x, rows: packed_like(x, rows).fill_(math.nan))


# --------------------------------------------------------------------------------------------------- words, uniforms, Box-Muller
def sample(library, seed, stream, image, draw, quad, count, given=None):
    """Words, uniforms (u, v, u, v) and normals [count, 4] of quads ``quad ..`` by the unit in use."""
    plane = functools.partial(np.empty, (4, count))
    words, uniforms, normals = plane(np.uint32), plane(np.float32), plane(np.float32)
    function, pointer = library.handle.rse_sample, ctypes.c_void_p
    function.argtypes = (pointer, *[ctypes.c_uint32] * 3, *[ctypes.c_int64] * 2, *[pointer] * 4)
    function.restype = None
    seed = np.array([seed % 2**64], np.uint64)
    given = None if given is None else np.ascontiguousarray(given.T)
    arrays = (None if a is None else a.ctypes.data for a in (given, words, uniforms, normals))
    function(seed.ctypes.data, stream, image, draw, quad, count, *arrays)
    return words.T, uniforms.T, normals.T


def box_muller(words):
    """Float64 normals [..., 4] of uint32 words [..., 4]."""
    u, v = (a.astype(np.float64) for a in reference.uniforms(words))
    radius = np.sqrt(-2 * np.log(u))
    return np.stack([radius * np.cos(np.pi * v), radius * np.sin(np.pi * v)], -1).reshape(words.shape)


@pytest.mark.parametrize("kat", KATS, ids=("zeros", "ones", "pi"))
def test_known_answers_numpy(kat):
    assert np.array_equal(reference.philox(kat["counter"], kat["key"]), kat["words"])


@pytest.mark.parametrize("kat", KATS, ids=("zeros", "ones", "pi"))
def test_known_answers_torch(kat):
    tensors = lambda words: [torch.tensor(int(word)) for word in words]  # noqa: E731
    assert [int(word) for word in reference._philox(tensors(kat["counter"]), tensors(kat["key"]))] == kat["words"].tolist()


@pytest.mark.parametrize("kat", KATS, ids=("zeros", "ones", "pi"))
def test_known_answers_cpu(kat, unit, library):
    quad, image, draw, stream = map(int, kat["counter"])
    seed = int(kat["key"][0]) + (int(kat["key"][1]) << 32)
    places = [i for i in range(64) if 0 <= quad - i <= TOP - 64]  # the vector sits in every lane in turn
    assert places
    for i in places:
        words, _, _ = sample(library, seed, stream, image, draw, quad - i, 64)
        assert words[i].tolist() == kat["words"].tolist(), i


def test_words_and_uniforms_are_bit_identical(unit, library, rng):
    for case in range(12):
        stream, image, draw = (int(w) for w in rng.integers(0, TOP, 3))
        seed, quad = int(rng.integers(0, 2**64, dtype=np.uint64)), int(rng.integers(0, TOP - 1024))
        if case < 2:
            stream = image = draw = TOP - 1
            quad = (0, TOP - 1024)[case]
        counter = np.empty((1024, 4), np.uint32)
        counter[:, 0] = quad + np.arange(1024)
        counter[:, 1:] = image, draw, stream
        key = np.array([seed % TOP, seed >> 32], np.uint32)
        expected = reference.philox(counter, key)
        words, uniforms, normals = sample(library, seed, stream, image, draw, quad, 1024)
        assert np.array_equal(words, expected)
        u, v = reference.uniforms(expected)
        assert np.array_equal(uniforms[:, 0::2], u) and np.array_equal(uniforms[:, 1::2], v)
        assert np.abs(normals - box_muller(expected)).max() <= 1e-6
        as_int64 = lambda words: torch.from_numpy(words.astype(np.int64)).unbind(-1)  # noqa: E731
        assert np.array_equal(torch.stack(reference._philox(as_int64(counter), as_int64(key)), -1).numpy(), expected.astype(np.int64))


def edges(rng, count):
    """Words where conversions round, where ln or cos and sin change their interval, and random ones."""
    near = np.arange(-64, 64)
    powers = np.concatenate([2**k + near for k in range(8, 33)])  # a power of two, and ties of the conversion to float32 beside it
    slices = np.concatenate([(k << 27) + near for k in range(32)])  # multiples of pi / 32
    mantissas = np.concatenate([((32 + k) << e) + np.arange(-4, 4) for k in range(32) for e in range(8, 27)])
    ends = np.concatenate([np.arange(4096), TOP - 1 - np.arange(4096)])
    fixed = np.concatenate([powers, slices, mantissas, ends]) % TOP
    return np.concatenate([fixed, rng.integers(0, TOP, -(-len(fixed) // 16) * 16 - len(fixed) + count)]).astype(np.uint32)


def test_normals_of_all_kinds_of_words(unit, library, rng):
    radii, angles = edges(rng, 2**20), edges(rng, 2**20)
    words = np.empty((len(radii) // 2 // 16 * 16, 4), np.uint32)
    worst = 0.0
    for _ in range(2):  # random partners, then every kind beside every kind
        words[:, 0::2], words[:, 1::2] = (a[rng.permutation(len(a))[: words.size // 2]].reshape(-1, 2) for a in (radii, angles))
        given, uniforms, normals = sample(library, 0, 0, 0, 0, 0, len(words), given=words)
        assert np.array_equal(given, words)
        u, v = reference.uniforms(words)
        assert np.array_equal(uniforms[:, 0::2], u) and np.array_equal(uniforms[:, 1::2], v)
        worst = max(worst, np.abs(normals - box_muller(words)).max())
    # An error of the radius counts most where the radius is large: there the worst radii, of either sign, beside many angles.
    words = np.zeros((2**17, 4), np.uint32)
    words[:, 0] = np.arange(2**17)  # radii from 6.77 down to 4.56; the angle 0 shows the radius itself
    _, _, normals = sample(library, 0, 0, 0, 0, 0, len(words), given=words)
    error = normals[:, 0] - box_muller(words)[:, 0]
    radii = np.concatenate([np.argsort(error)[:8], np.argsort(-error)[:8]]).astype(np.uint32)
    angles = edges(rng, 2**18)
    exact = np.pi * reference.uniforms(np.stack([angles, angles], -1))[1][:, 0].astype(np.float64)
    cos, sin = np.cos(exact), np.sin(exact)
    words = np.stack([angles] * 4, -1)
    for pair in radii.reshape(-1, 2):
        words[:, 0::2] = pair
        _, _, normals = sample(library, 0, 0, 0, 0, 0, len(words), given=words)
        radius = np.sqrt(-2 * np.log(reference.uniforms(words[:1])[0][0].astype(np.float64)))
        for lane, r in zip((0, 2), radius, strict=True):
            worst = max(worst, np.abs(normals[:, lane] - r * cos).max(), np.abs(normals[:, lane + 1] - r * sin).max())
    print(f"{unit}: largest error of a normal {worst:.3g}")
    assert worst <= 1e-6


def test_a_uniform_of_one_gives_exactly_zero(unit, library, rng):
    words = rng.integers(0, TOP, (1024, 4)).astype(np.uint32)
    words[:, 0::2] = TOP - 1 - rng.integers(0, 128, (1024, 2))  # fl(w) = 2^32
    _, uniforms, normals = sample(library, 0, 0, 0, 0, 0, len(words), given=words)
    assert (uniforms[:, 0::2] == 1).all() and (normals == 0).all()
    words[:, 0::2] -= 256  # fl(w) = 2^32 - 256, u = 1 - 2^-24: the smallest radius above 0
    _, uniforms, normals = sample(library, 0, 0, 0, 0, 0, len(words), given=words)
    assert (uniforms[:, 0::2] < 1).all()
    np.testing.assert_allclose(normals, box_muller(words), rtol=0, atol=2**-11.5 * 2**-22)  # relative to the radius, not to 1


# -------------------------------------------------------------------------------------------------------- add_noise: where eps goes
@pytest.mark.parametrize("channels", (1, 3, 4, 5, 6, 8, 64, 129))
def test_normals_of_every_shape(backend, channels, poisoned, rng):
    seed = int(rng.integers(0, 2**63))
    for spatial, rows in itertools.product(SPATIAL, (0, 1, 3)):
        shape = (channels, *spatial)
        eps = eps_rows(seed, 5, 3, 1, shape)[:rows]
        for lay in (torch.clone, channels_last):
            y = functional.add_noise(lay(torch.zeros(rows, *shape)), 1.0, seed=seed, stream=5, backend=backend)
            assert y.shape == eps.shape and y.dtype == torch.float32
            assert not rows or (y - eps).abs().max() <= 1e-6, (shape, rows, lay)


@pytest.mark.parametrize("draws", (1, 2, 5))
def test_every_dtype_and_option(backend, draws, poisoned, rng):
    seed = int(rng.integers(0, 2**63))
    shapes = ((3, 7, 5), (8, 33, 2), (5, 17), (64, 3, 3), (12,), (6, 3, 4, 5))
    for shape, dtype in itertools.product(shapes, (*DTYPES, torch.float64) if backend == "torch" else DTYPES):
        channels = shape[0]
        clean = torch.randn(2, *shape, dtype=torch.float64).to(dtype)
        vectors = [torch.rand(channels) + 0.01, torch.randn(channels), torch.randn(channels)]
        eps = eps_rows(seed, 1, 2, draws, shape)
        for per_channel, affine, relu, lazy, lay in itertools.product((0, 1), (0, 1), (0, 1), (0, 1), (torch.clone, channels_last)):
            sigma = vectors[0] if per_channel else vectors[0][0]
            scale, shift = vectors[1:] if affine else (None, None)
            packed = torch.cat([clean] * draws)
            x = lay(clean if lazy else packed)
            options = {"scale": scale, "shift": shift, "act": "relu" if relu else None}
            y = functional.add_noise(x, sigma, seed=seed, stream=1, images=2, draws=draws, backend=backend, **options)
            what = (shape, dtype, per_channel, affine, relu, lazy, lay)
            check(y, dtype, *bound(packed, sigma, eps, scale, shift, relu), what)
            assert layout(y) == layout(x), what


def test_scale_and_shift_alone(backend, rng):
    x, eps = torch.randn(2, 6, 9), eps_rows(7, 0, 2, 1, (6, 9))
    values = torch.randn(6)
    for scale, shift in ((values, None), (None, values), (1.5, None), (None, -0.25), (torch.tensor(2.0), torch.tensor([0.5]))):
        y = functional.add_noise(x, 0.3, seed=7, scale=scale, shift=shift, backend=backend)
        check(y, x.dtype, *bound(x, 0.3, eps, scale, shift), (scale, shift))


def layouts():
    """Name, a function that lays a dense [N, C, *spatial] tensor out, the copies that add_noise may make of it, layout of the output."""
    return [
        ("contiguous", lambda x: x.contiguous(), 0, "planar"),
        ("channels last", channels_last, 0, "flat"),
        ("rows of a larger tensor", lambda x: torch.cat([x[:1], x])[1:], 0, "planar"),
        ("rows of a larger channels-last tensor", lambda x: channels_last(torch.cat([x[:1], x]))[1:], 0, "flat"),
        ("an odd offset", lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape), 0, "planar"),
        ("every second row", lambda x: x.repeat_interleave(2, 0)[::2], 1, "planar"),
        ("channels of a larger tensor", lambda x: torch.cat([x[:, :1], x, x[:, :1]], 1)[:, 1:-1], 1, "planar"),
        ("channels of a larger channels-last tensor", lambda x: channels_last(torch.cat([x, x], 1))[:, : x.shape[1]], 1, "planar"),
        ("transposed spatial dimensions", lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2), 1, "planar"),
        ("transposed rows and channels", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), 1, "planar"),
        ("expanded rows", lambda x: x[:1].expand(x.shape), 1, "planar"),
        ("expanded channels", lambda x: x[:, :1].expand(x.shape), 1, "planar"),
        ("expanded from one value", lambda x: x.flatten()[0].expand(x.shape), 1, "planar"),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_memory_layout_with_no_more_copies_than_needed(backend, dtype, poisoned, rng):
    for shape in ((3, 5, 7), (8, 4, 6), (4, 2, 3, 5)):
        dense = torch.randn(3, *shape).to(dtype)
        eps, sigma, seed = eps_rows(11, 0, 3, 2, shape), torch.tensor(0.5), torch.tensor(11)
        for name, lay, copies, out in layouts():
            x = lay(dense)
            before = x.clone()
            with torch.autograd.profiler.profile(use_kineto=False, record_shapes=True) as profile:
                y = functional.add_noise(x, sigma, seed=seed, images=3, draws=2, backend=backend)
            check(y, dtype, *bound(torch.cat([x, x]), sigma, eps), (name, shape))
            assert layout(y) == out, (name, shape)
            assert torch.equal(x, before), name
            if backend == "cpu":
                made = [e for e in profile.function_events if e.name == "aten::copy_" and e.input_shapes[0] == list(x.shape)]
                assert len(made) == copies, (name, shape)


def test_any_channel_dimension(backend, rng):
    for shape in ((4, 6, 5), (2, 3, 4, 5), (3, 7)):
        for dim in range(1, len(shape)):
            x = torch.randn(shape)
            moved = x.movedim(dim, 1)
            expected, error = bound(moved, 0.3, eps_rows(3, 0, shape[0], 1, tuple(moved.shape[1:])))
            for named in (dim, dim - len(shape)):
                y = functional.add_noise(x, 0.3, seed=3, channel_dim=named, backend=backend)
                check(y, x.dtype, expected.movedim(1, dim), error.movedim(1, dim), (shape, named))
                assert y.is_contiguous(), (shape, named)


def test_counters_up_to_their_top(backend, rng):
    shape = (5, 19)
    x = torch.zeros(3, *shape)
    corners = ((TOP - 3, TOP - 2, TOP - 1), (TOP - 3, 0, 0), (0, TOP - 2, 0), (0, 0, TOP - 1), (2**31 - 1, 2**31 - 1, 2**31))
    for image_offset, draw_offset, stream in corners:
        address = dict(stream=stream, images=3, draws=2, image_offset=image_offset, draw_offset=draw_offset)
        y = functional.add_noise(x, 1.0, seed=1, **address, backend=backend)
        assert (y - eps_rows(1, stream, 3, 2, shape, image_offset, draw_offset)).abs().max() <= 1e-6, (image_offset, draw_offset, stream)


def test_seeds_of_every_kind(backend, rng):
    x = torch.zeros(2, 4, 20)
    for seed in (0, 1, -1, -5, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), int(rng.integers(0, 2**63))):
        expected = eps_rows(seed % 2**64, 0, 2, 1, (4, 20))
        signed = (seed + 2**63) % 2**64 - 2**63
        for given in (seed, torch.tensor(signed), torch.tensor([signed]), np.int64(signed)):
            y = functional.add_noise(x, 1.0, seed=given, backend=backend)
            assert (y - expected).abs().max() <= 1e-6, given


def test_each_image_may_have_its_own_place(backend, poisoned, rng):
    sample_ids = torch.tensor([[9, 4], [TOP - 1, 0], [9, TOP - 3], [0, 7]])
    for shape in ((3, 5, 7), (8, 300), (6,)):
        for lay in (torch.clone, channels_last):
            x = lay(torch.randn(4, *shape))
            y = functional.add_noise(x, 0.7, seed=5, images=4, draws=3, sample_ids=sample_ids, backend=backend)
            eps = torch.stack([eps_rows(5, 0, 1, 3, shape, *place) for place in sample_ids.tolist()], 1).flatten(0, 1)
            check(y, x.dtype, *bound(torch.cat([x] * 3), 0.7, eps), (shape, lay))


# ----------------------------------------------------------------------------------------------------- add_noise: values and rounding
def all_patterns(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def same_values(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0, math.inf, -math.inf), b.nan_to_num(0.0, math.inf, -math.inf))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_value_of_a_narrow_dtype_passes_through(backend, dtype, rng):
    # sigma 0: infinities, NaN and subnormals included, in vectors and in the remainder of one.
    values = all_patterns(dtype)
    for x in (values.view(2, 8, -1), channels_last(values.view(2, 8, -1)), values[:-1].view(5, 3, -1)):
        y = functional.add_noise(x, 0.0, seed=3, backend=backend)
        assert same_values(y, x)
        relu = functional.add_noise(x, torch.zeros(x.shape[1]), seed=3, act="relu", backend=backend)
        assert same_values(relu, x.relu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rounding_to_nearest_even(backend, dtype, rng):
    """Any float32 value comes out rounded once: ties, overflow, subnormals, infinities, NaN. It goes in as the shift of a channel."""
    values = [torch.from_numpy(rng.integers(0, TOP, 2**18, dtype=np.uint32)).view(torch.float32)]  # any exponent
    if dtype != torch.float32:
        grid = all_patterns(dtype).float()
        following = torch.nextafter(all_patterns(dtype), torch.tensor(math.inf, dtype=dtype)).float()
        ties = (grid.double() + following.double()).div(2).float()  # exact in float32 wherever both are finite
        down, up = (torch.nextafter(ties, torch.tensor(sign * math.inf)) for sign in (-1, 1))
        values += [grid, ties, down, up, torch.tensor([65519.996, 65520.0, -65520.0, 3.3961775e38, -3.4e38])]
    values = torch.cat(values)
    values = values[: len(values) // 4 * 4]
    for relu in (False, True):
        y = functional.add_noise(
            torch.zeros(1, len(values), dtype=dtype), 0.0, seed=3, shift=values, act="relu" if relu else None, backend=backend
        )
        assert same_values(y[0], (values.relu() if relu else values).to(dtype))


def test_sigma_zero_gives_the_clean_value_exactly(backend, rng):
    for dtype in DTYPES:
        x = torch.randn(2, 12, 50).to(dtype)
        scale, shift = torch.full((12,), 2.0), torch.randn(12)  # 2 x is exact: the sum is the only rounding, fused or not
        expected = (x.double() * 2 + shift[:, None].double()).relu().float().to(dtype)
        y = functional.add_noise(x, 0.0, seed=3, scale=scale, shift=shift, act="relu", backend=backend)
        assert torch.equal(y, expected), dtype
        some = torch.arange(12) % 3 * 0.1
        y = functional.add_noise(x, some, seed=3, backend=backend)
        assert torch.equal(y[:, ::3], x[:, ::3]) and not torch.equal(y[:, 1], x[:, 1]), dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_meet_noise(backend, dtype, poisoned, rng):
    least = torch.finfo(dtype).smallest_normal
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, least / 2, -least / 4, torch.finfo(dtype).max, -1.0, 1.0]).to(dtype)
    for shape in ((4, 25), (3, 7, 5)):
        x = special.repeat(math.prod(shape) * 2 // 10 + 1)[: 2 * math.prod(shape)].view(2, *shape)
        for relu, sigma in itertools.product((False, True), (0.1, 1e-30, least, least / 8, 3 * 2.0**-38)):
            y = functional.add_noise(x, sigma, seed=3, act="relu" if relu else None, backend=backend)
            check(y, dtype, *bound(x, float(np.float32(sigma)), eps_rows(3, 0, 2, 1, shape), relu=relu), (shape, relu, sigma))


def test_large_and_small_sigma(backend, rng):
    x, eps = torch.randn(2, 8, 40), eps_rows(3, 0, 2, 1, (8, 40))
    for sigma in (1e-4, 0.1, 3.0, 1e4, 1e30):
        for dtype in (torch.float32, torch.bfloat16):
            y = functional.add_noise(x.to(dtype), sigma, seed=3, backend=backend)
            check(y, dtype, *bound(x.to(dtype), float(np.float32(sigma)), eps), (sigma, dtype))


def test_rounding_once_is_seen_by_this_test(rng):
    # What `check` is worth: rounding twice or truncating must fail it.
    x = torch.randn(4, 8, 64).to(torch.bfloat16)
    result, error = bound(x, 0.5, eps_rows(3, 0, 4, 1, (8, 64)))
    truncated = (result.float().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
    twice = (result - x.double()).to(torch.bfloat16) + x
    for wrong in (truncated, twice):
        with pytest.raises(pytest.fail.Exception, match="wrong"):
            check(wrong, torch.bfloat16, result, error, "")
    check(result.float().to(torch.bfloat16), torch.bfloat16, result, error, "")


# ------------------------------------------------------------------------------------------------------------------------- sigma_grad
def test_sigma_grad_sums_what_add_noise_added(backend, rng):
    for shape, dtype, lay in itertools.product(((3, 5, 7), (8, 33), (6,)), DTYPES, (torch.clone, channels_last)):
        g = lay(torch.randn(6, *shape).to(dtype))
        terms = g.double() * eps_rows(9, 2, 3, 2, shape)
        for per_channel in (False, True):
            s = ops.sigma_grad(g, *NoiseAddress(torch.tensor(9), 2, 3, 2), per_channel, backend)
            over = [d for d in range(g.dim()) if d != 1 or not per_channel]
            # Terms within 1e-6 |g| (eps) and one float32 rounding of the product, summed in float64, rounded once at the end.
            error = (1e-6 * g.double().abs() + 2.0**-23 * terms.abs()).sum(over) + 2.0**-24 * terms.sum(over).abs()
            assert s.dtype == torch.float32 and s.shape == error.shape
            assert ((s - terms.sum(over)).abs() <= error).all(), (shape, dtype, lay, per_channel)
