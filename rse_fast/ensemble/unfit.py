"""Why a model does not take images of some shape: which of its layers gets what it was not made for."""

import torch
from torch import Tensor, nn

from rse_fast.context import NoiseContext
from rse_fast.convert import meta_copy
from rse_fast.input_noise import Normalize

_BATCH = {1: "[N, C, L]", 2: "[N, C, H, W]", 3: "[N, C, D, H, W]"}  # by the dimensions of a convolution's kernel


class _Unfit(Exception):
    """Ends the run at the layer."""


def unfit(model: nn.Module, shape: torch.Size, argument: str = "x") -> str | None:
    """Runs a copy of the model on the meta device, to say more than torch's error of a run that has failed.

    Args:
        model: whose convolutions, linear layers and normalisations by channel are watched.
        shape: of a batch of images [B, ...].
        argument: what the caller's user knows the images as.

    Returns:
        What the images must be, and what they are; None where no such layer gets a wrong shape.
    """
    image = (1, *shape[1:])

    def check(name, layer):
        def before(module, args):
            got = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else image
            if wanted := _wanted(layer, got, got == image):
                if got == image:
                    raise _Unfit(f"{argument} must be {wanted}, got shape {tuple(shape)}{_advice(layer, argument, shape)}")
                inner = ", ".join(["N", *map(str, got[1:])])
                text = f"does not fit the model: its layer {name!r} must get {wanted}, got [{inner}]"
                raise _Unfit(f"{argument} of shape {tuple(shape)} {text}")

        return before

    try:
        copied = meta_copy(model).eval().float()
        for name, layer in copied.named_modules():
            if isinstance(layer, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, Normalize)):
                layer.register_forward_pre_hook(check(name, layer))
        with torch.no_grad(), NoiseContext(torch.zeros((), dtype=torch.int64, device="cpu"), 1):
            copied(torch.empty(image, dtype=torch.float32, device="meta"))
    except _Unfit as found:
        return str(found)
    except Exception:  # another layer refuses, or the forward needs data
        return None
    return None


def _wanted(layer: nn.Module, got: tuple[int, ...], is_image: bool) -> str | None:
    """What a layer's input must be; None if it is."""
    if isinstance(layer, nn.Linear):
        return None if got[-1] == layer.in_features else f"[N, ..., F] with F = {layer.in_features} features"
    if isinstance(layer, Normalize):
        return None if layer.takes(got) and not (is_image and len(got) == 3) else f"{_BATCH[2]} with C = {len(layer.mean)} channels"
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return None if layer.num_features in (0, *got[1:2]) else f"[N, C, ...] with C = {layer.num_features} channels"
    spatial, batch = len(layer.kernel_size), _BATCH[len(layer.kernel_size)]
    if len(got) == spatial + 1 and not is_image:  # one map without a batch, which all images may share
        return None
    if len(got) != spatial + 2 or layer.in_channels not in (0, got[1]):  # 0: a lazy layer, which takes any
        return f"{batch} with C = {layer.in_channels} channels"
    if layer.transposed:
        return None
    padding = layer._reversed_padding_repeated_twice[::-1]  # two numbers a dimension, also for "same" and "valid"
    least = [
        dilation * (size - 1) + 1 - sum(padding[2 * i : 2 * i + 2])
        for i, (dilation, size) in enumerate(zip(layer.dilation, layer.kernel_size, strict=True))
    ]
    if any(have < need for have, need in zip(got[2:], least, strict=True)):
        return f"{batch} of at least {' x '.join(map(str, least))} pixels"
    return None


def _advice(layer: nn.Module, argument: str, shape: torch.Size) -> str:
    if isinstance(layer, Normalize):
        rank, channels = 4, len(layer.mean)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        rank, channels = len(layer.kernel_size) + 2, layer.in_channels
    else:
        return ""
    if len(shape) == rank - 1 and shape[0] == channels:
        return f"; write {argument}[None] for one image"
    if len(shape) == rank and shape[-1] == channels != shape[1]:
        return f"; write {argument}.movedim(-1, 1) if its channels lie last"
    if len(shape) == rank - 1 and shape[-1] == channels:
        return f"; write torch.as_tensor({argument}).movedim(-1, 0)[None] for one image whose channels lie last"
    if channels == 1 and len(shape) in (rank - 1, rank - 2):
        return f"; write {argument}[:, None] for images of one channel" if len(shape) == rank - 1 else f"; write {argument}[None, None]"
    return ""
