"""On a device: the fast functions at every radius word there is."""

import torch
import triton
import triton.language as tl

from rse_fast.kernels.triton import philox as device
from rse_fast.kernels.triton.config import fast_math

BLOCK = tl.constexpr(4096)


@triton.jit
def _sweep_kernel(first, angle, bad_ptr, largest_ptr, FAST: tl.constexpr):
    w0 = (first + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    w1 = tl.full((BLOCK,), angle, tl.int64).to(tl.uint32)
    z0, z1 = device.box_muller(w0, w1, FAST)
    bad = ((z0 != z0) | (z1 != z1)).to(tl.int32)
    tl.atomic_add(bad_ptr, tl.sum(bad))
    tl.atomic_max(largest_ptr, tl.max(tl.maximum(tl.abs(z0), tl.abs(z1))))


@triton.jit
def _angle_kernel(first, error_ptr, FAST: tl.constexpr):
    w1 = (first + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    w0 = tl.zeros((BLOCK,), tl.uint32)  # the largest radius there is
    z0, z1 = device.box_muller(w0, w1, FAST)
    u, v = device.uniforms(w0, w1)
    radius = tl.sqrt(-2.0 * tl.log(u.to(tl.float64)))
    angle = v.to(tl.float64) * 3.141592653589793
    error = tl.maximum(tl.abs(z0 - radius * tl.cos(angle)), tl.abs(z1 - radius * tl.sin(angle)))
    tl.atomic_max(error_ptr, tl.max(error).to(tl.float32))


def test_no_radius_word_gives_nan_and_none_is_out_of_range():
    bad, largest = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    for first in range(0, 2**32, 2**28):
        for angle in (0, 2**29 + 12345):
            _sweep_kernel[(2**28 // 4096,)](first, angle, bad, largest, fast_math())
    assert bad.item() == 0 and largest.item() <= 6.77


def test_every_angle_word_at_the_largest_radius_is_within_the_contract():
    error = torch.zeros(1)
    for first in range(0, 2**32, 2**28):
        _angle_kernel[(2**28 // 4096,)](first, error, fast_math())
    assert error.item() <= 2e-5
