"""Public functions: they check their arguments, choose the backend and call `autograd` or `ops`.

Every function takes ``seed`` (an int, taken modulo 2^64, or an int64 tensor of one value) and addresses eps by it: ``stream`` is the
layer, row ``d * images + i`` of the result is draw ``draw_offset + d`` of image ``image_offset + i``. An input of ``images`` rows is
packed lazily: each image is read once and comes out ``draws`` times. An input of ``draws * images`` rows keeps its rows.
"""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rse_fast import autograd, ops
from rse_fast.address import NoiseAddress
from rse_fast.kernels import cpu, triton
from rse_fast.layout import layout

__all__ = ["activate_noise", "add_noise", "add_noise_", "add_noise_u8", "conv_activate_noise", "noisy_conv", "noisy_conv2d", "noisy_linear"]

BACKENDS = ("auto", "triton", "cpu", "torch")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WORD = 2**32
_MAX = torch.finfo(torch.float32).max

Seed: TypeAlias = int | Tensor  # an int, or an int64 tensor of one value
PerChannel: TypeAlias = float | Tensor  # a number, a 0-dim tensor, or one value a channel
Sizes: TypeAlias = int | Sequence[int]  # of a convolution: one for all spatial dimensions, or one each
Padding: TypeAlias = Sizes | str


def add_noise(
    x: Tensor, sigma: PerChannel, *, seed: Seed, stream: int = 0, images: int | None = None, draws: int = 1, image_offset: int = 0,
    draw_offset: int = 0, sample_ids: Tensor | None = None,
    scale: PerChannel | None = None, shift: PerChannel | None = None, act: str | None = None,
    channel_dim: int = 1, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """``act(x * scale + shift) + sigma * eps``, computed in float32 and rounded once (to nearest even) to the dtype of ``x``.

    Args:
        x: rows [images or draws * images, ...], at least 2-D; float32, bfloat16 or float16 (float64 on the torch backend).
        sigma: standard deviation, >= 0: a number, a 0-dim tensor, or one per channel [C].
        seed: int, taken modulo 2^64, or int64 tensor of one value.
        stream: number of the layer, >= 0.
        images: default ``x.shape[0]``.
        draws: draws of each image. Row ``d * images + i`` of the result is draw d of image i.
        image_offset: index of the first image; indices stay below 2^32.
        draw_offset: index of the first draw.
        sample_ids: None, or int64 [images, 2]: each image's own (image index, first draw), in place of image_offset and draw_offset.
        scale: None, a number, or per channel [C].
        shift: None, a number, or per channel [C]; like scale applied before ``act``.
        act: None or "relu".
        channel_dim: which dimension holds the channels (not 0).
        backend: "auto" may fall back; "triton" (CUDA, ROCm), "cpu" (C++ library) and "torch" never do.

    Returns:
        [draws * images, ...] of x's dtype, device and memory layout (contiguous if x is neither contiguous nor channels last). Gradients
        flow to x, sigma, scale and shift.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape or value. The sign of a sigma that is a CUDA tensor is not checked, since that would
            synchronise the device.

    Examples:
        >>> y = add_noise(torch.zeros(4, 3, 8, 8), 0.1, seed=7, draws=2)  # [8, 3, 8, 8]
    """
    _check_input("x", x, minimum=2)
    channel_dim = integer("channel_dim", channel_dim)
    if not -x.dim() <= channel_dim < x.dim() or channel_dim % x.dim() == 0:
        raise ValueError(f"channel_dim must name a dimension of x other than 0, got {channel_dim} for x of shape {tuple(x.shape)}")
    if act not in (None, "relu"):
        raise ValueError(f"act must be None or 'relu', got {act!r}")
    dense = x.is_contiguous()
    x = x.movedim(channel_dim, 1)
    channels = x.shape[1]
    backend = check_backend(backend, x)
    sigma, at = _address(x, channels, sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    scale, shift = _affine("scale", scale, channels, x), _affine("shift", shift, channels, x)
    y = autograd.add_noise(x, sigma, at, scale, shift, act == "relu", backend).movedim(1, channel_dim)
    return y.contiguous() if dense else y  # copies only where the channels stand between other dimensions


def add_noise_(
    x: Tensor, sigma: PerChannel, *, seed: Seed, stream: int = 0, images: int | None = None, draws: int = 1, image_offset: int = 0,
    draw_offset: int = 0, sample_ids: Tensor | None = None,
    scale: PerChannel | None = None, shift: PerChannel | None = None, act: str | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """`add_noise` in the memory of ``x``. For inference: it has no gradient. Arguments that are not listed are those of `add_noise`.

    Args:
        x: rows [draws * images, C, *spatial], one for each row of the result, contiguous or channels last; dtypes as in `add_noise`. It is
            overwritten.

    Returns:
        ``x`` itself.

    Raises:
        RuntimeError: an input requires a gradient.
        TypeError: an argument has a wrong type or dtype. x was not changed.
        ValueError: an argument has a wrong shape, layout or value. x was not changed.

    Examples:
        >>> add_noise_(x, 0.1, seed=7)
    """
    _check_input("x", x, minimum=2)
    if act not in (None, "relu"):
        raise ValueError(f"act must be None or 'relu', got {act!r}")
    if layout(x) is None:
        raise ValueError(f"x must be contiguous or channels last to be written in place, got strides {x.stride()}")
    backend = check_backend(backend, x)
    sigma, at = _address(x, x.shape[1], sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    if x.shape[0] != at.rows:
        raise ValueError(f"x must have draws * images = {at.rows} rows to be written in place, got {x.shape[0]}")
    scale, shift = _affine("scale", scale, x.shape[1], x), _affine("shift", shift, x.shape[1], x)
    autograd.add_noise_(x, sigma, at, scale, shift, act == "relu", backend)
    return x


def activate_noise(
    x: Tensor, sigma: PerChannel, *, seed: Seed, stream: int = 0, images: int | None = None, draws: int = 1, image_offset: int = 0,
    draw_offset: int = 0, sample_ids: Tensor | None = None,
    scale: PerChannel | None = None, shift: PerChannel | None = None, act: str | None = None, pool: bool = False, clean_output: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """An activation with and without noise in one pass over memory. For inference: it has no gradient.

    Arguments that are not listed are those of `add_noise`.

    Args:
        x: rows [images or draws * images, C, *spatial]; with pool [*, C, H, W], H and W at least 2.
        pool: takes the largest of each 2x2 window of ``act(x * scale + shift)``, before any rounding (NaN if one of the window is NaN).
        clean_output: whether the activation without noise is wanted as well.

    Returns:
        (noisy, clean), both of x's dtype and device. clean is ``act(x * scale + shift)``, pooled if asked for, rounded once: one row for
        each row of x, or no rows without ``clean_output``. noisy is the same value before its rounding plus ``sigma * eps``, rounded once:
        draws * images rows.

    Raises:
        RuntimeError: an input requires a gradient.
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Examples:
        >>> noisy, clean = activate_noise(torch.randn(4, 8, 16, 16), 0.1, seed=7, act="relu", draws=2)  # [8, 8, 16, 16], [4, 8, 16, 16]
    """
    _check_input("x", x, minimum=4 if pool else 2, maximum=4 if pool else None)
    _check_windows(x, pool)
    if act not in (None, "relu"):
        raise ValueError(f"act must be None or 'relu', got {act!r}")
    backend = check_backend(backend, x)
    sigma, at = _address(x, x.shape[1], sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    scale, shift = _affine("scale", scale, x.shape[1], x), _affine("shift", shift, x.shape[1], x)
    return autograd.activate_noise(x, sigma, at, scale, shift, act == "relu", bool(pool), backend, bool(clean_output))


def add_noise_u8(
    x: Tensor, sigma: PerChannel, step: float, zero_point: int, *, seed: Seed, stream: int = 0, images: int | None = None,
    draws: int = 1, image_offset: int = 0, draw_offset: int = 0, sample_ids: Tensor | None = None,
    scale: PerChannel | None = None, shift: PerChannel | None = None, act: str | None = None, pool: bool = False,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """``saturate(zero_point + rint((act(x * scale + shift) + sigma * eps) / step))`` as uint8: the noise is the quantiser's dither.

    It is computed in float32 and rounded once, to nearest even; NaN becomes 0. For inference: it has no gradient. Arguments that are not
    listed are those of `add_noise`.

    Args:
        x: rows [images or draws * images, C, *spatial]: float32, bfloat16, float16, or uint8 and int32, which scale and shift give their
            units.
        sigma: standard deviation >= 0, in the units of the activation: a number or [C]; at most 2^124 steps, as are scale and shift.
        step: units of the activation in one step of the result, > 0.
        zero_point: the byte that means 0, in [0, 255]. Values down to ``-step * zero_point`` fit, so there is room for negative noise.
        pool: as in `activate_noise`.
        backend: "auto", "cpu" or "torch".

    Returns:
        uint8 [draws * images, C, *spatial], pooled if asked for.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Examples:
        >>> y = add_noise_u8(torch.rand(4, 8, 16, 16), 0.1, step=1 / 127, zero_point=64, seed=7, act="relu")
    """
    _check_input("x", x, minimum=4 if pool else 2, maximum=4 if pool else None, dtypes=tuple(cpu.BYTE_DTYPES))
    _check_windows(x, pool)
    if isinstance(step, bool) or not isinstance(step, numbers.Real) or not 0 < step <= _MAX:
        raise ValueError(f"step must be a positive finite number, got {step!r}")
    if not 0 <= integer("zero_point", zero_point) <= 255:
        raise ValueError(f"zero_point must be in [0, 255], got {zero_point}")
    if act not in (None, "relu"):
        raise ValueError(f"act must be None or 'relu', got {act!r}")
    if backend == "triton":
        raise ValueError("backend must be 'auto', 'cpu' or 'torch' for bytes, got 'triton'")
    sigma, at = _address(x, x.shape[1], sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    scale, shift = _affine("scale", scale, x.shape[1], x), _affine("shift", shift, x.shape[1], x)
    backend = check_backend(backend, x, cpu.BYTE_DTYPES)
    step, zero_point = float(step), integer("zero_point", zero_point)
    return ops.add_noise_u8(x, step, zero_point, sigma, *at, scale, shift, act == "relu", bool(pool), backend)


def noisy_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: PerChannel, *, seed: Seed, stream: int = 0, images: int | None = None,
    draws: int = 1, image_offset: int = 0, draw_offset: int = 0, sample_ids: Tensor | None = None,
    stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1, groups: int = 1, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """``conv2d(x + sigma * eps, weight, bias)``: zero padding stays exactly zero, noise is on real pixels only.

    Backward saves the clean ``x``, as a plain convolution would, and the seed. It makes the noisy input again when the weight's gradient
    needs it. Arguments that are not listed are those of `add_noise`.

    Args:
        x: rows [images or draws * images, Cin, H, W]; float32, bfloat16 or float16 (float64 on the torch backend).
        weight: [Cout, Cin / groups, kh, kw], of x's dtype and device (under autocast of any float dtype).
        bias: None, or [Cout].
        sigma: standard deviation >= 0 of the noise on x: a number, a 0-dim tensor, or [Cin].
        stride: a number, or a pair.
        padding: a number, a pair, "valid" or "same".
        dilation: a number, or a pair.
        groups: as in `torch.nn.functional.conv2d`.

    Returns:
        [draws * images, Cout, H', W'] of x's dtype. Gradients flow to x, weight, bias and sigma.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Examples:
        >>> y = noisy_conv2d(torch.rand(4, 3, 8, 8), torch.randn(16, 3, 3, 3), None, 0.1, seed=7, padding=1)  # [4, 16, 8, 8]
    """
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        raise ValueError(f"weight must be a tensor [Cout, Cin / groups, kh, kw], got {_describe(weight)}")
    return noisy_conv(
        x, weight, bias, sigma, seed=seed, stream=stream, images=images, draws=draws, image_offset=image_offset, draw_offset=draw_offset,
        stride=stride, padding=padding, dilation=dilation, groups=groups, backend=backend, sample_ids=sample_ids,
    )  # fmt: skip


def noisy_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: PerChannel, *, seed: Seed, stream: int = 0, images: int | None = None,
    draws: int = 1, image_offset: int = 0, draw_offset: int = 0, sample_ids: Tensor | None = None,
    stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1, groups: int = 1, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """`noisy_conv2d` for one, two or three spatial dimensions.

    Arguments that are not listed are those of `noisy_conv2d` and `add_noise`; so are errors.

    Args:
        x: rows [images or draws * images, Cin, *spatial].
        weight: [Cout, Cin / groups, *kernel], with as many dimensions as x.
        stride: a number, or one for each spatial dimension; so are padding and dilation.

    Returns:
        [draws * images, Cout, *spatial'] of x's dtype. Gradients flow to x, weight, bias and sigma.

    Examples:
        >>> y = noisy_conv(torch.rand(4, 3, 32), torch.randn(16, 3, 5), None, 0.1, seed=7)  # one spatial dimension: [4, 16, 28]
    """
    stride, dilation, groups = _convolution(x, weight, stride, dilation, groups)
    spatial = len(stride)
    _check_bias(bias, weight.shape[0])
    x, weight, bias = autocast(x, weight, bias)
    sigma, at = _address(x, x.shape[1], sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    backend = check_backend(backend, x)
    _check_operands(x, weight, bias)
    zeros = _padding(padding, weight, stride, dilation)
    _output_sizes(x, weight, stride, [sum(p) if isinstance(p, tuple) else 2 * p for p in zeros], dilation)
    if isinstance(zeros, list):
        # Zeros go around the noisy input, so noise has to come first here.
        y = autograd.add_noise(x, sigma, at, backend=backend)
        y = torch.nn.functional.pad(y, [side for pair in reversed(zeros) for side in pair])
        return torch.convolution(y, weight, bias, stride, (0,) * spatial, dilation, False, (0,) * spatial, groups)
    return autograd.noisy_conv(x, weight, bias, sigma, at, stride, zeros, dilation, groups, backend)


def conv_activate_noise(
    x: Tensor, weight: Tensor, sigma: PerChannel, *, seed: Seed, stream: int = 0, images: int | None = None,
    draws: int = 1, image_offset: int = 0, draw_offset: int = 0, sample_ids: Tensor | None = None,
    scale: PerChannel | None = None, shift: PerChannel | None = None, act: str | None = None,
    stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1, groups: int = 1,
    dtype: torch.dtype | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """``act(conv(x, weight) * scale + shift) + sigma * eps``: a convolution with what follows it up to the next layer's noise.

    For inference: it has no gradient. The noise is that of the result. Where `kernels.triton.choices` says so, it is added in the
    convolution's epilogue, before the one rounding; elsewhere by `add_noise` behind the vendor's convolution. Arguments that are not
    listed are those of `noisy_conv` and `add_noise`.

    Args:
        x: rows [images or draws * images, Cin, *spatial]: float, int8 or fp8 (float8_e4m3fn, float8_e4m3fnuz).
        weight: [Cout, Cin / groups, *kernel], of x's dtype.
        sigma: standard deviation >= 0 of the noise on the result, in its units: a number, or [Cout].
        scale: None, a number, or [Cout]. In low precision it also undoes the steps of x and weight and divides by the result's.
        shift: None, a number, or [Cout], in the units of the result.
        padding: a number, one for each spatial dimension, "valid" or "same"; it must be symmetric.
        dtype: of the result, default x's. int8 and fp8 saturate, and the noise acts as dither.

    Returns:
        [draws * images, Cout, *spatial'] of ``dtype``, channels last in memory.

    Raises:
        RuntimeError: an input requires a gradient.
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Examples:
        >>> y = conv_activate_noise(torch.rand(4, 3, 8, 8), torch.randn(16, 3, 3, 3), 0.1, seed=7, act="relu", padding=1)  # [4, 16, 8, 8]
    """
    stride, dilation, groups = _convolution(x, weight, stride, dilation, groups, (*FLOATS, *triton.LOW_PRECISION))
    if x.dtype in triton.LOW_PRECISION and weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype} as x is, got {weight.dtype}")
    dtypes = (*FLOATS, *triton.LOW_PRECISION)
    if dtype is not None and dtype not in dtypes:
        raise TypeError(f"dtype must be None, {_names(dtypes)}, got {dtype}")
    if act not in (None, "relu"):
        raise ValueError(f"act must be None or 'relu', got {act!r}")
    if x.dtype not in triton.LOW_PRECISION:
        x, weight, _ = autocast(x, weight, None)
    zeros = _padding(padding, weight, stride, dilation)
    if not isinstance(zeros, tuple):
        raise ValueError(f"padding must be symmetric, which 'same' is not for a kernel of {tuple(weight.shape[2:])}")
    _check_operands(x, weight, None)
    sizes = _output_sizes(x, weight, stride, [2 * p for p in zeros], dilation)
    backend = check_backend(backend, x, (*cpu.DTYPES, *triton.LOW_PRECISION), (*triton.DTYPES, *triton.LOW_PRECISION))
    sigma, at = _address(x, weight.shape[0], sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids, math.prod(sizes))
    scale, shift = _affine("scale", scale, weight.shape[0], x), _affine("shift", shift, weight.shape[0], x)
    return ops.conv_activate_noise(
        x, weight, sigma, *at, scale, shift, act == "relu", stride, zeros, dilation, groups, dtype, backend
    )  # fmt: skip


def noisy_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: PerChannel, *, seed: Seed, stream: int = 0, images: int | None = None,
    draws: int = 1, image_offset: int = 0, draw_offset: int = 0, sample_ids: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """``linear(x + sigma * eps, weight, bias)``. Backward saves the clean ``x``. Arguments that are not listed are those of `add_noise`.

    Args:
        x: rows [images or draws * images, *, in_features]; the features are the channels of the noise.
        weight: [out_features, in_features], of x's dtype and device (under autocast of any float dtype).
        bias: None, or [out_features].
        sigma: standard deviation >= 0 of the noise on x: a number, a 0-dim tensor, or [in_features].

    Returns:
        [draws * images, *, out_features] of x's dtype. Gradients flow to x, weight, bias and sigma.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Examples:
        >>> y = noisy_linear(torch.rand(4, 32), torch.randn(10, 32), None, 0.1, seed=7)  # [4, 10]
    """
    _check_input("x", x, minimum=2)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be a tensor [out_features, {x.shape[-1]}], got {_describe(weight)}")
    _check_bias(bias, weight.shape[0])
    x, weight, bias = autocast(x, weight, bias)
    sigma, at = _address(x, x.shape[-1], sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    backend = check_backend(backend, x)
    _check_operands(x, weight, bias)
    return autograd.noisy_linear(x, weight, bias, sigma, at, backend)


# ------------------------------------------------------------------------------------------------------------------ arguments
def seed_tensor(seed: Seed, device: torch.device | str) -> Tensor:
    """``seed`` as the int64 tensor that ops take: an int modulo 2^64, or an int64 tensor of one value."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed must be an int or an int64 tensor of one value, got {_describe(seed)}")
        if seed.layout != torch.strided or (seed.is_meta and torch.device(device).type != "meta"):
            raise ValueError(f"seed must be a dense tensor with data, got {seed.layout} on {seed.device}")
        seed = seed.resolve_neg()
        seed = seed.reshape(()) if seed.dim() else seed
        return seed if seed.device == device else seed.to(device)
    value = integer("seed", seed)
    if not -(2**63) <= value < 2**63:
        value = operator.index(value)  # a compiler's symbolic integers have 64 bits with the sign: a larger one is made a constant
        value = (value + 2**63) % 2**64 - 2**63
    return torch.full((), value, dtype=torch.int64, device=device)  # made there: a copy could not be captured in a CUDA graph


def check_sigma(name: str, sigma: object) -> None:
    """Raises unless ``sigma`` is a finite number >= 0 or a float tensor of such (a tensor on an accelerator is trusted)."""
    if isinstance(sigma, Tensor):
        if sigma.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {sigma.layout}")
        if not sigma.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {_describe(sigma)}")
        if torch.compiler.is_compiling() or sigma.device.type != "cpu":
            return
        values = sigma.detach() if sigma.dim() else sigma.item()
        if not (bool(((values >= 0) & values.float().isfinite()).all()) if isinstance(values, Tensor) else 0 <= values <= _MAX):
            raise ValueError(f"{name} must be finite and not negative, got {sigma.tolist()}")
    elif isinstance(sigma, bool) or not isinstance(sigma, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(sigma).__name__}")
    elif not 0 <= sigma <= _MAX:  # type: ignore[operator]  # real numbers compare
        raise ValueError(f"{name} must be finite and not negative, got {sigma}")


def _address(
    x: Tensor,
    channels: int,
    sigma: PerChannel,
    seed: Seed,
    stream: int,
    images: int | None,
    draws: int,
    image_offset: int,
    draw_offset: int,
    sample_ids: Tensor | None,
    positions: int | None = None,
) -> tuple[Tensor, NoiseAddress]:
    """(sigma, the noise's address), checked and on x's device.

    The noise is on ``channels`` channels at ``positions`` positions a row, those of x by default.
    """
    draws, stream = integer("draws", draws), integer("stream", stream)
    image_offset, draw_offset = integer("image_offset", image_offset), integer("draw_offset", draw_offset)
    images = x.shape[0] if images is None else integer("images", images)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if images < 0 or x.shape[0] not in (images, images * draws):
        raise ValueError(
            f"images must equal the rows of the input, or the rows divided by draws: got images={images}, draws={draws} "
            f"for an input of {x.shape[0]} rows"
        )
    positions = math.prod(x.shape[1:]) // max(channels, 1) if positions is None else positions
    last = stream + 1, image_offset + images, draw_offset + draws, positions * ((channels + 3) // 4)
    if any(value > _WORD for value in last):
        names = "stream", "image_offset + images", "draw_offset + draws", "the number of channel quads in a sample"
        name, value = next((n, v) for n, v in zip(names, last, strict=True) if v > _WORD)
        raise ValueError(f"{name} must fit the 32-bit counter (at most 2^32), got {value}")
    for name, value in (("stream", stream), ("image_offset", image_offset), ("draw_offset", draw_offset)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    sigma, sample_ids = _sigma(sigma, channels, x), _sample_ids(sample_ids, images, draws, x.device)
    return sigma, NoiseAddress(seed_tensor(seed, x.device), stream, images, draws, image_offset, draw_offset, sample_ids)


def _sigma(sigma: PerChannel, channels: int, x: Tensor) -> Tensor:
    check_sigma("sigma", sigma)
    if not isinstance(sigma, Tensor):
        return torch.full((), float(sigma), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    if sigma.dim() > 1 or (sigma.dim() == 1 and sigma.shape[0] not in (1, channels)):
        raise ValueError(f"sigma must be a scalar or one value for each of {channels} channels, got shape {tuple(sigma.shape)}")
    sigma = sigma.reshape(()) if sigma.dim() and sigma.numel() == 1 and channels != 1 else sigma
    _check_data("sigma", sigma, x)
    if sigma.device != x.device or sigma.dtype not in (torch.float32, torch.float64):
        sigma = sigma.to(x.device, torch.float32)
    return sigma.float() if sigma.dtype == torch.float64 and x.dtype != torch.float64 else sigma


def _check_data(name: str, value: Tensor, x: Tensor) -> None:
    """Raises where ``value`` has no data for a call on ``x`` that has, or is no plain dense tensor."""
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.is_meta and not x.is_meta:
        raise ValueError(f"{name} must have data, got a tensor on the meta device for x on {x.device}")


def _sample_ids(sample_ids: Tensor | None, images: int, draws: int, device: torch.device) -> Tensor | None:
    if sample_ids is None:
        return None
    if not isinstance(sample_ids, Tensor) or sample_ids.dtype != torch.int64 or tuple(sample_ids.shape) != (images, 2):
        raise ValueError(f"sample_ids must be an int64 tensor [{images}, 2], got {_describe(sample_ids)}")
    if sample_ids.layout != torch.strided or (sample_ids.is_meta and torch.device(device).type != "meta"):
        raise ValueError(f"sample_ids must be a dense tensor with data, got {sample_ids.layout} on {sample_ids.device}")
    if sample_ids.device.type == "cpu" and images and not torch.compiler.is_compiling():
        if sample_ids.min() < 0 or sample_ids[:, 0].max() >= _WORD or sample_ids[:, 1].max() + draws > _WORD:
            raise ValueError(f"sample_ids must hold indices that fit the 32-bit counter with {draws} draws, got {sample_ids.tolist()}")
    return sample_ids.to(device).resolve_neg().contiguous()


def _affine(name: str, value: PerChannel | None, channels: int, x: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be None, a number or a tensor, got {type(value).__name__}")
        value = torch.full((), float(value), dtype=torch.float64, device=x.device)
    _check_data(name, value, x)
    if not value.is_floating_point() or value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, channels)):
        raise ValueError(f"{name} must be a float scalar or have one value for each of the {channels} channels, got {_describe(value)}")
    return value.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32).expand(channels)


def _check_input(name: str, x: Tensor, minimum: int, maximum: int | None = None, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {x.dtype}")
    if x.dim() < minimum or (maximum is not None and x.dim() > maximum):
        wanted = f"{minimum} dimensions" if maximum == minimum else f"at least {minimum} dimensions"
        raise ValueError(f"{name} must have {wanted}, got shape {tuple(x.shape)}")


def check_batch(x: Tensor) -> None:
    """Raises unless a layer's input is a dense tensor of one dimension or more."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got layout {x.layout}")
    if not x.dim():
        raise ValueError("x must have at least 2 dimensions, got shape ()")


def _check_windows(x: Tensor, pool: bool) -> None:
    if pool and min(x.shape[2:]) < 2:
        raise ValueError(f"x must be at least 2 pixels high and wide to be pooled, got shape {tuple(x.shape)}")


def _check_bias(bias: Tensor | None, channels: int) -> None:
    if bias is not None and (not isinstance(bias, Tensor) or tuple(bias.shape) != (channels,)):
        raise ValueError(f"bias must be None or a tensor [{channels}], got {_describe(bias)}")


def _check_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises where torch's convolution or product would not take these together."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        _check_data(name, value, x)
        if value.dtype != x.dtype:
            raise TypeError(f"{name} must be {str(x.dtype)[6:]} as x is, got {str(value.dtype)[6:]}")
        if value.device != x.device and not torch.compiler.is_compiling():
            raise ValueError(f"{name} must be on {x.device} as x is, got {value.device}")


def _output_sizes(x: Tensor, weight: Tensor, stride: tuple[int, ...], zeros: Sequence[int], dilation: tuple[int, ...]) -> list[int]:
    """Sizes of the convolution's output; ``zeros``: how many the padding adds to each dimension."""
    if min(x.shape[2:]) < 1:  # torch's convolution does not take it, not even where zeros are put around it
        raise ValueError(f"x must have at least one pixel in each dimension, got shape {tuple(x.shape)}")
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    sizes = [(n + z - r) // s + 1 for n, z, r, s in zip(x.shape[2:], zeros, reach, stride, strict=True)]
    if min(sizes) < 1:
        raise ValueError(f"x must be as large as the kernel's reach {reach} less its padding {list(zeros)}, got shape {tuple(x.shape)}")
    return sizes


def check_backend(
    backend: str, x: Tensor, cpu_dtypes: Sequence[torch.dtype] = tuple(cpu.DTYPES), triton_dtypes: Sequence[torch.dtype] = triton.DTYPES
) -> str:
    """``backend``, if it is "auto" or takes tensors like ``x`` here; raises what says why it does not otherwise."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "cpu":
        if x.device.type != "cpu":
            raise ValueError(f"backend 'cpu' needs tensors on the CPU, got {x.device}")
        if x.dtype not in cpu_dtypes:
            raise TypeError(f"backend 'cpu' takes {_names(cpu_dtypes)}, got {x.dtype}")
        if not torch.compiler.is_compiling() and (problem := cpu.load().problem) is not None:
            raise RuntimeError(f"backend 'cpu' is not available: {problem}")
    if backend == "triton":
        if x.dtype not in triton_dtypes:
            raise TypeError(f"backend 'triton' takes {_names(triton_dtypes)}, got {x.dtype}")
        if torch.compiler.is_compiling():
            return backend
        if not triton.runs_on(x):
            raise ValueError(f"backend 'triton' needs tensors on a CUDA device from sm_80 on or a ROCm device, got {x.device}")
        if (problem := triton.problem()) is not None:
            raise RuntimeError(f"backend 'triton' is not available: {problem}")
    return backend


def autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, weight, bias) with the casts that autocast gives a plain convolution or linear layer; it does not look inside our ops.

    Autocast leaves float64 alone.
    """
    if not torch._C._is_any_autocast_enabled():  # at once, for every layer of every pass
        return x, weight, bias
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, weight))
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(dtype)
    return x, weight, bias


def _convolution(
    x: Tensor, weight: Tensor, stride: Sizes, dilation: Sizes, groups: int, dtypes: Sequence[torch.dtype] = FLOATS
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(stride, dilation, groups) of a convolution, checked against its operands."""
    if not isinstance(weight, Tensor) or not 3 <= weight.dim() <= 5:
        raise ValueError(f"weight must be a tensor [Cout, Cin / groups, *kernel] with 1 to 3 kernel dimensions, got {_describe(weight)}")
    spatial = weight.dim() - 2
    _check_input("x", x, minimum=2 + spatial, maximum=2 + spatial, dtypes=dtypes)
    groups = integer("groups", groups)
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} output channels of weight, got {groups}")
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(f"x must have weight.shape[1] * groups = {weight.shape[1] * groups} channels, got shape {tuple(x.shape)}")
    return _tuple("stride", stride, spatial, 1), _tuple("dilation", dilation, spatial, 1), groups


def _padding(
    padding: Padding, weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...] | list[tuple[int, int]]:
    """Zeros at either side of each dimension as a tuple; where the sides differ a list of pairs."""
    if not isinstance(padding, str):
        return _tuple("padding", padding, len(stride), 0)
    pairs = _string_padding(padding, weight.shape[2:], stride, dilation)
    return pairs if any(left != right for left, right in pairs) else tuple(left for left, _ in pairs)


def _string_padding(padding: str, kernel: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding != "same":
        raise ValueError(f"padding must be a number, a tuple, 'valid' or 'same', got {padding!r}")
    if any(s != 1 for s in stride):
        raise ValueError(f"padding 'same' needs stride 1, got stride {stride}")
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return [(t // 2, t - t // 2) for t in totals]


def _tuple(name: str, value: Sizes, n: int, minimum: int) -> tuple[int, ...]:
    if type(value) is tuple and len(value) == n and all(type(v) is int and v >= minimum for v in value):  # a layer's, at every call
        return value
    several = tuple(integer(name, v) for v in (value if isinstance(value, (tuple, list)) else (value,)))
    several = several * n if len(several) == 1 else several
    if len(several) != n or any(v < minimum for v in several):
        raise ValueError(f"{name} must be an integer >= {minimum} or {n} of them, got {several}")
    return several


def integer(name: str, value: Any) -> int:
    """``value`` as an integer, symbolic ones under torch.compile included."""
    if type(value) is int or isinstance(value, torch.SymInt):  # operator.index would make a constant of a symbolic one
        return value  # type: ignore[return-value]  # a symbolic integer stands for an int
    if isinstance(value, bool) or isinstance(value, Tensor) and value.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer, got bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def first_image(image_offset: int, images: int) -> int:
    """``image_offset`` as an integer from which so many images can be counted in 32 bits."""
    image_offset = integer("image_offset", image_offset)
    if image_offset < 0 or image_offset + images > 2**32:
        raise ValueError(f"image_offset must be in [0, 2^32 - {images}], got {image_offset}")
    return image_offset


def _names(dtypes: Sequence[torch.dtype]) -> str:
    *first, last = (str(dtype)[6:] for dtype in dtypes)
    return f"{', '.join(first)} or {last}"


def _describe(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
