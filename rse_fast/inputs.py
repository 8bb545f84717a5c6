"""Batches of images out of what people have at hand: tensors, NumPy arrays, PIL images. Only what can mean one thing is converted."""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rse_fast import arguments


def batch(x: object, model: nn.Module, argument: str = "x") -> Tensor:
    """A batch of images as a tensor.

    Args:
        x: a tensor of floats [B, ...], as it is; a NumPy array of floats [B, C, H, W], as the model takes them, or of uint8 [B, H, W, C] or
            [H, W, C], which are scaled to [0, 1]; a PIL image, or a list of PIL images of one size.
        model: its first convolution says how many channels C an image has, beside the usual 1 and 3.
        argument: what the caller's user knows the images as.

    Returns:
        The tensor itself; of floats a tensor of the model's dtype, else float32 [B, C, H, W], both on the CPU.

    Raises:
        TypeError: it is none of these.
        ValueError: it could mean two things, has other channels, or no pixels; the message has the line to write.
    """
    x = x if isinstance(x, Tensor) else _converted(x, model, argument)
    if not arguments.is_dense(x):
        arguments.check_dense(argument, x)
    if not x.is_floating_point():
        line = f"; write {argument}.float() / 255" if x.dtype == torch.uint8 else ""
        raise TypeError(f"{argument} must be a floating-point tensor (images scaled to [0, 1]), got {x.dtype}{line}")
    if x.dim() < 2:
        raise ValueError(f"{argument} must be a batch [B, ...], got shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{argument} must be a batch [B, ...] of images that have pixels, got shape {tuple(x.shape)}")
    return x


def _converted(x: Any, model: nn.Module, argument: str) -> Tensor:
    if isinstance(x, (list, tuple)) and x and all(map(_is_pil, x)):
        if len({image.size for image in x}) > 1:
            raise ValueError(f"{argument} must have PIL images of one size; write image.resize((width, height)) for each first")
        return _converted(np.stack([_pixels(image, model, argument) for image in x]), model, argument)
    if _is_pil(x):
        return _converted(_pixels(x, model, argument), model, argument)
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{argument} must be a tensor, a NumPy array, a PIL image or a list of PIL images, got {_described(x, argument)}")
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{argument} must be an array without a mask, got a masked one; write {argument}.filled(value)")
    if x.dtype.kind == "f":
        _check_channels(x, 1, model, argument)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        known = np.float64 if x.dtype.itemsize > 8 else x.dtype.newbyteorder("=")  # torch knows neither long doubles nor foreign bytes
        return torch.from_numpy(np.require(x, known, ["C", "W"])).to(dtype)
    if x.dtype != np.uint8:
        raise TypeError(
            f"{argument} must be an array of floats or of uint8, got {x.dtype}; write torch.from_numpy({argument}).float() / scale"
        )
    if x.ndim not in (3, 4):
        line = f"{argument}[:, :, None] for one grey image" if x.ndim == 2 else f"torch.from_numpy({argument}).float() / 255"
        raise ValueError(f"{argument} of uint8 must be [B, H, W, C] or [H, W, C], got shape {x.shape}; write {line}")
    x = x[None] if x.ndim == 3 else x
    _check_channels(x, 3, model, argument)
    return torch.from_numpy(np.require(x.transpose(0, 3, 1, 2), requirements=["C", "W"])).float().div_(255)


def device(x: object) -> torch.device:
    """Where the results for images x go: to them. Arrays and pictures lie in the host's memory."""
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


def _check_channels(x: Any, at: int, model: nn.Module, argument: str) -> None:
    """Raises ValueError unless dimension ``at`` alone of an array [B, ., ., .] can be the channels. That a first convolution takes another
    number of them does not rule out 1 or 3, which a model may rearrange for it: whether it does is found out by running it."""
    if x.ndim != 4:
        if at == 1 and x.ndim > 1:  # a model of sequences or volumes; what it takes, it knows
            return
        raise ValueError(f"{argument} must be a batch [B, ...], got shape {x.shape}; write {argument}[None] for one image")
    wanted = _channels(model)
    usual, other = (wanted, 1, 3), 3 if at == 1 else 1
    if x.shape[at] == wanted and (x.shape[other] != wanted or at == 1):
        return
    if at == 1 and (x.shape[1] in usual or x.shape[3] not in usual) or at == 3 and x.shape[3] in usual and x.shape[1] not in usual:
        return
    if x.shape[at] in usual:
        line = f"torch.from_numpy({argument}).float() / 255 in [B, C, H, W]"
        raise ValueError(f"{argument} of shape {x.shape} may have its channels first or last; write {line}")
    line = f"{argument}.transpose(0, 3, 1, 2)" if at == 1 else f"torch.from_numpy({argument}).float() / 255"
    shape = f"{'[B, C, H, W]' if at == 1 else '[B, H, W, C]'} with C = {'1 or 3' if wanted is None else wanted} channels"
    raise ValueError(f"{argument} must be {shape}, got shape {x.shape}; if its channels lie elsewhere, write {line}")


def _channels(model: nn.Module) -> int | None:
    first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    return None if first is None else first.in_channels


def _described(x: object, argument: str) -> str:
    if not isinstance(x, (list, tuple)):
        return type(x).__name__
    got = f"{type(x).__name__} of {' and '.join(sorted({type(image).__name__ for image in x})) or 'nothing'}"
    for kind, stack in ((Tensor, "torch.stack"), (np.ndarray, "numpy.stack")):
        if x and all(isinstance(image, kind) for image in x):
            return f"{got}; write {stack}({argument})"
    return got


def _is_pil(x: object) -> bool:
    pil = sys.modules.get("PIL.Image")  # who has such an image has imported it
    return pil is not None and isinstance(x, pil.Image)


def _pixels(image: Any, model: nn.Module, argument: str) -> Any:
    """uint8 [H, W, C] of a PIL image in the mode that the model's channels ask for."""
    wanted = "L" if _channels(model) == 1 else "RGB"
    if image.mode != wanted:
        line = f"image.convert({wanted!r})"
        raise ValueError(f"{argument} must be a PIL image of mode {wanted!r} for this model, got {image.mode!r}; write {line}")
    pixels = np.array(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[..., None]
