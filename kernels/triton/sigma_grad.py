"""``sum(g * eps)`` over a layer or per channel, eps regenerated: two stages and no atomics, so equal inputs give equal bits.

The first stage sums pieces of fixed extent (set by the shape, not by the device, unless autotuning found a better one there), the
second sums the pieces in float64.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .config import ENOUGH_32_BITS, divisor, fast_math, launch, tuned, tuning, warps, word
from .philox import channels_last, key_words, normals_run, place

__all__ = ["sigma_grad"]


class Cut(NamedTuple):
    """threads: of a program. quads: of a thread and tile. pieces: at most this many for a block of channels."""

    threads: int
    quads: int
    pieces: int


DEFAULT = Cut(threads=128, quads=4, pieces=1024)
CANDIDATES = [Cut(threads, quads, pieces) for threads in (128, 256) for quads in (2, 4) for pieces in (512, 1024, 2048)]

_INTEGERS = ["layer_stream", "images", "image_offset", "draw_offset", "tiles", "steps", "S", "unit_count"]


@triton.jit
def _tile_origin(index, tiles, tiles_s, images):
    """(row, image, draw, tile of S) of tile number `index` of all rows."""
    row = tl.minimum(index, tiles - 1) // tiles_s  # a tile past the last one adds nothing, but its sample_ids are read
    draw = row // images
    return row, row - draw * images, draw, index - row * tiles_s


@triton.jit(do_not_specialize=[*_INTEGERS])
def _sigma_grad_flat_kernel(
    g_ptr, part_ptr, seed_ptr, ids_ptr, layer_stream, image_offset, draw_offset, images, tiles, tiles_s, steps, S, unit_count,
    UNIT: tl.constexpr, PER_CHANNEL: tl.constexpr, HAS_IDS: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr,
    TILES_C: tl.constexpr, S_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Rows lie [S, C]. One program sums `steps` tiles of one block of channels into row `piece` of part [pieces, C or TILES_C]."""
    C = unit_count * UNIT
    groups = ((C + 3) // 4).to(tl.uint32)
    pid = tl.program_id(0)
    piece = pid // TILES_C
    c_tile = pid - piece * TILES_C
    k0, k1 = key_words(seed_ptr)
    c = c_tile * C_BLOCK + tl.arange(0, C_BLOCK)  # [C_BLOCK]
    quad_c = (c_tile * (C_BLOCK // 4) + tl.arange(0, C_BLOCK // 4 // QUADS) * QUADS).to(tl.uint32)
    total = tl.zeros((S_BLOCK, C_BLOCK), tl.float32)
    for i in tl.range(0, steps, num_stages=1):
        index = piece * steps + i
        row, image, draw, tile = _tile_origin(index, tiles, tiles_s, images)
        s = tile * S_BLOCK + tl.arange(0, S_BLOCK)  # [S_BLOCK]
        if WIDE:
            s = s.to(tl.int64)
        mask = ((s < S) & (index < tiles))[:, None] & (c < C)[None, :]
        g = tl.load(g_ptr + row.to(tl.int64) * S * C + s[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        quad = s.to(tl.uint32)[:, None] * groups + quad_c[None, :]
        image, draw = place(image, draw, image_offset, draw_offset, ids_ptr, HAS_IDS)
        z0, z1, z2, z3 = normals_run(quad, 1, image, draw, layer_stream.to(tl.uint32), k0, k1, QUADS, FAST)
        total += g * channels_last(z0, z1, z2, z3)
    if PER_CHANNEL:
        tl.store(part_ptr + piece.to(tl.int64) * C + c, tl.sum(total, 0), mask=c < C)
    else:
        tl.store(part_ptr + pid, tl.sum(total))


@triton.jit
def _store_channel(part_ptr, piece, C, c, total):
    tl.store(part_ptr + piece.to(tl.int64) * C + c, tl.sum(total, 1), mask=c < C)


@triton.jit(do_not_specialize=[*_INTEGERS])
def _sigma_grad_planar_kernel(
    g_ptr, part_ptr, seed_ptr, ids_ptr, layer_stream, image_offset, draw_offset, images, tiles, tiles_s, tiles_g, steps, C, unit_count,
    UNIT: tl.constexpr, PER_CHANNEL: tl.constexpr, HAS_IDS: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr,
    S_BLOCK: tl.constexpr, G_BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Rows lie [C, S]. One program sums `steps` tiles of one block of quads into row `piece` of part [pieces, C or tiles_g]."""
    S = unit_count * UNIT
    groups = (C + 3) // 4
    pid = tl.program_id(0)
    piece = pid // tiles_g
    group = (pid - piece * tiles_g) * G_BLOCK + tl.arange(0, G_BLOCK)  # [G_BLOCK]
    k0, k1 = key_words(seed_ptr)
    c = 4 * group
    t0 = tl.zeros((G_BLOCK, S_BLOCK), tl.float32)
    t1 = tl.zeros((G_BLOCK, S_BLOCK), tl.float32)
    t2 = tl.zeros((G_BLOCK, S_BLOCK), tl.float32)
    t3 = tl.zeros((G_BLOCK, S_BLOCK), tl.float32)
    for i in tl.range(0, steps, num_stages=1):
        index = piece * steps + i
        row, image, draw, tile = _tile_origin(index, tiles, tiles_s, images)
        s = tile * S_BLOCK + tl.arange(0, S_BLOCK)  # [S_BLOCK]
        plane = S
        if WIDE:
            s = s.to(tl.int64)
            plane = S.to(tl.int64)
        inside = ((s < S) & (index < tiles))[None, :]
        first = (tile * S_BLOCK + tl.arange(0, S_BLOCK // RUN) * RUN).to(tl.uint32)
        quad = first[None, :] * groups.to(tl.uint32) + group.to(tl.uint32)[:, None]
        image, draw = place(image, draw, image_offset, draw_offset, ids_ptr, HAS_IDS)
        z0, z1, z2, z3 = normals_run(quad, groups.to(tl.uint32), image, draw, layer_stream.to(tl.uint32), k0, k1, RUN, FAST)
        g_ptrs = g_ptr + row.to(tl.int64) * C * S + c[:, None] * plane + s[None, :]  # [G_BLOCK, S_BLOCK]
        t0 += z0 * tl.load(g_ptrs, mask=inside & (c < C)[:, None], other=0.0).to(tl.float32)
        t1 += z1 * tl.load(g_ptrs + plane, mask=inside & (c + 1 < C)[:, None], other=0.0).to(tl.float32)
        t2 += z2 * tl.load(g_ptrs + 2 * plane, mask=inside & (c + 2 < C)[:, None], other=0.0).to(tl.float32)
        t3 += z3 * tl.load(g_ptrs + 3 * plane, mask=inside & (c + 3 < C)[:, None], other=0.0).to(tl.float32)
    if PER_CHANNEL:
        _store_channel(part_ptr, piece, C, c, t0)
        _store_channel(part_ptr, piece, C, c + 1, t1)
        _store_channel(part_ptr, piece, C, c + 2, t2)
        _store_channel(part_ptr, piece, C, c + 3, t3)
    else:
        tl.store(part_ptr + pid, tl.sum((t0 + t1) + (t2 + t3)))


@triton.jit(do_not_specialize=["pieces", "columns"])
def _sigma_grad_total_kernel(part_ptr, out_ptr, pieces, columns, P_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr):
    """out[c] = sum over pieces of part[piece, c], in float64 and in a fixed order."""
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    total = tl.zeros((P_BLOCK, C_BLOCK), tl.float64)
    for first in tl.range(0, pieces, P_BLOCK):
        p = first + tl.arange(0, P_BLOCK)
        mask = (p < pieces)[:, None] & (c < columns)[None, :]
        total += tl.load(part_ptr + p[:, None] * columns + c[None, :], mask=mask, other=0.0).to(tl.float64)
    tl.store(out_ptr + c, tl.sum(total, 0).to(tl.float32), mask=c < columns)


def sigma_grad(g, flat, at, per_channel) -> torch.Tensor:
    """``sum(g * eps)`` for g [draws * images, C, *spatial], contiguous or channels last where ``flat``: float32, 0-dim or [C].

    at: the noise's address, its tensors on the device of g. No synchronisation; on one device equal g in
    an equal layout give equal bits.
    """
    channels = g.shape[1]
    if not g.numel():
        return g.new_zeros((channels,) if per_channel else (), dtype=torch.float32)
    key = flat, g.dtype, g.shape, at.images, per_channel, at.sample_ids is not None
    columns = channels if per_channel else 1
    out = g.new_empty((columns,), dtype=torch.float32)

    def run(cut: Cut):
        _, programs, others = _plan(*key, cut)
        pieces = triton.cdiv(others["tiles"], others["steps"]) if per_channel else programs
        part = g.new_empty((pieces, columns), dtype=torch.float32)
        launch(_plan, (g, part, at.seed, at.sample_ids), (word(at.stream), word(at.image_offset), word(at.draw_offset)), *key, cut)
        launch(_plan_total, (part, out), (pieces, columns), columns)

    cut = DEFAULT
    if tuning(g):
        walk = "sigma_grad", f"flat{flat:d}", f"per_channel{per_channel:d}", g.dtype, channels, math.prod(g.shape[2:])
        cut = tuned(g, cut, CANDIDATES, run, *walk, g.shape[0].bit_length())
    run(cut)
    return out if per_channel else out.reshape(())


@functools.lru_cache(4096)
def _plan(flat, dtype, shape, images, per_channel, sample_ids, cut: Cut):
    """(kernel, programs, arguments behind tensors and words) of the first stage for g of this shape."""
    rows, channels, *spatial = shape
    flat = flat or math.prod(spatial) == 1  # of one position, rows lie either way
    kernel, blocks, tiling, tiles_s = plan(channels, math.prod(spatial), dtype.itemsize, flat, cut)
    tiles = rows * tiles_s
    steps = triton.cdiv(tiles, min(tiles, cut.pieces))
    others = dict(
        images=images, tiles=tiles, tiles_s=tiles_s, steps=steps, PER_CHANNEL=per_channel, HAS_IDS=sample_ids,
        WIDE=math.prod(shape[1:]) >= ENOUGH_32_BITS, FAST=fast_math(),
    )  # fmt: skip
    return kernel, triton.cdiv(tiles, steps) * blocks, {**others, **tiling}


def _plan_total(columns):
    block = min(64, triton.next_power_of_2(columns))
    return _sigma_grad_total_kernel, triton.cdiv(columns, block), dict(P_BLOCK=1024 // block, C_BLOCK=block)


def plan(channels, S, itemsize, flat, cut: Cut):
    """(kernel, blocks of channels, the arguments that say how a row is tiled, tiles of S in a row)."""
    if flat:
        quads = 2 if itemsize == 2 and channels % 8 == 0 else 1
        c_block = min(64, max(4, triton.next_power_of_2(channels)))
        s_block = min(max(1, cut.threads * cut.quads * 4 // c_block), triton.next_power_of_2(S))
        blocks, unit = triton.cdiv(channels, c_block), divisor(channels, 16)
        shape = dict(unit_count=channels // unit, UNIT=unit, S=S, TILES_C=blocks, S_BLOCK=s_block, C_BLOCK=c_block, QUADS=quads)
        kernel, runs = _sigma_grad_flat_kernel, s_block * c_block // (4 * quads)
    else:
        run, groups = divisor(S, 16 // itemsize), triton.cdiv(channels, 4)
        quads = cut.threads * max(run, cut.quads)
        s_block = min(quads, triton.next_power_of_2(S))
        g_block = min(quads // s_block, triton.next_power_of_2(groups))
        blocks, unit = triton.cdiv(groups, g_block), divisor(S, 16)
        shape = dict(unit_count=S // unit, UNIT=unit, C=channels, tiles_g=blocks, S_BLOCK=s_block, G_BLOCK=g_block, RUN=run)
        kernel, runs = _sigma_grad_planar_kernel, s_block * g_block // run
    return kernel, blocks, {**shape, "num_warps": warps(min(cut.threads, runs))}, triton.cdiv(S, s_block)
