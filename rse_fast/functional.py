"""Public functions: they check their arguments, choose the backend and call `autograd` or `ops`.

Every function takes ``seed`` (an int, taken modulo 2^64, or an int64 tensor of one value) and addresses eps by it: ``stream`` is the
layer, row ``d * images + i`` of the result is draw ``draw_offset + d`` of image ``image_offset + i``. An input of ``images`` rows is
packed lazily: each image is read once and comes out ``draws`` times. An input of ``draws * images`` rows keeps its rows.
"""

import math
import numbers

import torch
from torch import Tensor

from rse_fast import arguments, autograd, ops
from rse_fast.arguments import FLOATS, Padding, PerChannel, Seed, Sizes
from rse_fast.kernels import cpu, triton
from rse_fast.layout import layout

__all__ = ["activate_noise", "add_noise", "add_noise_", "add_noise_u8", "conv_activate_noise", "noisy_conv", "noisy_conv2d", "noisy_linear"]


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
        RuntimeError: the named backend is not available here; the message says why.

    Examples:
        >>> y = add_noise(torch.zeros(4, 3, 8, 8), 0.1, seed=7, draws=2)  # [8, 3, 8, 8]
    """
    arguments.check_input("x", x, minimum=2)
    channel_dim = arguments.integer("channel_dim", channel_dim)
    if not -x.dim() <= channel_dim < x.dim() or channel_dim % x.dim() == 0:
        raise ValueError(f"channel_dim must name a dimension of x other than 0, got {channel_dim} for x of shape {tuple(x.shape)}")
    if act not in (None, "relu"):
        raise ValueError(f"act must be None or 'relu', got {act!r}")
    dense = x.is_contiguous()
    x = x.movedim(channel_dim, 1)
    channels = x.shape[1]
    backend = arguments.check_backend(backend, x)
    sigma, at = arguments.address(x, channels, sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    scale, shift = arguments.affine("scale", scale, channels, x), arguments.affine("shift", shift, channels, x)
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
        RuntimeError: an input requires a gradient, or the named backend is not available here.
        TypeError: an argument has a wrong type or dtype. x was not changed.
        ValueError: an argument has a wrong shape, layout or value. x was not changed.

    Examples:
        >>> add_noise_(x, 0.1, seed=7)
    """
    arguments.check_input("x", x, minimum=2)
    if act not in (None, "relu"):
        raise ValueError(f"act must be None or 'relu', got {act!r}")
    if layout(x) is None:
        raise ValueError(f"x must be contiguous or channels last to be written in place, got strides {x.stride()}")
    backend = arguments.check_backend(backend, x)
    sigma, at = arguments.address(x, x.shape[1], sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    if x.shape[0] != at.rows:
        raise ValueError(f"x must have draws * images = {at.rows} rows to be written in place, got {x.shape[0]}")
    scale, shift = arguments.affine("scale", scale, x.shape[1], x), arguments.affine("shift", shift, x.shape[1], x)
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
        RuntimeError: an input requires a gradient, or the named backend is not available here.
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Examples:
        >>> noisy, clean = activate_noise(torch.randn(4, 8, 16, 16), 0.1, seed=7, act="relu", draws=2)  # [8, 8, 16, 16], [4, 8, 16, 16]
    """
    arguments.check_input("x", x, minimum=4 if pool else 2, maximum=4 if pool else None)
    arguments.check_windows(x, pool)
    if act not in (None, "relu"):
        raise ValueError(f"act must be None or 'relu', got {act!r}")
    backend = arguments.check_backend(backend, x)
    sigma, at = arguments.address(x, x.shape[1], sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    scale, shift = arguments.affine("scale", scale, x.shape[1], x), arguments.affine("shift", shift, x.shape[1], x)
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
        RuntimeError: the named backend is not available here.

    Examples:
        >>> y = add_noise_u8(torch.rand(4, 8, 16, 16), 0.1, step=1 / 127, zero_point=64, seed=7, act="relu")
    """
    arguments.check_input("x", x, minimum=4 if pool else 2, maximum=4 if pool else None, dtypes=tuple(cpu.BYTE_DTYPES))
    arguments.check_windows(x, pool)
    if isinstance(step, bool) or not isinstance(step, numbers.Real) or not 0 < step <= arguments.LARGEST:
        raise ValueError(f"step must be a positive finite number, got {step!r}")
    if not 0 <= arguments.integer("zero_point", zero_point) <= 255:
        raise ValueError(f"zero_point must be in [0, 255], got {zero_point}")
    if act not in (None, "relu"):
        raise ValueError(f"act must be None or 'relu', got {act!r}")
    if backend == "triton":
        raise ValueError("backend must be 'auto', 'cpu' or 'torch' for bytes, got 'triton'")
    sigma, at = arguments.address(x, x.shape[1], sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    scale, shift = arguments.affine("scale", scale, x.shape[1], x), arguments.affine("shift", shift, x.shape[1], x)
    backend = arguments.check_backend(backend, x, cpu.BYTE_DTYPES)
    step, zero_point = float(step), arguments.integer("zero_point", zero_point)
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
        RuntimeError: the named backend is not available here.

    Examples:
        >>> y = noisy_conv2d(torch.rand(4, 3, 8, 8), torch.randn(16, 3, 3, 3), None, 0.1, seed=7, padding=1)  # [4, 16, 8, 8]
    """
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        raise ValueError(f"weight must be a tensor [Cout, Cin / groups, kh, kw], got {arguments.describe(weight)}")
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
    stride, dilation, groups = arguments.convolution(x, weight, stride, dilation, groups)
    spatial = len(stride)
    arguments.check_bias(bias, weight.shape[0])
    x, weight, bias = autocast(x, weight, bias)
    sigma, at = arguments.address(x, x.shape[1], sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    backend = arguments.check_backend(backend, x)
    arguments.check_operands(x, weight, bias)
    zeros = arguments.padding(padding, weight, stride, dilation)
    arguments.output_sizes(x, weight, stride, [sum(p) if isinstance(p, tuple) else 2 * p for p in zeros], dilation)
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
        RuntimeError: an input requires a gradient, or the named backend is not available here.
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Examples:
        >>> y = conv_activate_noise(torch.rand(4, 3, 8, 8), torch.randn(16, 3, 3, 3), 0.1, seed=7, act="relu", padding=1)  # [4, 16, 8, 8]
    """
    stride, dilation, groups = arguments.convolution(x, weight, stride, dilation, groups, (*FLOATS, *triton.LOW_PRECISION))
    if x.dtype in triton.LOW_PRECISION and weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype} as x is, got {weight.dtype}")
    dtypes = (*FLOATS, *triton.LOW_PRECISION)
    if dtype is not None and dtype not in dtypes:
        raise TypeError(f"dtype must be None, {arguments.listed(dtypes)}, got {dtype}")
    if act not in (None, "relu"):
        raise ValueError(f"act must be None or 'relu', got {act!r}")
    if x.dtype not in triton.LOW_PRECISION:
        x, weight, _ = autocast(x, weight, None)
    zeros = arguments.padding(padding, weight, stride, dilation)
    if not isinstance(zeros, tuple):
        raise ValueError(f"padding must be symmetric, which 'same' is not for a kernel of {tuple(weight.shape[2:])}")
    arguments.check_operands(x, weight, None)
    sizes = arguments.output_sizes(x, weight, stride, [2 * p for p in zeros], dilation)
    backend = arguments.check_backend(backend, x, (*cpu.DTYPES, *triton.LOW_PRECISION), (*triton.DTYPES, *triton.LOW_PRECISION))
    sigma, at = arguments.address(
        x, weight.shape[0], sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids, math.prod(sizes)
    )
    scale, shift = arguments.affine("scale", scale, weight.shape[0], x), arguments.affine("shift", shift, weight.shape[0], x)
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
        RuntimeError: the named backend is not available here.

    Examples:
        >>> y = noisy_linear(torch.rand(4, 32), torch.randn(10, 32), None, 0.1, seed=7)  # [4, 10]
    """
    arguments.check_input("x", x, minimum=2)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"weight must be a tensor [out_features, in_features], got {arguments.describe(weight)}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have weight.shape[1] = {weight.shape[1]} features in its last dimension, got shape {tuple(x.shape)}")
    arguments.check_bias(bias, weight.shape[0])
    x, weight, bias = autocast(x, weight, bias)
    sigma, at = arguments.address(x, x.shape[-1], sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    backend = arguments.check_backend(backend, x)
    arguments.check_operands(x, weight, bias)
    return autograd.noisy_linear(x, weight, bias, sigma, at, backend)


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
