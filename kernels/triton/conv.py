"""Implicit-GEMM convolution of channels-last images, with noise at its input or behind its epilogue; one kernel and its launchers.

- Noise in: ``conv(x + sigma * eps) + bias``. eps is keyed by the input pixel, so every tap and tile sees the same; padding has none.
- Noise out: ``act(conv(x) * scale + shift) + sigma * eps``: affine map, ReLU and the *next* layer's noise while the result is in
  registers, which saves that layer's pass over memory. Also in int8 and fp8: noise is added before the one rounding, so it dithers.

Which of them is taken for a convolution, and why its weight gradient has no kernel: `choices`.
"""

import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .config import fast_math, launch, stages, tuned, tuning, warps, word
from .philox import channels_last, key_words, normals, place

__all__ = ["conv_activate_noise", "noisy_conv"]


# ----------------------------------------------------------------------------------------------------------------------- device
@triton.jit
def _narrow(y, dtype: tl.constexpr):
    """float32 to the output's dtype, rounded to nearest even; int8 and fp8 saturate, fp8 keeps NaN."""
    if dtype == tl.int8:
        y = tl.minimum(tl.maximum(y, -128.0), 127.0)
        # Adding 1.5 * 2^23 leaves no bits for a fraction: the sum rounds.
        return ((y + 12582912.0) - 12582912.0).to(tl.int8)
    elif dtype == tl.float8e4nv or dtype == tl.float8e4b8:
        largest: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 240.0
        y = tl.maximum(y, -largest, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(y, largest, propagate_nan=tl.PropagateNan.ALL).to(dtype)
    else:
        return y.to(dtype)


@triton.jit
def _pixel(oh, ow, kh, kw, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, H, W):
    """(row-major input pixel under tap (kh, kw), whether it is inside the image)."""
    iy = oh * stride_h - pad_h + kh * dilation_h
    ix = ow * stride_w - pad_w + kw * dilation_w
    return iy * W + ix, (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)


_INTEGERS = ["layer_stream", "images", "image_offset", "draw_offset", "repeats", "M", "H", "W", "OH", "OW", "c_out"]
_INTEGERS += ["stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"]


@triton.jit(do_not_specialize=[*_INTEGERS])
def _conv_kernel(
    x_ptr, w_ptr, y_ptr, scale_ptr, shift_ptr, sigma_ptr, seed_ptr, ids_ptr,
    layer_stream, image_offset, draw_offset, images, repeats, M, H, W, OH, OW, c_out,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, NOISE_IN: tl.constexpr, NOISE_OUT: tl.constexpr, LAZY: tl.constexpr,
    SIGMA_VARIES: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, RELU: tl.constexpr, HAS_IDS: tl.constexpr,
    EVEN_N: tl.constexpr, OUT_UNIT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [rows, H, W, C], w [Cout, KH, KW, C padded to quads], y [rows, OH, OW, Cout]; M: output pixels of all rows together.

    LAZY with NOISE_IN: row ``d * images + i`` reads image i. NOISE_OUT writes `repeats` draws of each row it computed.
    """
    groups: tl.constexpr = (C + 3) // 4
    K: tl.constexpr = KH * KW * groups * 4
    ONE_TAP: tl.constexpr = C % BLOCK_K == 0  # then all of a block lies under one tap
    ACC: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32

    c_out = c_out * OUT_UNIT
    n_tiles = (c_out + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    m = (pid // n_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = (pid % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside_m = m < M
    row = (m // (OH * OW)).to(tl.int32)
    s_out = (m - row.to(tl.int64) * OH * OW).to(tl.int32)
    oh = s_out // OW
    ow = s_out - oh * OW
    # Rows past the end are those of padding: their sample_ids must not be read.
    row = tl.where(inside_m, row, 0)
    draw = row // images
    image = row - draw * images
    k0, k1 = key_words(seed_ptr)
    stream = layer_stream.to(tl.uint32)
    if NOISE_IN:
        c_image, c_draw = place(image, draw, image_offset, draw_offset, ids_ptr, HAS_IDS)
        if not SIGMA_VARIES:
            one_sigma = tl.load(sigma_ptr)

    x_row = (image if LAZY else row).to(tl.int64) * H * W * C
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k_first in tl.range(0, K, BLOCK_K):
        k = k_first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        if ONE_TAP:
            tap = k_first // C
            pixel, inside = _pixel(oh, ow, tap // KW, tap % KW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, H, W)
            c = k_first % C + tl.arange(0, BLOCK_K)
            inside = (inside & inside_m)[:, None]  # [BLOCK_M, 1]
            x_offsets = x_row[:, None] + (pixel * C)[:, None] + c[None, :]
            w = tl.load(w_ptr + n[None, :] * K + k[:, None], mask=None if EVEN_N else (n < c_out)[None, :])  # [BLOCK_K, BLOCK_N]
        else:
            tap = k // (4 * groups)
            c = k - tap * (4 * groups)
            pixel, inside = _pixel(
                oh[:, None], ow[:, None], (tap // KW)[None, :], (tap % KW)[None, :],
                stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, H, W,
            )  # fmt: skip
            inside = inside & inside_m[:, None] & ((c < C) & (k < K))[None, :]  # [BLOCK_M, BLOCK_K]
            x_offsets = x_row[:, None] + pixel * C + c[None, :]
            w = tl.load(w_ptr + n[None, :] * K + k[:, None], mask=(n < c_out)[None, :] & (k < K)[:, None], other=0.0)
        a = tl.load(x_ptr + x_offsets, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_K]
        if NOISE_IN:
            if ONE_TAP:
                g = (k_first % C) // 4 + tl.arange(0, BLOCK_K // 4)
                pixel_q = pixel[:, None]
            else:
                q = k_first // 4 + tl.arange(0, BLOCK_K // 4)
                tap_q = q // groups
                g = q - tap_q * groups
                pixel_q, _ = _pixel(
                    oh[:, None], ow[:, None], (tap_q // KW)[None, :], (tap_q % KW)[None, :],
                    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, H, W,
                )  # fmt: skip
            quad = pixel_q.to(tl.uint32) * groups + g.to(tl.uint32)[None, :]  # [BLOCK_M, BLOCK_K / 4]
            z0, z1, z2, z3 = normals(quad, c_image[:, None], c_draw[:, None], stream, k0, k1, FAST)
            eps = channels_last(z0, z1, z2, z3)  # [BLOCK_M, BLOCK_K]
            sigma = tl.load(sigma_ptr + c, mask=c < C, other=0.0)[None, :] if SIGMA_VARIES else one_sigma
            # One rounding, as in add_noise: both ways to convolve see the same numbers.
            a = tl.where(inside, a.to(tl.float32) + sigma * eps, 0.0).to(x_ptr.dtype.element_ty)
        acc = tl.dot(a, w, acc, input_precision=PRECISION, out_dtype=ACC)

    inside_n = n < c_out
    y = acc.to(tl.float32)
    if HAS_SCALE:
        y = y * tl.load(scale_ptr + n, mask=inside_n)[None, :]
    if HAS_SHIFT:
        y = y + tl.load(shift_ptr + n, mask=inside_n).to(tl.float32)[None, :]
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y_mask = inside_m[:, None] & inside_n[None, :]
    if NOISE_OUT:
        groups_out = (c_out + 3) // 4
        quad_n = (pid % n_tiles) * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        quad_out = (s_out * groups_out).to(tl.uint32)[:, None] + quad_n.to(tl.uint32)[None, :]  # [BLOCK_M, BLOCK_N / 4]
        sigma_out = tl.load(sigma_ptr + n, mask=inside_n)[None, :] if SIGMA_VARIES else tl.load(sigma_ptr)
        for repeat in tl.range(0, repeats, num_stages=1):
            c_image, c_draw = place(image, draw + repeat, image_offset, draw_offset, ids_ptr, HAS_IDS)
            z0, z1, z2, z3 = normals(quad_out, c_image[:, None], c_draw[:, None], stream, k0, k1, FAST)
            noisy = y + sigma_out * channels_last(z0, z1, z2, z3)
            y_row = ((draw + repeat).to(tl.int64) * images + image) * OH * OW + s_out
            tl.store(y_ptr + y_row[:, None] * c_out + n[None, :], _narrow(noisy, y_ptr.dtype.element_ty), mask=y_mask)
    else:
        tl.store(y_ptr + m[:, None] * c_out + n[None, :], _narrow(y, y_ptr.dtype.element_ty), mask=y_mask)


# --------------------------------------------------------------------------------------------------------------------- launchers
def noisy_conv(x, weight, bias, sigma, at, stride, padding, dilation) -> torch.Tensor:
    """``conv2d(x + sigma * eps, weight, bias)`` [draws * images, Cout, OH, OW], channels last, in x's dtype.

    x [images or draws * images, Cin, H, W] channels last, float32 (products in tf32), bfloat16 or float16; weight [Cout, Cin, KH, KW]
    and bias [Cout] of x's dtype; sigma float32 of 1 or Cin values; stride, padding, dilation: pairs; the rest as in add_noise.
    """
    return _launch(
        x, weight, x.dtype, sigma, at, stride, padding, dilation,
        NOISE_IN=True, NOISE_OUT=False, scale=None, shift=bias, relu=False,
    )  # fmt: skip


def conv_activate_noise(x, weight, sigma, at, scale, shift, relu, stride, padding, dilation, dtype=None) -> torch.Tensor:
    """``act(conv2d(x, weight) * scale + shift) + sigma * eps`` [draws * images, Cout, OH, OW], channels last, rounded once to `dtype`.

    x [images or draws * images, Cin, H, W] channels last and weight [Cout, Cin, KH, KW]: both float32, bfloat16 or float16, or both
    int8 (summed in int32), or both float8_e4m3fn (sm_89 and up) or float8_e4m3fnuz (gfx942). scale, shift:
    float32 [Cout] or None. In low precision scale also undoes the steps of x and weight and divides by the result's step, and so do shift
    and sigma: y then comes out in steps of `dtype` (default: x's), saturated. sigma float32 of 1 or Cout values; ``at`` is the address
    of the noise of y, as in add_noise.
    """
    return _launch(
        x, weight, dtype or x.dtype, sigma, at, stride, padding, dilation,
        NOISE_IN=False, NOISE_OUT=True, scale=scale, shift=shift, relu=relu,
    )  # fmt: skip


def _launch(x, weight, dtype, sigma, at, stride, padding, dilation, *, NOISE_IN, NOISE_OUT, scale, shift, relu):
    _, channels, height, width = x.shape
    c_out, _, KH, KW = weight.shape
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip((height, width), padding, dilation, (KH, KW), stride, strict=True)
    ]
    y = torch.empty((at.rows, *sizes, c_out), dtype=dtype, device=x.device)
    if y.numel():
        tensors = x, packed_weight(weight), y, scale, shift, sigma, at.seed, at.sample_ids
        geometry = tuple(stride), tuple(padding), tuple(dilation)
        settled = dict(
            NOISE_IN=NOISE_IN, NOISE_OUT=NOISE_OUT, SIGMA_VARIES=sigma.numel() > 1, HAS_SCALE=scale is not None,
            HAS_SHIFT=shift is not None, RELU=relu, HAS_IDS=at.sample_ids is not None,
        )  # fmt: skip
        key = (x.dtype, dtype), x.shape, weight.shape, y.shape, at.images, geometry, tuple(settled.items())

        def run(tile: Tile):
            launch(_plan, tensors, (word(at.stream), word(at.image_offset), word(at.draw_offset)), *key, tile)

        tile = default_tile(c_out, channels, x.element_size(), NOISE_IN)
        if tuning(x):
            pixels = (x.shape[0] if NOISE_OUT else y.shape[0]) * math.prod(sizes)
            walk = "conv", f"noise_in{NOISE_IN:d}", x.dtype, dtype, f"{channels}-{c_out}", f"{KH}x{KW}", pixels.bit_length()
            tile = tuned(x, tile, candidates(tile), run, *walk)
        run(tile)
    return y.movedim(-1, 1)


def _plan(dtypes, shape_in, weight, shape_out, images, geometry, settled, tile: "Tile"):
    """(kernel, programs, arguments behind tensors and words) for x of shape_in, y of shape_out [rows, OH, OW, Cout], of any dtypes."""
    settled = dict(settled)
    rows_in, channels, height, width = shape_in
    rows_out, OH, OW, c_out = shape_out
    rows = rows_out if settled["NOISE_IN"] else rows_in
    stride, padding, dilation = geometry
    pixels, out_unit = rows * OH * OW, min(c_out & -c_out, 16)
    others = dict(
        images=images, repeats=rows_out // rows, M=pixels, c_out=c_out // out_unit, H=height, W=width, OH=OH, OW=OW,
        stride_h=stride[0], stride_w=stride[1], pad_h=padding[0], pad_w=padding[1], dilation_h=dilation[0], dilation_w=dilation[1],
        C=channels, KH=weight[2], KW=weight[3], LAZY=settled["NOISE_IN"] and rows_in != rows,
        EVEN_N=c_out % tile.channels == 0, OUT_UNIT=out_unit, PRECISION="tf32", FAST=fast_math(),
    )  # fmt: skip
    programs = triton.cdiv(pixels, tile.pixels) * triton.cdiv(c_out, tile.channels)
    return _conv_kernel, programs, {**others, **settled, **tile.arguments()}


class Tile(NamedTuple):
    """Output pixels and channels of one program, input values of one step of its sum, threads, and steps under way at once."""

    pixels: int
    channels: int
    depth: int
    threads: int
    stages: int = 3

    def arguments(self) -> dict:
        blocks = {"BLOCK_M": self.pixels, "BLOCK_N": self.channels, "BLOCK_K": self.depth}
        return {**blocks, "num_warps": warps(self.threads), "num_stages": stages(self.stages)}


# (noise at the input, output channels of a tile): (pixels of a tile, threads). As large as registers without spills allow.
TILES = {
    (True, 16): (64, 128), (True, 32): (64, 128), (True, 64): (128, 256), (True, 128): (128, 256), (True, 256): (64, 256),
    (False, 16): (64, 128), (False, 32): (64, 128), (False, 64): (64, 128), (False, 128): (64, 256),
}  # fmt: skip


def default_tile(c_out: int, channels: int, itemsize: int, noise_in: bool) -> Tile:
    """The tile for a convolution of `channels` to `c_out` channels, of values of `itemsize` bytes.

    Noise at the input is made again for every tile of output channels, so one tile spans all 256 where it can. In the epilogue
    every thread holds its share of the tile as accumulators, normals and words at once: 32 elements are what fits.
    """
    widest = {(True, 4): 64, (True, 2): 256}.get((noise_in, itemsize), 128)
    block_n = min(widest, max(16, triton.next_power_of_2(c_out)))
    whole = 128 // itemsize
    block_k = whole if channels % whole == 0 else 32
    if channels * itemsize < 32:
        block_k = max(16, 32 // itemsize)
    pixels, threads = TILES[noise_in, block_n]
    return Tile(pixels, block_n, block_k, threads)


def candidates(default: Tile) -> list[Tile]:
    """What autotuning tries beside the default: other pixels, threads and stages, half the channels."""
    widths = [default.channels] if default.channels == 16 else [default.channels, default.channels // 2]
    shapes = itertools.product(((64, 128), (64, 256), (128, 256)), widths, (2, 3, 4))
    return [Tile(pixels, channels, default.depth, threads, stages) for (pixels, threads), channels, stages in shapes]


def packed_weight(weight: torch.Tensor) -> torch.Tensor:
    """[Cout, KH, KW, Cin rounded up to quads], contiguous: a view where the weight is channels last and Cin a multiple of 4."""
    last = weight.movedim(1, -1)
    missing = -weight.shape[1] % 4
    if not missing:
        return last.contiguous()
    padded = last.new_zeros((*last.shape[:-1], weight.shape[1] + missing))
    padded[..., : weight.shape[1]] = last
    return padded
