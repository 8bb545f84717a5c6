"""Noise on the CPU: the launcher of the C++ library, on tensors. Importing this opens nothing; the first call does."""

import ctypes
import functools

import torch

from .loader import Library, load

__all__ = ["BYTE_DTYPES", "DTYPES", "TOO_FEW_STEPS", "Library", "add_noise", "load"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BYTE_DTYPES = {**DTYPES, torch.uint8: 3, torch.int32: 4}  # of which it makes bytes

TOO_FEW_STEPS = "step must be large enough for sigma, scale and shift to be at most 2^124 steps"

_pointer, _i32, _i64, _u32, _f64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_double
_SIGNATURE = (
    *[_pointer] * 3, _i32, _i32, _f64, _i32, _i32, *[_i64] * 7, _pointer, *[_u32] * 3, _pointer, _pointer, _i64, _pointer, _pointer, _i32,
    _i32,
)  # fmt: skip


def add_noise(x, out, flat, sigma, at, scale, shift, relu, clean=None, pool=False, step=1.0, zero_point=0) -> None:
    """Fills ``out`` [draws * images, C, *spatial] with ``act(x * scale + shift) + sigma * eps``.

    x [images or draws * images, C, *spatial] and out lie alike in memory: contiguous, or channels last where ``flat``. sigma float32
    of 1 or C values, scale and shift float32 [C] or None; all contiguous and on the CPU, as the tensors of ``at``, the noise's address (its
    seed int64 of one value, its sample_ids int64 [images, 2] or None). ``clean``, if given, has the shape, dtype and layout of x and takes
    ``act(x * scale + shift)``.

    out has the dtype of x (one of `DTYPES`), or is uint8 for an x of these, uint8 or int32: sigma, scale and shift are then in steps of
    out, which takes ``saturate(zero_point + rint(value))``, rint to nearest even; there is no ``clean`` then.
    """
    elements = out.numel()
    if not elements:
        return
    run, pixels = _function(), out.shape[0] * out.shape[1]
    failed = run(
        x.data_ptr(), out.data_ptr(), None if clean is None else clean.data_ptr(), BYTE_DTYPES[x.dtype], BYTE_DTYPES[out.dtype],
        step, zero_point, flat, x.shape[0], at.images, at.draws, x.shape[1], elements // pixels,
        x.numel() // (x.shape[0] * x.shape[1]) if pool else elements // pixels, x.shape[3] if pool else 0,
        at.seed.data_ptr(), at.stream, at.image_offset, at.draw_offset, None if at.sample_ids is None else at.sample_ids.data_ptr(),
        sigma.data_ptr(), sigma.numel(), None if scale is None else scale.data_ptr(), None if shift is None else shift.data_ptr(), relu,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed == 2:
        raise TypeError(f"the CPU noise kernel does not make {out.dtype} of {x.dtype}, zero_point {zero_point}")
    if failed == 3:
        raise ValueError(TOO_FEW_STEPS)
    if failed:
        raise MemoryError("the CPU noise kernel could not allocate its per-channel tables")


@functools.cache
def _function():
    function = load().handle.rse_add_noise
    function.argtypes, function.restype = _SIGNATURE, ctypes.c_int
    return function
