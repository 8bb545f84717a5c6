"""``y = act(x * scale + shift) + sigma * eps`` in one pass: two kernels, one a memory layout, and their launcher.

Both walk an image in tiles. What one program does: find its row, read the seed, loop over `steps` tiles of positions. Per tile, a
thread computes the noise of whole quads that lie where its 16-byte loads and stores do. An optional 2x2 max-pool stands between
activation and noise; the noise is keyed by the pooled position.
"""

import math

import torch
import triton
import triton.language as tl

from .config import (
    CANDIDATES,
    ENOUGH_32_BITS,
    Config,
    default,
    divisor,
    fast_math,
    launch,
    loop_steps,
    register_limit,
    tuned,
    tuning,
    warps,
    word,
)
from .philox import channels_last, key_words, normals_run, place

__all__ = ["add_noise"]


@triton.jit
def locate(repeats, tiles, images):
    """(row of x, image, draw, repeat, tile) of this program. Draws of one tile run side by side, so the caches serve x after the first."""
    pid = tl.program_id(0).to(tl.uint32)
    # Arguments equal to 1 arrive as constants, and the divisions by them vanish.
    repeats = tl.full((), repeats, tl.uint32)
    tiles = tl.full((), tiles, tl.uint32)
    tile_row = pid // repeats
    repeat = pid - tile_row * repeats
    row = tile_row // tiles
    tile = tile_row - row * tiles
    draw = row // images.to(tl.uint32)
    image = row - draw * images.to(tl.uint32)
    return row.to(tl.int64), image, draw + repeat, repeat, tile.to(tl.int32)


@triton.jit
def _parameter(ptr, index, mask, default, PRESENT: tl.constexpr, VARIES: tl.constexpr):
    if not PRESENT:
        return tl.full((1,), default, tl.float32)
    elif VARIES:
        return tl.load(ptr + index, mask=mask)
    else:
        return tl.load(ptr + tl.arange(0, 1))


@triton.jit
def _activate(x, scale, shift, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, RELU: tl.constexpr):
    x = x.to(tl.float32)
    if HAS_SCALE:
        x = x * scale
    if HAS_SHIFT:
        x = x + shift
    if RELU:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _read(x_ptrs, mask, dx, dy, scale, shift, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr):
    """The activated tile; with POOL the maximum over the pixels at offsets 0, dx, dy and dx + dy."""
    x = _activate(tl.load(x_ptrs, mask=mask), scale, shift, HAS_SCALE, HAS_SHIFT, RELU)
    if POOL:
        x1 = _activate(tl.load(x_ptrs + dx, mask=mask), scale, shift, HAS_SCALE, HAS_SHIFT, RELU)
        x2 = _activate(tl.load(x_ptrs + dy, mask=mask), scale, shift, HAS_SCALE, HAS_SHIFT, RELU)
        x3 = _activate(tl.load(x_ptrs + dx + dy, mask=mask), scale, shift, HAS_SCALE, HAS_SHIFT, RELU)
        x01 = tl.maximum(x, x1, propagate_nan=tl.PropagateNan.ALL)
        x23 = tl.maximum(x2, x3, propagate_nan=tl.PropagateNan.ALL)
        x = tl.maximum(x01, x23, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def position(step, part, width, lines, S_BLOCK: tl.constexpr, POOL: tl.constexpr):
    """(line, column, row-major index, how many positions exist) of a tile's first position; the others follow it in its line.

    Without POOL an image is one line, cut into pieces of S_BLOCK. With POOL a step is a line of the pooled image, `part` a piece of it.
    """
    if POOL:
        column = part * S_BLOCK
        return step, column, step * width + column, tl.where(step < lines, width - column, 0)
    else:
        return 0, step * S_BLOCK, step * S_BLOCK, width - step * S_BLOCK


_INTEGERS = [
    "layer_stream", "images", "image_offset", "draw_offset", "steps", "parts", "width", "lines", "width_in", "height_in", "channel_units"
]  # fmt: skip


@triton.jit(do_not_specialize=[*_INTEGERS])
def _add_noise_flat_kernel(
    x_ptr, y_ptr, clean_ptr, sigma_ptr, scale_ptr, shift_ptr, seed_ptr, ids_ptr,
    layer_stream, image_offset, draw_offset, images, repeats, tiles, steps, parts, width, lines, width_in, height_in, channel_units,
    UNIT: tl.constexpr, SIGMA_VARIES: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, RELU: tl.constexpr,
    HAS_IDS: tl.constexpr, CLEAN: tl.constexpr, POOL: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
    TILES_C: tl.constexpr, S_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Rows lie [S, C]. A thread takes QUADS neighbouring quads of channels; a program one block of channels at `steps` tiles of S."""
    C = channel_units * UNIT  # so that the compiler knows what divides C
    groups = (C + 3) // 4
    row, image, draw, repeat, tile = locate(repeats, tiles, images)
    c_tile = tile % TILES_C
    s_tile = tile // TILES_C
    part = s_tile % parts if POOL else 0
    step0 = (s_tile // parts if POOL else s_tile) * steps

    k0, k1 = key_words(seed_ptr)
    c_image, c_draw = place(image, draw, image_offset, draw_offset, ids_ptr, HAS_IDS)
    i_s = tl.arange(0, S_BLOCK)  # [S_BLOCK]
    c = c_tile * C_BLOCK + tl.arange(0, C_BLOCK)  # [C_BLOCK]
    quad_c = c_tile * (C_BLOCK // 4) + tl.arange(0, C_BLOCK // 4 // QUADS) * QUADS  # [C_BLOCK / 4 / QUADS]
    c_mask = None if EVEN else c < C
    sigma = _parameter(sigma_ptr, c, c_mask, 0.0, True, SIGMA_VARIES)[None, :]
    scale = _parameter(scale_ptr, c, c_mask, 1.0, HAS_SCALE, True)[None, :]
    shift = _parameter(shift_ptr, c, c_mask, 0.0, HAS_SHIFT, True)[None, :]

    plane = width.to(tl.int64) * lines
    x_row = x_ptr + row * ((width_in.to(tl.int64) * height_in if POOL else plane) * C)
    y_row = y_ptr + (draw.to(tl.int64) * images + image) * (plane * C)
    clean_row = clean_ptr + row * (plane * C) if CLEAN else clean_ptr
    for i in tl.range(0, steps, num_stages=1):
        line, column0, s0, count = position(step0 + i, part, width, lines, S_BLOCK, POOL)
        s = s0 + i_s  # [S_BLOCK]
        column = column0 + i_s
        if WIDE:
            line, column, s = tl.cast(line, tl.int64), column.to(tl.int64), s.to(tl.int64)
        mask = None if EVEN else (i_s < count)[:, None] & (c < C)[None, :]
        offsets = s[:, None] * C + c[None, :]  # [S_BLOCK, C_BLOCK]
        x_offsets = (2 * line * width_in + 2 * column)[:, None] * C + c[None, :] if POOL else offsets
        x = _read(x_row + x_offsets, mask, C, width_in * C, scale, shift, HAS_SCALE, HAS_SHIFT, RELU, POOL)
        if CLEAN:
            if repeat == 0:
                tl.store(clean_row + offsets, x, mask=mask)
        quad = s.to(tl.uint32)[:, None] * groups.to(tl.uint32) + quad_c.to(tl.uint32)[None, :]
        z0, z1, z2, z3 = normals_run(quad, 1, c_image, c_draw, layer_stream.to(tl.uint32), k0, k1, QUADS, FAST)
        tl.store(y_row + offsets, x + sigma * channels_last(z0, z1, z2, z3), mask=mask)


@triton.jit(do_not_specialize=[*_INTEGERS])
def _add_noise_planar_kernel(
    x_ptr, y_ptr, clean_ptr, sigma_ptr, scale_ptr, shift_ptr, seed_ptr, ids_ptr,
    layer_stream, image_offset, draw_offset, images, repeats, tiles, steps, parts, width, lines, width_in, height_in, C, position_units,
    UNIT: tl.constexpr, SIGMA_VARIES: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, RELU: tl.constexpr,
    HAS_IDS: tl.constexpr, CLEAN: tl.constexpr, POOL: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
    S_BLOCK: tl.constexpr, G_BLOCK: tl.constexpr, RUN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Rows lie [C, S]. A thread takes the quads of RUN neighbouring positions, one run in each of the four channels' planes."""
    S = position_units * UNIT  # so that the compiler knows what divides S
    groups = (C + 3) // 4
    row, image, draw, repeat, tile = locate(repeats, tiles, images)
    g_tiles = (groups + G_BLOCK - 1) // G_BLOCK
    s_tile = tile // g_tiles
    part = s_tile % parts if POOL else 0
    step0 = (s_tile // parts if POOL else s_tile) * steps

    k0, k1 = key_words(seed_ptr)
    c_image, c_draw = place(image, draw, image_offset, draw_offset, ids_ptr, HAS_IDS)
    i_s = tl.arange(0, S_BLOCK)  # [S_BLOCK]
    i_run = tl.arange(0, S_BLOCK // RUN) * RUN  # where each thread's run begins
    g = (tile - s_tile * g_tiles) * G_BLOCK + tl.arange(0, G_BLOCK)  # [G_BLOCK]
    one_sigma = _parameter(sigma_ptr, g, None, 0.0, not SIGMA_VARIES, False)[:, None]
    plane_in = width_in.to(tl.int64) * height_in if POOL else S
    if not WIDE:
        plane_in = plane_in.to(tl.int32)
        plane = S
    else:
        plane = S.to(tl.int64)
    x_row = x_ptr + row * C * plane_in
    y_row = y_ptr + (draw.to(tl.int64) * images + image) * C * plane
    clean_row = clean_ptr + row * C * plane if CLEAN else clean_ptr
    for i in tl.range(0, steps, num_stages=1):
        line, column0, s0, count = position(step0 + i, part, width, lines, S_BLOCK, POOL)
        s = s0 + i_s  # [S_BLOCK]
        column = column0 + i_s
        if WIDE:
            line, column, s = tl.cast(line, tl.int64), column.to(tl.int64), s.to(tl.int64)
        s_in = 2 * line * width_in + 2 * column if POOL else s
        quad = (s0 + i_run).to(tl.uint32)[None, :] * groups.to(tl.uint32) + g.to(tl.uint32)[:, None]  # [G_BLOCK, S_BLOCK / RUN]
        z = normals_run(quad, groups.to(tl.uint32), c_image, c_draw, layer_stream.to(tl.uint32), k0, k1, RUN, FAST)
        for lane in tl.static_range(LANES):
            c = 4 * g + lane  # [G_BLOCK]
            c_mask = None if EVEN else c < C
            mask = None if EVEN else (i_s < count)[None, :] & (c < C)[:, None]
            sigma = _parameter(sigma_ptr, c, c_mask, 0.0, SIGMA_VARIES, True)[:, None] if SIGMA_VARIES else one_sigma
            scale = _parameter(scale_ptr, c, c_mask, 1.0, HAS_SCALE, True)[:, None]
            shift = _parameter(shift_ptr, c, c_mask, 0.0, HAS_SHIFT, True)[:, None]
            x_ptrs = x_row + c[:, None] * plane_in + s_in[None, :]  # [G_BLOCK, S_BLOCK]
            offsets = c[:, None] * plane + s[None, :]
            x = _read(x_ptrs, mask, 1, width_in, scale, shift, HAS_SCALE, HAS_SHIFT, RELU, POOL)
            if CLEAN:
                if repeat == 0:
                    tl.store(clean_row + offsets, x, mask=mask)
            tl.store(y_row + offsets, x + sigma * z[lane], mask=mask)


def add_noise(x, out, flat, sigma, at, scale=None, shift=None, relu=False, clean=None, pool=False) -> None:
    """Fills ``out`` [draws * images, C, *spatial] with ``act(x * scale + shift) + sigma * eps``.

    x [images or draws * images, C, *spatial] and out (and clean) lie alike in memory: contiguous, or channels last where ``flat``.
    sigma float32 of 1 or C values, scale and shift float32 [C] or None; all contiguous and on one device, as the tensors of
    ``at``, the noise's address (its seed int64 of one value, its sample_ids int64 [images, 2] or None).
    clean: None, or a tensor like x (like out, if out has fewer positions) that receives the activation without noise, one row for
    each row of x. pool: the largest of each 2x2 window of the activation goes on; x [*, C, H, W], out [*, C, H // 2, W // 2].
    """
    if not out.numel():
        return
    words = word(at.stream), word(at.image_offset), word(at.draw_offset)
    affine, varies = (scale is not None, shift is not None), sigma.numel() > 1
    key = flat, x.dtype, x.shape, out.shape, at.images, varies, affine, relu, at.sample_ids is not None, clean is not None, pool

    def run(config, y=out):
        launch(_plan, (x, y, clean, sigma, scale, shift, at.seed, at.sample_ids), words, *key, config)

    fused = varies or relu or pool or any(affine)
    config = default(x.element_size(), fused)
    if tuning(x):
        walk = "add_noise", f"flat{flat:d}", f"fused{fused:d}", f"pool{pool:d}", x.dtype, f"C{x.shape[1]}", f"2^{out.numel().bit_length()}"
        # Not over x, where the noise of all trials would pile up.
        config = tuned(x, config, CANDIDATES, lambda config: run(config, torch.empty_like(out)), *walk)
    run(config)


def _plan(flat, dtype, shape_in, shape_out, images, varies, affine, relu, sample_ids, clean, pool, config: Config):
    """(kernel, programs, arguments behind tensors and words) for rows of shape_out[1:], made of rows of shape_in[1:]."""
    rows, channels, *spatial = shape_out
    lines, width = spatial if pool else (1, math.prod(spatial))
    plan = plan_flat if flat or math.prod(shape_in[2:]) == 1 else plan_planar  # of one position, rows lie either way
    kernel, programs, tiling = plan(channels, lines, width, rows, dtype.itemsize, not (varies or any(affine)), varies, pool, config)
    others = dict(
        images=images, repeats=rows // shape_in[0], width_in=shape_in[3] if pool else 1, height_in=shape_in[2] if pool else 1,
        SIGMA_VARIES=varies, HAS_SCALE=affine[0], HAS_SHIFT=affine[1], RELU=relu, HAS_IDS=sample_ids, CLEAN=clean, POOL=pool,
        WIDE=math.prod(shape_in[1:]) >= ENOUGH_32_BITS, FAST=fast_math(),
    )  # fmt: skip
    return kernel, programs, {**others, **tiling}


def plan_flat(channels, lines, width, rows, itemsize, one_value, sigma_varies, pool, config: Config):
    """(kernel, programs, the arguments that say how the rows are tiled) for rows [S, C]."""
    if one_value and channels % 4 == 0 and not pool:
        # Channels do not matter then, and quads follow each other in memory: any cut of the row will do.
        size = channels * width
        channels = divisor(size, 64)
        width = size // channels
    c_block = _channel_block(channels)
    quads = 2 if itemsize == 2 and channels % 8 == 0 else 1  # 16 bytes in one piece where there are any
    s_block = min(max(1, config.threads * config.quads * 4 // c_block), triton.next_power_of_2(width))
    # Parameters of fewer channels than there are threads stay in registers where they are used.
    threads = max(_threads(s_block * c_block // 4, config), 1 if one_value else 2 * c_block)
    tiles_c, parts = triton.cdiv(channels, c_block), triton.cdiv(width, s_block) if pool else 1
    tiles_s = lines if pool else triton.cdiv(width, s_block)
    steps = loop_steps(tiles_s, rows * tiles_c * tiles_s * parts, config.steps)
    tiles = tiles_c * parts * (tiles_s // steps)
    unit = divisor(channels, 16)
    shape = dict(
        tiles=tiles, steps=steps, parts=parts, width=width, lines=lines, channel_units=channels // unit, UNIT=unit,
        EVEN=width % s_block == 0 and channels % c_block == 0, TILES_C=tiles_c, S_BLOCK=s_block, C_BLOCK=c_block, QUADS=quads,
        num_warps=warps(threads),
    )  # fmt: skip
    return _add_noise_flat_kernel, rows * tiles, shape


def plan_planar(channels, lines, width, rows, itemsize, one_value, sigma_varies, pool, config: Config):
    """(kernel, programs, the arguments that say how the rows are tiled) for rows [C, S]."""
    groups = triton.cdiv(channels, 4)
    run = divisor(width, 4 if pool else 16 // itemsize)
    quads = config.threads * max(run, config.quads)
    s_block = min(quads, triton.next_power_of_2(width))
    g_block = min(quads // s_block, triton.next_power_of_2(groups))
    tiles_g, parts = triton.cdiv(groups, g_block), triton.cdiv(width, s_block) if pool else 1
    tiles_s = lines if pool else triton.cdiv(width, s_block)
    steps = loop_steps(tiles_s, rows * tiles_g * tiles_s * parts, config.steps)
    tiles = tiles_g * parts * (tiles_s // steps)
    unit = divisor(lines * width, 16)
    whole_quads = channels % (4 * g_block) == 0 or (channels < 4 and g_block == 1)
    shape = dict(
        tiles=tiles, steps=steps, parts=parts, width=width, lines=lines, C=channels, position_units=lines * width // unit, UNIT=unit,
        EVEN=width % s_block == 0 and whole_quads, S_BLOCK=s_block, G_BLOCK=g_block, RUN=run, LANES=min(4, channels),
        num_warps=warps(_threads(s_block * g_block * config.quads // max(run, config.quads), config)),
    )  # fmt: skip
    if shape["EVEN"] and run > 1 and channels >= 4 and not pool and not sigma_varies:
        # These fit 64 registers without a spill, if told to; the others would spill.
        shape.update(register_limit(64))
    return _add_noise_planar_kernel, rows * tiles, shape


def _channel_block(channels: int) -> int:
    """The block of channels, at most 64, that wastes fewest; the larger of equals, and no narrower than a memory sector needs."""
    choices = [b for b in (64, 32, 16, 8, 4) if b >= 16 or b == triton.next_power_of_2(max(channels, 4))]
    return min(choices, key=lambda b: triton.cdiv(channels, b) * b)


def _threads(quads: int, config: Config) -> int:
    return max(32, min(config.threads, quads // config.quads))
