"""Noise on the CPU: the launcher of the C++ library, on tensors. Importing this opens nothing; the first call does."""

import ctypes

import torch

from .loader import Library, load

__all__ = ["DTYPES", "Library", "add_noise", "load"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_pointer, _i32, _i64, _u32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32
_SIGNATURE = (
    _pointer, _pointer, _i32, _i32, *[_i64] * 5, _pointer, _u32, _u32, _u32, _pointer, _pointer, _i64, _pointer, _pointer, _i32, _i32,
)  # fmt: skip


def add_noise(x, out, flat, sigma, seed, stream, images, draws, image0, draw0, scale, shift, relu, places=None) -> None:
    """Fills ``out`` [draws * images, C, *spatial] with ``act(x * scale + shift) + sigma * eps``.

    x [images or draws * images, C, *spatial] and out lie alike in memory: contiguous, or channels last where ``flat``. sigma float32
    of 1 or C values, scale and shift float32 [C] or None; seed int64 of one value; places int64 [images, 2] or None; all contiguous and
    on the CPU.
    """
    if not out.numel():
        return
    handle = load().handle
    function = handle.rse_add_noise
    if not function.argtypes:
        function.argtypes, function.restype = _SIGNATURE, ctypes.c_int
    channels = x.shape[1]
    failed = function(
        x.data_ptr(), out.data_ptr(), DTYPES[x.dtype], flat, x.shape[0], images, draws, channels, out.numel() // out.shape[0] // channels,
        seed.data_ptr(), stream, image0, draw0, None if places is None else places.data_ptr(), sigma.data_ptr(), sigma.numel(),
        None if scale is None else scale.data_ptr(), None if shift is None else shift.data_ptr(), relu, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("the CPU noise kernel could not allocate its per-channel tables")
