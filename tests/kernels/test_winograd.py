"""The CPU library's Winograd convolution against float64, its noise against the contract, its laws of equal bits, and what it may touch."""

import itertools

import pytest
import torch
from torch.nn.functional import conv2d
from winograd_bound import bound, matrices, of_bytes, tiles, transformed

from rse_fast import reference
from rse_fast.address import NoiseAddress
from rse_fast.kernels import cpu
from rse_fast.kernels.cpu import winograd

SEED = torch.tensor(-(2**40) - 77)


def address(images, draws=1, image_offset=3, draw_offset=2, sample_ids=None, stream=9):
    return NoiseAddress(SEED, stream, images, draws, image_offset, draw_offset, sample_ids)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def poisoned(*shape, dtype=torch.float32):
    return channels_last(torch.full(shape, float("nan"), dtype=dtype))


def convolved(x, weight, tile=4, padding=1, *, products=torch.float32, packed=None, rows=None, **arguments):
    """The result, and the clean output where ``clean`` is true. ``weight`` [outputs, inputs, 3, 3] is transformed here, unless ``packed``
    is what the kernel reads."""
    height, width = (side // (1 + arguments.get("pool", False)) for side in x.shape[2:])
    at = arguments.get("at")
    rows = len(x) if at is None else at.images * at.draws
    out = poisoned(rows, len(weight), height + 2 * padding - 2, width + 2 * padding - 2, dtype=x.dtype)
    if arguments.pop("clean", False):
        arguments["clean"] = poisoned(*x.shape[:2], height, width, dtype=x.dtype)
    packed = winograd.transform_weight(weight, tile, products) if packed is None else packed
    winograd.convolution(x, packed, out, padding, **arguments)
    return (out, arguments["clean"]) if "clean" in arguments else out


def noisy_input(x, at=None, sigma=None, scale=None, shift=None, relu_in=False, pool=False):
    """What is convolved: float32, of float32 roundings that are the kernel's own, packed."""
    images, draws = (len(x), 1) if at is None else (at.images, at.draws)
    at, sigma = (at or address(images), torch.zeros(1) if sigma is None else sigma)
    height, width = (side // (1 + pool) for side in x.shape[2:])
    out = poisoned(images * draws, x.shape[1], height, width)
    cpu.add_noise(channels_last(x.float()), out, True, sigma, at, scale, shift, relu_in, pool=pool)
    return out


# ---------------------------------------------------------------------------------------------------------------------------- theory
@pytest.mark.parametrize("tile", (2, 4))
def test_the_matrices_make_a_convolution(tile, rng):
    z, weight = torch.randn(2, 3, 7, 9, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    for padding in (0, 1, 2):
        assert (transformed(z, weight, tile, padding) - conv2d(z, weight, padding=padding)).abs().max() <= 1e-11
    assert (winograd.filter_matrix(tile) - matrices(tile)[1]).abs().max() <= 1e-15
    for m in (matrices(tile)[0], matrices(tile)[2]):
        assert torch.equal(m.float().double(), m)  # exact in float32
    a, g, b = matrices(tile)
    assert (winograd.input_matrix(tile) - b).abs().max() <= 1e-15
    v = winograd.transform_input(z, tile, 1)
    assert (v - torch.einsum("pi,nctsij,qj->pqntsc", b, tiles(z, tile, 1), b).reshape(v.shape)).abs().max() <= 1e-12
    u = winograd.transformed_weight(weight, tile)
    assert (u - torch.einsum("pi,ocij,qj->pqoc", g, weight, g).reshape(u.shape)).abs().max() <= 1e-12


# --------------------------------------------------------------------------------------------------------------------------- results
SIDES = [(1, 1), (2, 3), (3, 2), (4, 4), (5, 8), (6, 1), (7, 7), (8, 5), (9, 13), (13, 6), (12, 11), (10, 10)]
CHANNELS = [(1, 3), (3, 64), (5, 1), (64, 5), (129, 129), (64, 64), (1, 1), (3, 129), (129, 3), (5, 5), (64, 129), (5, 64)]


def convolutions(dtype):
    """(x, weight, bias, padding, what stands before the convolution) of every side and every number of channels."""
    for i, ((height, width), (inputs, outputs)) in enumerate(zip(SIDES, CHANNELS, strict=True)):
        rows, padding, pool = (1, 7)[i % 2], (1, 0, 1, 2)[i % 4] if min(height, width) > 2 else 1, i % 3 == 2
        x = channels_last(torch.randn(rows, inputs, height * (1 + pool) + pool, width * (1 + pool)).to(dtype))
        before = {
            "at": address(rows, 1 + i % 3), "sigma": torch.rand(inputs if i % 2 else 1), "pool": pool, "relu_in": i % 4 < 2,
            "scale": torch.randn(inputs) if i % 3 else None, "shift": torch.randn(inputs) if i % 3 else None,
        }  # fmt: skip
        yield x, torch.randn(outputs, inputs, 3, 3), torch.randn(outputs), padding, before


@pytest.mark.parametrize("dtype", winograd.DTYPES)
@pytest.mark.parametrize("tile", (2, 4))
def test_against_float64(unit, tile, dtype, rng):
    """Every side and every number of channels, with and without each option."""
    for i, (x, weight, bias, padding, before) in enumerate(convolutions(dtype)):
        if i % 5 == 0:
            before["sigma"] = None
        z = noisy_input(x, **before)
        want = conv2d(z.double(), weight.double(), bias.double(), padding=padding)
        residual = channels_last(torch.randn(want.shape).to(dtype)) if i % 2 else None
        relu = i % 4 > 1
        got, clean = convolved(x, weight, tile, padding, bias=bias, residual=residual, relu=relu, clean=True, **before)
        added = [bias[:, None, None]] + ([residual] if i % 2 else [])
        want = want + residual.double() if i % 2 else want
        want = want.relu() if relu else want
        case = (x.shape, weight.shape, padding, before["pool"])
        assert ((got.double() - want).abs() <= bound(z, weight, tile, padding, dtype, torch.float32, *added)).all(), case
        quiet = noisy_input(x, address(len(x)), None, before["scale"], before["shift"], before["relu_in"], before["pool"])
        assert torch.equal(clean, quiet.to(dtype)), case


def test_the_bound_is_no_tautology(library, rng):
    """A convolution of another weight, or whose tiles are cut one line off, is far outside."""
    x, weight = channels_last(torch.randn(2, 64, 9, 9)), torch.randn(64, 64, 3, 3)
    got, limit = convolved(x, weight).double(), bound(x, weight, 4, 1, torch.float32)
    want = conv2d(x.double(), weight.double(), padding=1)
    assert ((got - want).abs() <= limit).all() and limit.max() <= 0.05 * want.std()
    assert ((got - want.roll(1, 2)).abs() > limit).double().mean() > 0.9


@pytest.mark.parametrize("tile", (2, 4))
def test_products_in_bfloat16(library, tile, rng):
    if library.unit != "avx512bf16":
        pytest.skip("a processor without AVX-512 BF16")
    for dtype, inputs, outputs in itertools.product(winograd.DTYPES, (1, 5, 64), (3, 40)):
        x, weight = channels_last(torch.randn(3, inputs, 7, 6).to(dtype)), torch.randn(outputs, inputs, 3, 3)
        z = noisy_input(x, at := address(3), sigma := torch.rand(1))
        got = convolved(x, weight, tile, at=at, sigma=sigma, products=torch.bfloat16)
        want = conv2d(z.double(), weight.double(), padding=1)
        assert ((got.double() - want).abs() <= bound(z, weight, tile, 1, dtype, torch.bfloat16)).all()
        assert not torch.equal(got, convolved(x, weight, tile, at=at, sigma=sigma))


def test_a_unit_without_bfloat16_products_refuses_them(unit):
    if unit == "avx512bf16":
        pytest.skip("it has them")
    x, weight = channels_last(torch.randn(1, 2, 4, 4)), torch.randn(3, 2, 3, 3)
    with pytest.raises(TypeError, match=f"{unit}.*bfloat16"):
        convolved(x, weight, products=torch.bfloat16)


def in_bytes(weight, z, tile, padding, least=0.8):
    """(narrow, products, zeros, units) of a weight and a noisy input: weights fill their bytes, large inputs saturate if least < 1."""
    v, u = winograd.transform_input(z, tile, padding), winograd.transformed_weight(weight, tile)
    factors = torch.rand(weight.shape[1]) + 0.5
    low, high = ((v * factors).amin((1, 2)).clamp_max(-1e-3), (v * factors).amax((1, 2)).clamp_min(1e-3))
    steps = (high - low) / 254 * (least + (1 - least) * torch.rand(len(low)))
    zeros = (-low / steps).round().clamp(0, 255)
    u = u.float() / factors
    weight_steps = u.abs().amax(2).clamp_min(1e-30) / 127
    narrow = (u / weight_steps[..., None]).round().to(torch.int8)
    return narrow, weight_steps * steps[:, None], zeros, winograd.pack_units(steps, zeros, factors)


@pytest.mark.parametrize("dtype", winograd.DTYPES)
@pytest.mark.parametrize("tile", (2, 4))
def test_products_of_bytes(library, tile, dtype, rng):
    """Every side and every number of channels, with and without each option, against their integers in float64."""
    if library.unit != "avx512bf16":
        pytest.skip("a processor without AVX-512 VNNI")
    for i, (x, weight, bias, padding, before) in enumerate(convolutions(dtype)):
        z = noisy_input(x, **before)
        narrow, products, zeros, units = in_bytes(weight, z, tile, padding)
        want, limit = of_bytes(z, narrow, products, units, tile, padding)
        residual = channels_last(torch.randn(want.shape).to(dtype)) if i % 2 else None
        want = want + bias.double()[:, None, None] + (residual.double() if i % 2 else 0)
        packed = winograd.pack_bytes(narrow, products, zeros)
        got = convolved(x, weight, tile, padding, packed=packed, units=units, bias=bias, residual=residual, **before)
        limit = limit + (2.0**-8 if dtype == torch.bfloat16 else 2.0**-22) * (want.abs() + limit + bias.abs()[:, None, None])
        assert ((got.double() - want).abs() <= limit).all(), (x.shape, weight.shape, padding, before["pool"])


@pytest.mark.parametrize("tile", (2, 4))
def test_bytes_are_within_half_a_step_of_the_convolution(library, tile, rng):
    """Of a product t u both factors are rounded, to t' and u': |t u - t' u'| <= |t - t'| |u| + |t'| |u - u'|, half steps each."""
    if library.unit != "avx512bf16":
        pytest.skip("a processor without AVX-512 VNNI")
    x, weight, (a, _, _) = channels_last(torch.randn(3, 64, 9, 7)), torch.randn(40, 64, 3, 3), matrices(tile)
    narrow, products, zeros, units = in_bytes(weight, x, tile, 1, least=1.0)
    positions, side = (tile + 2) ** 2, tile + 2
    factors, steps = units[2 * positions :][:64].double(), 1 / units[: 2 * positions : 2].double()
    u, t = winograd.transformed_weight(weight, tile), winograd.transform_input(x.double(), tile, 1)
    half_t, half_u = steps[:, None] / factors / 2, (products.double() / steps[:, None])[..., None] * factors / 2
    off = torch.einsum("pc,poc->po", half_t, u.abs())[:, None] + torch.einsum("ptc,poc->pto", t.abs() + half_t[:, None], half_u)
    down, across = (-(-length // tile) for length in x.shape[2:])
    limit = torch.einsum("ip,pqnabo,jq->noaibj", a.abs(), off.view(side, side, 3, down, across, 40), a.abs())
    limit = limit.reshape(3, 40, down * tile, across * tile)[:, :, :9, :7]
    got, want = convolved(x, weight, tile, packed=winograd.pack_bytes(narrow, products, zeros), units=units), conv2d(x, weight, padding=1)
    error = (got - want).double()
    assert (error.abs() <= 1.0001 * limit).all() and error.std() <= (0.03, 0.1)[tile == 4] * want.std()


def test_bits_of_bytes_depend_on_neither_threads_nor_blocks(library, rng):
    if library.unit != "avx512bf16":
        pytest.skip("a processor without AVX-512 VNNI")
    x, weight, sigma, threads = channels_last(torch.randn(5, 37, 10, 9)), torch.randn(70, 37, 3, 3), torch.rand(1), torch.get_num_threads()
    for tile in (2, 4):
        narrow, products, zeros, units = in_bytes(weight, noisy_input(x, address(5, 2), sigma), tile, 1)
        common = {"packed": winograd.pack_bytes(narrow, products, zeros), "units": units, "sigma": sigma, "at": address(5, 2)}
        want = convolved(x, weight, tile, **common)
        try:
            for count, block in ((1, 0), (2, 1), (3, 5), (1, 17), (64, 1000)):
                torch.set_num_threads(count)
                assert torch.equal(convolved(x, weight, tile, block=block, **common), want), (tile, count, block)
        finally:
            torch.set_num_threads(threads)


def test_a_unit_without_products_of_bytes_refuses_them(unit):
    if unit == "avx512bf16":
        pytest.skip("it has them")
    x, weight = channels_last(torch.randn(1, 2, 4, 4)), torch.randn(3, 2, 3, 3)
    narrow, products, zeros, units = in_bytes(weight, x, 4, 1)
    with pytest.raises(TypeError, match=f"{unit}.*int8"):
        convolved(x, weight, packed=winograd.pack_bytes(narrow, products, zeros), units=units)


@pytest.mark.parametrize("padding", (0, 1, 2))
@pytest.mark.parametrize("tile", (2, 4))
def test_the_gradient_of_the_input_is_the_same_kernel(unit, tile, padding, rng):
    weight, x = torch.randn(5, 9, 3, 3), torch.randn(2, 9, 6, 7, dtype=torch.float64, requires_grad=True)
    y = conv2d(x, weight.double(), padding=padding)
    gradient = channels_last(torch.randn(y.shape))
    (want,) = torch.autograd.grad(y, x, gradient.double())
    turned = winograd.turned(weight)
    got = convolved(gradient, turned, tile, 2 - padding)
    assert got.shape == x.shape and ((got.double() - want).abs() <= bound(gradient, turned, tile, 2 - padding, torch.float32)).all()


# ----------------------------------------------------------------------------------------------------------------------------- noise
def one_tap(channels, i, j):
    weight = torch.zeros(channels, channels, 3, 3)
    weight[range(channels), range(channels), i, j] = 1
    return weight


@pytest.mark.parametrize("tile", (2, 4))
def test_the_noise_is_the_contracts_and_padding_has_none(unit, tile, rng):
    """Weights that select a tap show the noise of its input pixel: the difference of a call with noise and one without."""
    images, draws, channels, height, width = 2, 3, 6, 9, 11
    at = address(images, draws)
    x = channels_last(torch.randn(images, channels, height, width))
    eps = reference.gaussian(int(SEED), at.stream, images, draws, channels, height * width, image_offset=3, draw_offset=2)
    eps = torch.from_numpy(eps).movedim(-1, 1).reshape(-1, channels, height, width)
    packed = x.repeat(draws, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    for i, j in itertools.product(range(3), range(3)):
        weight = one_tap(channels, i, j)
        got = convolved(x, weight, tile, sigma=torch.ones(1), at=at).double() - convolved(packed, weight, tile).double()
        z = eps + packed.double()
        # eps is within 1e-6 of float64, and its sum with x is rounded once
        limit = bound(z, weight, tile, 1, torch.float32) + bound(packed, weight, tile, 1, torch.float32) + 2e-6
        assert ((got - conv2d(eps, weight.double(), padding=1)).abs() <= limit).all()
        assert limit.max() < 1e-2  # of noise of standard deviation 1
        if i == 0:  # the first line reads padding alone
            assert (got[:, :, 0].abs() <= limit[:, :, 0]).all()


def test_packed_lazily_or_before_and_by_sample_ids(unit, rng):
    x, weight, sigma = channels_last(torch.randn(3, 5, 6, 7)), torch.randn(4, 5, 3, 3), torch.rand(5)
    lazy, clean = convolved(x, weight, sigma=sigma, at=address(3, 2), clean=True)
    packed = x.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    before, clean_packed = convolved(packed, weight, sigma=sigma, at=address(3, 2), clean=True)
    assert torch.equal(lazy, before)
    assert torch.equal(clean, x) and torch.equal(clean_packed, packed)
    ids = torch.tensor([[3, 2], [2**32 - 1, 7], [5, 2]])
    other = convolved(x, weight, sigma=sigma, at=address(3, 2, 0, 0, sample_ids=ids))
    assert torch.equal(other[[0, 2, 3, 5]], lazy[[0, 2, 3, 5]]) and not torch.equal(other[1], lazy[1])
    alone = convolved(x[1:2], weight, sigma=sigma, at=address(1, 1, 2**32 - 1, 8))
    assert torch.equal(other[4], alone[0])


@pytest.mark.parametrize("tile", (2, 4))
def test_bits_depend_on_neither_threads_nor_rows_nor_blocks(unit, tile, rng):
    x, weight, sigma = channels_last(torch.randn(7, 37, 10, 9)), torch.randn(70, 37, 3, 3), torch.rand(1)
    threads = torch.get_num_threads()
    want = convolved(x, weight, tile, sigma=sigma, at=address(7, 2))
    try:
        for count, block in ((1, 0), (2, 1), (3, 5), (5, 14), (1, 17), (64, 1000)):
            torch.set_num_threads(count)
            got, clean = convolved(x, weight, tile, sigma=sigma, at=address(7, 2), block=block, clean=True)
            assert torch.equal(got, want) and torch.equal(clean, x), (count, block)
    finally:
        torch.set_num_threads(threads)
    for first, rows in ((0, 1), (2, 3), (6, 1)):
        got = convolved(x[first : first + rows], weight, tile, sigma=sigma, at=address(rows, 1, 3 + first, 3))
        assert torch.equal(got, want[7 + first : 7 + first + rows])


def test_nan_and_infinity_stay_in_their_image(unit):
    x = torch.randn(3, 5, 6, 6)
    x[1, 2, 3, 3] = float("nan")
    for tile in (2, 4):
        y = convolved(channels_last(x), torch.randn(4, 5, 3, 3), tile)
        assert y[1, :, 3, 3].isnan().all() and not y[[0, 2]].isnan().any()


# ---------------------------------------------------------------------------------------------------------------------------- memory
GUARDED = """
import ctypes, itertools, mmap, sys, torch
from rse_fast.address import NoiseAddress
from rse_fast.kernels import cpu
from rse_fast.kernels.cpu import winograd

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
regions = []

def guarded(shape, dtype, at_end):
    n, c, h, w = shape
    size = max(1, n * c * h * w) * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, pages + 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for guard in (start, start + mmap.PAGESIZE + pages):
        assert libc.mprotect(guard, mmap.PAGESIZE, 0) == 0
    regions.append(region)
    offset = mmap.PAGESIZE + (pages - size if at_end else 0)
    flat = torch.frombuffer(region, dtype=dtype, count=n * c * h * w, offset=offset)
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)

if sys.argv[1:] == ["read beyond"]:
    x = guarded((1, 1, 1, 1024), torch.float32, True)
    ctypes.string_at(x.data_ptr() + 4096, 1)

torch.set_num_threads(1)
shapes = (1, 3), (5, 65), (64, 32), (18, 33)
weights = {(s, tile, False): winograd.transform_weight(torch.ones(s[1], s[0], 3, 3), tile) for s in shapes for tile in (2, 4)}
for (inputs, outputs), tile in itertools.product(shapes, (2, 4)):
    ones = torch.ones((tile + 2) ** 2, outputs, inputs, dtype=torch.int8)
    weights[(inputs, outputs), tile, True] = winograd.pack_bytes(ones, torch.ones(ones.shape[:2]), torch.full(ones.shape[:1], 9.0))
for unit in cpu.load().units:
    assert cpu.load().handle.rse_select_unit(unit.encode()) == 0
    for in_bytes, at_end, dtype, tile, pool, shape, (h, w) in itertools.product(
        (False, True) if unit == "avx512bf16" else (False,),
        (True, False), winograd.DTYPES, (2, 4), (False, True), shapes, ((1, 1), (3, 6), (5, 5))):
        inputs, outputs = shape
        x = guarded((2, inputs, h * (1 + pool), w * (1 + pool)), dtype, at_end).fill_(1)
        out, residual = guarded((4, outputs, h, w), dtype, at_end), guarded((4, outputs, h, w), dtype, at_end).fill_(1)
        clean = guarded((2, inputs, h, w), dtype, at_end)
        u = weights[shape, tile, in_bytes]
        weight = guarded((1, 1, 1, u.numel()), u.dtype, at_end).view(u.shape).copy_(u)
        positions = (tile + 2) ** 2
        v = winograd.pack_units(torch.ones(positions), torch.full((positions,), 9.0), torch.ones(inputs))
        units = guarded((1, 1, 1, len(v)), torch.float32, at_end).view(-1).copy_(v) if in_bytes else None
        for sigma in (None, torch.ones(1)):
            at = NoiseAddress(torch.tensor(1), 0, 2, 2)
            winograd.convolution(x, weight, out, 1, units=units, residual=residual, sigma=sigma, at=at, pool=pool, clean=clean)
        assert (clean == 1).all()
        if dtype == torch.float32 and not pool and not in_bytes:
            taps, g = guarded((outputs, inputs, 3, 3), dtype, at_end).fill_(1), guarded((2, outputs, h, w), dtype, at_end).fill_(1)
            for turn in (False, True):
                winograd.transform_filters(taps, tile, turn)
            winograd.weight_grad(x, g, taps, tile, 1, NoiseAddress(torch.tensor(1), 0, 2, 1), torch.ones(1))
        regions.clear()
print("untouched")
"""


def test_nothing_beyond_the_tensors_is_touched(library, run_python):
    done = run_python("-c", GUARDED)
    assert done.returncode == 0 and done.stdout.strip() == "untouched", done.stderr
    assert run_python("-c", GUARDED, "read beyond").returncode < 0  # a guard is one
