"""Device functions of the noise contract: Philox4x32-10 (Salmon et al., SC 2011), its uniforms, and Box-Muller.

Nothing here loads, stores or launches. Counters and keys are uint32 tiles or scalars; what is a scalar at the call (the draw, the image,
the stream, the key) stays one through the first rounds, which the compiler then does once a program.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)
_MINUS_TWO_LN2 = tl.constexpr(-1.3862943611198906)


@triton.jit
def key_words(seed_ptr):
    """(low, high) word of the seed: one int64 on the device, so no launch waits for its value."""
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def place(image, draw, image_offset, draw_offset, ids_ptr, HAS_IDS: tl.constexpr):
    """Counter words (image, draw) of packed row ``draw * images + image``; with HAS_IDS from int64 [images, 2] of (image, first draw)."""
    if HAS_IDS:
        first = tl.load(ids_ptr + 2 * image + 1)
        return tl.load(ids_ptr + 2 * image).to(tl.uint32), first.to(tl.uint32) + draw.to(tl.uint32)
    else:
        return image_offset.to(tl.uint32) + image.to(tl.uint32), draw_offset.to(tl.uint32) + draw.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr = 10):
    """The four words of counter (c0, c1, c2, c3) under key (k0, k1); all uint32, broadcast against each other."""
    for _ in tl.static_range(ROUNDS):
        # One 64-bit product gives both halves in one instruction; umulhi and a low product cost two.
        p0 = c0.to(tl.uint64) * _M0
        p1 = c2.to(tl.uint64) * _M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += _W0
        k1 += _W1
    return c0, c1, c2, c3


@triton.jit
def uniforms(w0, w1):
    """Radius fl(fl(w0) * 2^-32 + 2^-33) in (0, 1] and angle fl(int32(w1)) * 2^-31 in [-1, 1], float32.

    Only sums round here, the scalings are exact: fusing a multiplication with what follows it changes no bit.
    """
    u = w0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    v = w1.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    return u, v


@triton.jit
def box_muller(w0, w1, FAST: tl.constexpr):
    """Two normals of two words. FAST: CUDA's approximate log2, sin and cos; otherwise `tl`'s, for HIP and the interpreter.

    Error of the fast functions (PTX manual): lg2.approx 2^-22 absolute near 1, sin.approx and cos.approx 2^-20.5 absolute in
    [-pi, pi], where every angle here lies; so no reduction is needed. At |z| <= 6.77 that is below 1e-5, and below 5e-4 where
    the radius is so small that the logarithm's error dominates.
    """
    u, v = uniforms(w0, w1)
    if FAST:
        square = libdevice.fast_log2f(u) * _MINUS_TWO_LN2
    else:
        square = tl.log(u) * -2.0
    # The approximate logarithm may come out positive just below 1.
    r = tl.sqrt(tl.maximum(square, 0.0))
    angle = v * 3.141592653589793
    if FAST:
        return r * libdevice.fast_cosf(angle), r * libdevice.fast_sinf(angle)
    else:
        return r * tl.cos(angle), r * tl.sin(angle)


@triton.jit
def normals(quad, image, draw, stream, k0, k1, FAST: tl.constexpr):
    """The normals of lanes 0, 1, 2, 3 of each quad."""
    w0, w1, w2, w3 = philox(quad, image, draw, stream, k0, k1)
    z0, z1 = box_muller(w0, w1, FAST)
    z2, z3 = box_muller(w2, w3, FAST)
    return z0, z1, z2, z3


@triton.jit
def normals_run(quad, step, image, draw, stream, k0, k1, N: tl.constexpr, FAST: tl.constexpr):
    """`normals` of the N quads ``quad + i * step``, side by side in the last dimension: [A, B] quads give four tiles [A, B * N].

    One thread computes all N. Had the quads come from one arange, they would be spread over threads, and shared memory would have
    to gather what a thread stores with one instruction.
    """
    if N == 1:
        z0, z1, z2, z3 = normals(quad, image, draw, stream, k0, k1, FAST)
    else:
        a0, a1, a2, a3 = normals_run(quad, step * 2, image, draw, stream, k0, k1, N // 2, FAST)
        b0, b1, b2, b3 = normals_run(quad + step, step * 2, image, draw, stream, k0, k1, N // 2, FAST)
        z0 = tl.interleave(a0, b0)
        z1 = tl.interleave(a1, b1)
        z2 = tl.interleave(a2, b2)
        z3 = tl.interleave(a3, b3)
    return z0, z1, z2, z3


@triton.jit
def channels_last(z0, z1, z2, z3):
    """Four tiles [A, B], one a lane, as one tile [A, 4 * B] of channels."""
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
