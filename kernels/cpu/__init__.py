"""Noise on the CPU: the launcher of the C++ library, on tensors. Importing this opens nothing; the first call does."""

import ctypes

import torch

from .loader import Library, load

__all__ = ["BYTE_DTYPES", "DTYPES", "Library", "add_noise", "load"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BYTE_DTYPES = {**DTYPES, torch.uint8: 3, torch.int32: 4}  # of which it makes bytes

_pointer, _i32, _i64, _u32, _f64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_double
_SIGNATURE = (
    *[_pointer] * 3, _i32, _i32, _f64, _i32, _i32, *[_i64] * 7, _pointer, *[_u32] * 3, _pointer, _pointer, _i64, _pointer, _pointer, _i32,
    _i32,
)  # fmt: skip


def add_noise(
    x, out, flat, sigma, seed, stream, images, draws, image_offset, draw_offset, scale, shift, relu, sample_ids=None, clean=None, pool=False, step=1.0,
    zero_point=0,
) -> None:  # fmt: skip
    """Fills ``out`` [draws * images, C, *spatial] with ``act(x * scale + shift) + sigma * eps``.

    x [images or draws * images, C, *spatial] and out lie alike in memory: contiguous, or channels last where ``flat``. sigma float32
    of 1 or C values, scale and shift float32 [C] or None; seed int64 of one value; sample_ids int64 [images, 2] or None; all contiguous and
    on the CPU. ``clean``, if given, has the shape, dtype and layout of x and takes ``act(x * scale + shift)``.

    out has the dtype of x (one of `DTYPES`), or is uint8 for an x of these, uint8 or int32: sigma, scale and shift are then in steps of
    out, which takes ``saturate(zero_point + rint(value))``, rint to nearest even; there is no ``clean`` then.
    """
    if not out.numel():
        return
    handle = load().handle
    function = handle.rse_add_noise
    if not function.argtypes:
        function.argtypes, function.restype = _SIGNATURE, ctypes.c_int
    channels = x.shape[1]
    pointer = lambda t: None if t is None else t.data_ptr()  # noqa: E731
    failed = function(
        x.data_ptr(), out.data_ptr(), pointer(clean), BYTE_DTYPES[x.dtype], BYTE_DTYPES[out.dtype], step, zero_point, flat,
        x.shape[0], images, draws, channels, out.numel() // out.shape[0] // channels,
        x.numel() // x.shape[0] // channels, x.shape[3] if pool else 0,
        seed.data_ptr(), stream, image_offset, draw_offset, pointer(sample_ids), sigma.data_ptr(), sigma.numel(), pointer(scale), pointer(shift), relu,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed == 2:
        raise TypeError(f"the CPU noise kernel does not make {out.dtype} of {x.dtype}, zero_point {zero_point}")
    if failed:
        raise MemoryError("the CPU noise kernel could not allocate its per-channel tables")
