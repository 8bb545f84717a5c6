"""Arguments of the public functions and layers: what they may be, and the error that names the one that is not.

Each check raises TypeError or ValueError with the name of the argument, what was expected and what was got, before anything is changed.
"""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rse_fast.address import NoiseAddress
from rse_fast.kernels import cpu, triton

BACKENDS = ("auto", "triton", "cpu", "torch")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WORD = 2**32
_PIXELS = 2**31  # no image has so many; sums of a few such numbers fit 64 bits
LARGEST = torch.finfo(torch.float32).max  # number that the noise arithmetic holds

Seed: TypeAlias = int | Tensor  # an int, or an int64 tensor of one value
PerChannel: TypeAlias = float | Tensor  # a number, a 0-dim tensor, or one value a channel
Sizes: TypeAlias = int | Sequence[int]  # of a convolution: one for all spatial dimensions, or one each
Padding: TypeAlias = Sizes | str


def seed_tensor(seed: Seed, device: torch.device | str) -> Tensor:
    """``seed`` as the int64 tensor that ops take: an int modulo 2^64, or an int64 tensor of one value."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.is_nested or seed.numel() != 1:
            raise TypeError(f"seed must be an int or an int64 tensor of one value, got {describe(seed)}")
        if not has_numbers(seed) or (seed.is_meta and torch.device(device).type != "meta"):
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
        check_dense(name, sigma)
        if not sigma.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {describe(sigma)}")
        if torch.compiler.is_compiling() or sigma.device.type != "cpu":
            return
        values = sigma.detach() if sigma.dim() else sigma.item()
        if not (bool(((values >= 0) & values.float().isfinite()).all()) if isinstance(values, Tensor) else 0 <= values <= LARGEST):
            raise ValueError(f"{name} must be finite and not negative, got {sigma.tolist()}")
    elif isinstance(sigma, bool) or not isinstance(sigma, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(sigma).__name__}")
    elif not 0 <= sigma <= LARGEST:  # type: ignore[operator]  # real numbers compare
        raise ValueError(f"{name} must be finite and not negative, got {sigma}")


def address(
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


def is_dense(value: Tensor) -> bool:
    """Whether the tensor has one value at each place: it is not sparse, packed by a vendor's library, or a list of tensors."""
    return value.layout == torch.strided and not value.is_nested


def check_dense(name: str, value: Tensor) -> None:
    """Raises TypeError unless `is_dense`, and where the tensor stands for zeros without memory (`torch._efficientzerotensor`)."""
    if not has_numbers(value):
        got = "a nested one" if value.is_nested else "zeros without memory" if is_dense(value) else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {got}")


def has_numbers(value: Tensor) -> bool:
    """Whether memory holds the values, which a kernel reads."""
    return is_dense(value) and (torch.compiler.is_compiling() or not value._is_zerotensor())


def _check_data(name: str, value: Tensor, x: Tensor) -> None:
    """Raises where ``value`` has no data for a call on ``x`` that has, or is no plain dense tensor."""
    check_dense(name, value)
    if value.is_meta and not x.is_meta:
        raise ValueError(f"{name} must have data, got a tensor on the meta device for x on {x.device}")


def _sample_ids(sample_ids: Tensor | None, images: int, draws: int, device: torch.device) -> Tensor | None:
    if sample_ids is None:
        return None
    if (
        not isinstance(sample_ids, Tensor)
        or sample_ids.is_nested
        or sample_ids.dtype != torch.int64
        or tuple(sample_ids.shape) != (images, 2)
    ):
        raise ValueError(f"sample_ids must be an int64 tensor [{images}, 2], got {describe(sample_ids)}")
    if not has_numbers(sample_ids) or (sample_ids.is_meta and torch.device(device).type != "meta"):
        raise ValueError(f"sample_ids must be a dense tensor with data, got {sample_ids.layout} on {sample_ids.device}")
    if sample_ids.device.type == "cpu" and images and not torch.compiler.is_compiling():
        if sample_ids.min() < 0 or sample_ids[:, 0].max() >= _WORD or sample_ids[:, 1].max() + draws > _WORD:
            raise ValueError(f"sample_ids must hold indices that fit the 32-bit counter with {draws} draws, got {sample_ids.tolist()}")
    return sample_ids.to(device).resolve_neg().contiguous()


def affine(name: str, value: PerChannel | None, channels: int, x: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be None, a number or a tensor, got {type(value).__name__}")
        value = torch.full((), float(value), dtype=torch.float64, device=x.device)
    _check_data(name, value, x)
    if not value.is_floating_point() or value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, channels)):
        raise ValueError(f"{name} must be a float scalar or have one value for each of the {channels} channels, got {describe(value)}")
    return value.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32).expand(channels)


def check_input(name: str, x: Tensor, minimum: int, maximum: int | None = None, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not is_dense(x):
        check_dense(name, x)
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {listed(dtypes)}, got {x.dtype}")
    if x.dim() < minimum or (maximum is not None and x.dim() > maximum):
        wanted = f"{minimum} dimensions" if maximum == minimum else f"at least {minimum} dimensions"
        raise ValueError(f"{name} must have {wanted}, got shape {tuple(x.shape)}")


def check_batch(x: Tensor) -> None:
    """Raises unless a layer's input is a dense tensor of one dimension or more."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not is_dense(x):
        check_dense("x", x)
    if not x.dim():
        raise ValueError("x must have at least 2 dimensions, got shape ()")


def check_windows(x: Tensor, pool: bool) -> None:
    if pool and min(x.shape[2:]) < 2:
        raise ValueError(f"x must be at least 2 pixels high and wide to be pooled, got shape {tuple(x.shape)}")


def check_bias(bias: Tensor | None, channels: int) -> None:
    if bias is not None and (not isinstance(bias, Tensor) or bias.is_nested or tuple(bias.shape) != (channels,)):
        raise ValueError(f"bias must be None or a tensor [{channels}], got {describe(bias)}")


def check_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises where torch's convolution or product would not take these together."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        _check_data(name, value, x)
        if value.dtype != x.dtype:
            raise TypeError(f"{name} must be {str(x.dtype)[6:]} as x is, got {str(value.dtype)[6:]}")
        if value.device != x.device and not torch.compiler.is_compiling():
            raise ValueError(f"{name} must be on {x.device} as x is, got {value.device}")


def output_sizes(x: Tensor, weight: Tensor, stride: tuple[int, ...], zeros: Sequence[int], dilation: tuple[int, ...]) -> list[int]:
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
            raise TypeError(f"backend 'cpu' takes {listed(cpu_dtypes)}, got {x.dtype}")
        if not torch.compiler.is_compiling() and (problem := cpu.load().problem) is not None:
            raise RuntimeError(f"backend 'cpu' is not available: {problem}")
    if backend == "triton":
        if x.dtype not in triton_dtypes:
            raise TypeError(f"backend 'triton' takes {listed(triton_dtypes)}, got {x.dtype}")
        if torch.compiler.is_compiling():
            return backend
        if not triton.runs_on(x):
            raise ValueError(f"backend 'triton' needs tensors on a CUDA device from sm_80 on or a ROCm device, got {x.device}")
        if (problem := triton.problem()) is not None:
            raise RuntimeError(f"backend 'triton' is not available: {problem}")
    return backend


def convolution(
    x: Tensor, weight: Tensor, stride: Sizes, dilation: Sizes, groups: int, dtypes: Sequence[torch.dtype] = FLOATS
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(stride, dilation, groups) of a convolution, checked against its operands."""
    if not isinstance(weight, Tensor) or not 3 <= weight.dim() <= 5:
        raise ValueError(f"weight must be a tensor [Cout, Cin / groups, *kernel] with 1 to 3 kernel dimensions, got {describe(weight)}")
    spatial = weight.dim() - 2
    check_input("x", x, minimum=2 + spatial, maximum=2 + spatial, dtypes=dtypes)
    groups = integer("groups", groups)
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} output channels of weight, got {groups}")
    if x.shape[1] != weight.shape[1] * groups:
        wanted = f"{weight.shape[1]} * {groups} = {weight.shape[1] * groups}"
        raise ValueError(f"x must have weight.shape[1] * groups = {wanted} channels, got shape {tuple(x.shape)}")
    return _tuple("stride", stride, spatial, 1), _tuple("dilation", dilation, spatial, 1), groups


def check_convolution_layer(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises what says why torch's convolution ``layer``, transposed or padded by pixels of the image, does not take ``x``, a batch."""
    spatial = len(layer.kernel_size)
    check_input("x", x, minimum=2 + spatial, maximum=2 + spatial)
    if not layer.transposed:
        stride, dilation, _ = convolution(x, weight, layer.stride, layer.dilation, layer.groups)
        check_bias(bias, weight.shape[0])
        check_operands(x, weight, bias)
        sides = list(zip(*[iter(layer._reversed_padding_repeated_twice[::-1])] * 2, strict=True))
        most = {"reflect": 1, "circular": 0}.get(layer.padding_mode)
        if most is not None and any(max(pair) > n - most for pair, n in zip(sides, x.shape[2:], strict=True)):
            relation = "larger than" if most else "as large as"
            wanted = [max(pair) for pair in sides]
            raise ValueError(f"x must be {relation} its padding {wanted} of mode {layer.padding_mode!r}, got shape {tuple(x.shape)}")
        output_sizes(x, weight, stride, [sum(pair) for pair in sides], dilation)
        return
    if not isinstance(weight, Tensor) or weight.dim() != 2 + spatial:
        raise ValueError(f"weight must be a tensor [Cin, Cout / groups, *kernel] with {spatial} kernel dimensions, got {describe(weight)}")
    groups = integer("groups", layer.groups)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} input channels of weight, got {groups}")
    if x.shape[1] != weight.shape[0]:
        raise ValueError(f"x must have weight.shape[0] = {weight.shape[0]} channels, got shape {tuple(x.shape)}")
    check_bias(bias, weight.shape[1] * groups)
    check_operands(x, weight, bias)
    stride, dilation = _tuple("stride", layer.stride, spatial, 1), _tuple("dilation", layer.dilation, spatial, 1)
    zeros, extra = _tuple("padding", layer.padding, spatial, 0), _tuple("output_padding", layer.output_padding, spatial, 0)
    geometry = zip(x.shape[2:], weight.shape[2:], stride, zeros, dilation, extra, strict=True)
    sizes = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, d, e in geometry]
    if min(x.shape[2:]) < 1 or min(sizes) < 1:
        raise ValueError(f"x must be large enough for an output of one pixel or more, got shape {tuple(x.shape)} for one of {sizes} pixels")


def padding(
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
    if type(value) is tuple and len(value) == n and all(type(v) is int and minimum <= v < _PIXELS for v in value):  # a layer's
        return value
    several = tuple(integer(name, v) for v in (value if isinstance(value, (tuple, list)) else (value,)))
    several = several * n if len(several) == 1 else several
    if len(several) != n or any(v < minimum for v in several):
        raise ValueError(f"{name} must be an integer >= {minimum} or {n} of them, got {several}")
    if max(several) >= _PIXELS:
        raise ValueError(f"{name} must be below 2^31, got {several}")
    return several


def integer(name: str, value: Any) -> int:
    """``value`` as an integer, symbolic ones under torch.compile included."""
    if type(value) is int or isinstance(value, torch.SymInt):  # operator.index would make a constant of a symbolic one
        return value  # type: ignore[return-value]  # a symbolic integer stands for an int
    if isinstance(value, bool) or isinstance(value, Tensor) and value.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer, got bool")
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # the latter of a tensor without data
        raise TypeError(f"{name} must be an integer, got {describe(value)}") from None


def first_image(image_offset: int, images: int) -> int:
    """``image_offset`` as an integer from which so many images can be counted in 32 bits."""
    image_offset = integer("image_offset", image_offset)
    if image_offset < 0 or image_offset + images > 2**32:
        raise ValueError(f"image_offset must be in [0, 2^32 - {images}], got {image_offset}")
    return image_offset


def listed(dtypes: Sequence[torch.dtype]) -> str:
    *first, last = (str(dtype)[6:] for dtype in dtypes)
    return f"{', '.join(first)} or {last}"


def describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "a nested tensor" if value.is_nested else f"{value.dtype} of shape {tuple(value.shape)}"
