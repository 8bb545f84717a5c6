"""3x3 convolutions on the CPU by Winograd's minimal filtering, noise in their input transform: weights, and the C++ kernel's launcher."""

import ctypes
import functools
import math
from typing import NamedTuple

import torch

from .loader import load

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
PRODUCTS = {**DTYPES, torch.int8: 3}  # by the weight's dtype; of bytes
COLUMNS = 32  # outputs that are computed at a time; kColumns of winograd.h

_pointer, _i32, _i64, _u32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32
_SIGNATURE = (
    *[_pointer] * 3, _i32, *[_i64] * 3, _pointer, *[_u32] * 3, _pointer, *[_i64] * 3, _i32, _pointer, _i64, _pointer, _pointer, _i32,
    _pointer, _i32, _pointer, *[_i64] * 3, _pointer, _pointer, _i32, _i64, _i32,
)  # fmt: skip

# Points at which F(m x m, 3x3) evaluates polynomials, beside infinity: those of winograd.cpp.
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.625, -0.625, 1.5, -1.5)}


class Cost(NamedTuple):
    """What one of the kernels takes where the weight is transformed at every call, in multiplications of the direct algorithm: those of all
    tiles, and of ``weight_tiles`` more for the weight, all times ``overhead`` for the other transforms. With fewer than ``channels``
    channels these are what takes the time.

    Fitted to timings of 13 shapes of 3 to 512 channels with 2 to 128 rows, on two cores: of what it takes, nothing was slower than the
    direct algorithm. Convolutions were timed with AVX2 and with AVX-512, the gradient of the weight with AVX-512 alone.
    """

    overhead: float
    weight_tiles: int
    channels: int
    tiles: tuple[int, ...]  # forms that are faster than the direct algorithm anywhere
    line_bytes: int  # most that both sides' transforms of a line of tiles may take


CONVOLUTION = Cost(1.4, 60, 16, (2, 4), 2**27)  # and the gradient of its input. Each thread holds an input line, about a quarter of it
WEIGHT_GRAD = Cost(1.75, 60, 64, (4,), 2**23)  # holds whole lines: longer ones leave the caches, and take several times the maps' memory
_CLEARLY = 0.9
_MOST_BYTES = 2**25  # of a transformed weight: what the C library gives back to the system, to be mapped again at the next call


@functools.lru_cache(2**12)  # images of changing sizes would fill an endless one
def best_tile(cost: Cost, rows: int, inputs: int, outputs: int, height: int, width: int, padding: int) -> int | None:
    """The tile of the form that is faster than the direct convolution where the weight is transformed at every call; None: none is.

    An estimate by arithmetic, the same on every processor with AVX2: what is computed depends on shapes alone.

    Args:
        cost: `CONVOLUTION` or `WEIGHT_GRAD`.
        rows, inputs, height, width: shape of the input.
        outputs: channels of the output.
        padding: 0, 1 or 2.
    """
    down, across = height + 2 * padding - 2, width + 2 * padding - 2
    if min(inputs, outputs) < cost.channels or min(down, across, rows) < 1 or load().unit in (None, "baseline"):
        return None
    best, least = None, _CLEARLY * 9 * rows * down * across
    for tile in cost.tiles:
        positions, columns = (tile + 2) ** 2, -(-across // tile)
        work = cost.overhead * positions * (rows * -(-down // tile) * columns + cost.weight_tiles)
        fits = 4 * positions * inputs * outputs < _MOST_BYTES and 4 * positions * columns * (inputs + outputs) < cost.line_bytes
        if work < least and fits:
            best, least = tile, work
    return best


def filter_matrix(tile: int) -> torch.Tensor:
    """G [tile + 2, 3] in float64, of Toom and Cook: a 3x3 filter g becomes ``G g G^T``. Lagrange's denominators are in it."""
    points = _POINTS[tile]
    rows = [[p**i / math.prod(p - q for q in points if q != p) for i in range(3)] for p in points]
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def input_matrix(tile: int) -> torch.Tensor:
    """B^T [tile + 2, tile + 2] in float64: a tile d of the input becomes ``B^T d B``. Row i is Lagrange's polynomial of point i, scaled."""
    points = _POINTS[tile]
    rows = torch.zeros(tile + 2, tile + 2, dtype=torch.float64)
    for row, others in zip(rows, [*([q for q in points if q != p] for p in points), points], strict=True):
        row[0] = 1
        for q in others:  # times (x - q)
            row.copy_(row.roll(1) - q * row)
    return rows


def transform_input(z: torch.Tensor, tile: int, padding: int) -> torch.Tensor:
    """``B^T d B`` of all tiles of z [N, C, H, W], by torch's operations: [(tile + 2)^2, tiles, C]."""
    matrix, sides = input_matrix(tile).to(z.dtype), [side + 2 * padding - 2 for side in z.shape[2:]]
    down, across = (-side % tile for side in sides)
    z = torch.nn.functional.pad(z, (padding, padding + across, padding, padding + down))
    d = z.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)  # [N, C, down, across, tile + 2, tile + 2]
    return torch.einsum("pi,nctsij,qj->pqntsc", matrix, d, matrix).flatten(2, 4).flatten(0, 1)


def transform_weight(weight: torch.Tensor, tile: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight as `convolution` reads it: transformed in float64, rounded once, in blocks of `COLUMNS` outputs.

    Args:
        weight: [outputs, inputs, 3, 3], any floating dtype. An affine map behind the convolution belongs in it: multiply it first.
        tile: 4 for F(4x4, 3x3), a quarter of the multiplications; 2 for F(2x2, 3x3), 4 of 9, with less rounding error.
        dtype: of the products: float32, or bfloat16 where the active unit is "avx512bf16".

    Returns:
        [ceil(outputs / COLUMNS), tile + 2, tile + 2, inputs, COLUMNS], or in bfloat16 [..., ceil(inputs / 2), COLUMNS, 2]; filled up
        with zeros.
    """
    side, (outputs, inputs) = tile + 2, weight.shape[:2]
    pair = 2 if dtype == torch.bfloat16 else 1
    both = torch.kron(*[filter_matrix(tile)] * 2)  # of the lines and of the columns, [side^2, 9]
    w = torch.nn.functional.pad(weight.detach().cpu(), (0, 0, 0, 0, 0, -inputs % pair, 0, -outputs % COLUMNS))
    w = w.reshape(-1, COLUMNS, w.shape[1] // pair, pair, 9).permute(0, 4, 2, 1, 3)
    u = torch.empty((len(w), side, side, *w.shape[2:]), dtype=dtype, device="cpu")
    for block, values in zip(u, w, strict=True):  # one by one, so that little is held in float64
        block.copy_((both @ values.flatten(1).double()).view(block.shape))
    return u if pair == 2 else u.squeeze(-1)


def transform_filters(weight: torch.Tensor, tile: int, turn: bool = False) -> torch.Tensor:
    """`transform_weight` in float32 by the C++ library, some hundred times as fast: for a weight that changes at every step.

    Args:
        weight: float32 [outputs, inputs, 3, 3], with any strides.
        tile: 4 or 2.
        turn: of ``turned(weight)``.

    Returns:
        As `transform_weight`, whose values differ by rounding.
    """
    function = load().handle.rse_winograd_filters
    if not function.argtypes:
        function.argtypes, function.restype = (_pointer, *[_i64] * 7, _pointer, _i32), None
    taps, (outputs, inputs), strides = weight.data_ptr(), weight.shape[:2], list(weight.stride())
    if turn:  # from the last tap backwards
        taps += weight.element_size() * 2 * (strides[2] + strides[3])
        outputs, inputs, strides = inputs, outputs, [strides[1], strides[0], -strides[2], -strides[3]]
    out = torch.empty((-(-outputs // COLUMNS), tile + 2, tile + 2, inputs, COLUMNS), dtype=torch.float32, device="cpu")
    function(taps, *strides, outputs, inputs, tile, out.data_ptr(), torch.get_num_threads())
    return out


def weight_grad(x, g, like, tile, padding, at, sigma, block=0) -> torch.Tensor:
    """The gradient of the weight of ``conv3x3(x + sigma * eps)``, of that of its result; the noisy input is never stored.

    Args:
        x: [at.images or at.images * at.draws, inputs, H, W], float32, channels last and dense.
        g: [at.images * at.draws, outputs, H + 2 * padding - 2, W + 2 * padding - 2], likewise.
        like: the weight [outputs, inputs, 3, 3]; the result lies like it. Its values are not read.
        tile, padding, at, sigma: as in `convolution`.
        block: tiles whose transforms are held at a time, 0: as many as are best. The result depends on it by rounding.
    """
    function = load().handle.rse_winograd_weight_grad
    if not function.argtypes:
        function.argtypes = (*[_pointer] * 3, *[_i64] * 7, _pointer, *[_u32] * 3, _pointer, *[_i64] * 3, _pointer, *[_i64] * 5, _i32)
        function.restype = ctypes.c_int
    out = torch.empty_like(like)
    failed = function(
        x.data_ptr(), g.data_ptr(), out.data_ptr(), *out.stride(), len(x), at.images, at.draws, at.seed.data_ptr(), at.stream,
        at.image_offset, at.draw_offset, None if at.sample_ids is None else at.sample_ids.data_ptr(), *x.shape[1:], sigma.data_ptr(),
        sigma.numel(), tile, g.shape[1], padding, block, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("the gradient of a CPU convolution's weight could not allocate its workspace")
    return out


def transformed_weight(weight: torch.Tensor, tile: int) -> torch.Tensor:
    """``G w G^T`` in float64, [(tile + 2)^2, outputs, inputs]."""
    both = torch.kron(*[filter_matrix(tile)] * 2)
    return torch.einsum("pk,oik->poi", both, weight.detach().cpu().double().flatten(2))


def pack_bytes(weight: torch.Tensor, steps: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """A transformed weight in bytes as `convolution` reads it, where the active unit is "avx512bf16".

    Args:
        weight: int8 [(tile + 2)^2, outputs, inputs].
        steps: float32 [(tile + 2)^2, outputs], what 1 in a product stands for: the weight's step times the input's.
        zeros: [(tile + 2)^2], the byte that stands for 0 in the input.

    Returns:
        int8 [ceil(outputs / COLUMNS), tile + 2, tile + 2, 2 + ceil(inputs / 4), COLUMNS, 4], filled up with zeros. The first two rows
        hold int32 and float32: where sums begin, and ``steps``.
    """
    positions, outputs, inputs = weight.shape
    begins = -weight.sum(2, dtype=torch.int32) * zeros.int()[:, None]
    blocks = lambda t: torch.nn.functional.pad(t, (0, -outputs % COLUMNS)).reshape(positions, -1, COLUMNS, 1).transpose(0, 1)  # noqa: E731
    quads = torch.nn.functional.pad(weight, (0, -inputs % 4, 0, -outputs % COLUMNS)).reshape(positions, -1, COLUMNS, -(-inputs // 4), 4)
    header = [blocks(t).contiguous().view(torch.int8)[:, :, None] for t in (begins, steps.float())]
    side = math.isqrt(positions)
    return torch.cat([*header, quads.permute(1, 0, 3, 2, 4)], 2).unflatten(1, (side, side)).contiguous()


def pack_units(steps: torch.Tensor, zeros: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """What makes bytes of a transformed input t, as `convolution` reads it: ``saturate(rint(t * factors / steps + zeros))``.

    steps, zeros: [(tile + 2)^2]. factors: [inputs]; a transformed weight is divided by them before it is rounded.
    """
    return torch.cat([torch.stack([1 / steps, zeros], 1).flatten(), factors, factors.new_zeros(-len(factors) % 16)]).float()


def turned(weight: torch.Tensor) -> torch.Tensor:
    """The weight that makes the gradient of the input out of that of the output, with padding ``2 - padding``: [inputs, outputs, 3, 3]."""
    return weight.transpose(0, 1).flip(2, 3)


def convolution(
    x, weight, out, padding=1, *, units=None, bias=None, residual=None, relu=False,
    at=None, sigma=None, scale=None, shift=None, relu_in=False, pool=False, clean=None, block=0,
) -> None:  # fmt: skip
    """Fills ``out`` with ``act(conv3x3(z) + bias + residual)``, ``z = maxpool?(act(x * scale + shift)) + sigma * eps``, never stored.

    Stride 1, dilation 1, groups 1. z is that of add_noise, in float32 and not rounded to the dtype of x; padding gets no noise.

    Args:
        x: [at.images or at.images * at.draws, inputs, H, W], float32 or bfloat16. All maps are channels last and dense.
        weight: what `transform_weight` or `pack_bytes` gave; it says which tile and in which dtype products are.
        out: [at.images * at.draws, outputs, h + 2 * padding - 2, w + 2 * padding - 2], dtype of x, (h, w) being (H, W), with ``pool``
            its half. Row ``d * images + i`` is draw d of image i.
        padding: 0, 1 or 2.
        units: what `pack_units` gave, for a weight in bytes.
        bias: float32 [outputs] or None.
        residual: as out, or None; may be out itself.
        relu: whether a ReLU ends it.
        at: a noise address: seed (int64 tensor of one value), stream, images, draws, image_offset, draw_offset, sample_ids (int64
            [images, 2] or None). None: no noise, and out has a row for each row of x.
        sigma: float32 of 1 or ``inputs`` values; None: no noise.
        scale, shift: float32 [inputs] or None.
        relu_in: whether a ReLU follows them.
        pool: whether the largest of each 2x2 window goes on.
        clean: [rows of x, inputs, h, w], dtype of x; takes z without its noise.
        block: tiles whose transforms are held at a time; 0: as many as are best. The result does not depend on it.

    Raises:
        TypeError: the active unit has no products in the dtype of ``weight``.
        MemoryError: no memory for a thread's workspace, a few megabytes.
    """
    if not out.numel():
        return
    library = load()
    function = library.handle.rse_winograd
    if not function.argtypes:
        function.argtypes, function.restype = _SIGNATURE, ctypes.c_int
    pointer = lambda t: None if t is None else t.data_ptr()  # noqa: E731
    rows, inputs, height, width = x.shape
    place = (rows, 1, None, 0, 0, 0, None) if at is None else (
        at.images, at.draws, at.seed.data_ptr(), at.stream, at.image_offset, at.draw_offset, pointer(at.sample_ids)
    )  # fmt: skip
    failed = function(
        x.data_ptr(), out.data_ptr(), pointer(clean), DTYPES[x.dtype], rows, *place, inputs, height, width, pool,
        pointer(sigma), 0 if sigma is None else sigma.numel(), pointer(scale), pointer(shift), relu_in,
        weight.data_ptr(), PRODUCTS[weight.dtype], pointer(units), weight.shape[1] - 2, out.shape[1], padding, pointer(bias),
        pointer(residual), relu, block, torch.get_num_threads(),
    )  # fmt: skip
    if failed == 2:
        unit = library.handle.rse_active_unit().decode()
        tile = weight.shape[1] - 2
        raise TypeError(f"the CPU unit {unit} does not convolve {x.dtype} with products in {weight.dtype} and tiles of {tile}")
    if failed:
        raise MemoryError("the CPU convolution could not allocate its workspace")
