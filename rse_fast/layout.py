"""The memory layout of a batch of images, and memory for another batch of the same layout."""

import math

import torch


def layout(x: torch.Tensor) -> str | None:
    """How ``x`` [rows, C, *spatial] lies in memory: "planar" (contiguous), "flat" (channels last) or None (neither)."""
    if x.is_contiguous():
        return "planar"
    if x.dim() == 4:
        return "flat" if x.is_contiguous(memory_format=torch.channels_last) else None
    return "flat" if x.movedim(1, -1).is_contiguous() else None


def packed_like(
    x: torch.Tensor, rows: int, pool: bool = False, dtype: torch.dtype | None = None, memory: torch.Tensor | None = None
) -> torch.Tensor:
    """An uninitialised tensor of ``rows`` rows like those of ``x``, or of its 2x2 max-pool, in the layout of ``x`` and its dtype.

    Contiguous where ``x`` is in neither layout. memory: one-dimensional, at least as long and of that dtype; the tensor is a view of it.
    """
    memory_layout = layout(x)
    if memory_layout and rows == x.shape[0] and not pool and dtype is None and memory is None:
        return torch.empty_like(x)
    spatial = [n // 2 for n in x.shape[2:]] if pool else x.shape[2:]
    shape = (rows, x.shape[1], *spatial)
    if memory_layout != "flat":
        return x.new_empty(shape, dtype=dtype) if memory is None else memory[: math.prod(shape)].view(shape)
    strides, step = [1] * len(shape), shape[1]
    for d in range(len(shape) - 1, 1, -1):
        strides[d], step = step, step * max(shape[d], 1)
    strides[0] = step
    if memory is not None:
        return memory.as_strided(shape, strides)
    return x.new_empty_strided(shape, strides, dtype=dtype)  # and no view, which forward mode takes for no result of its own
