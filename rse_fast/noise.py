"""What each op computes on tensors that have data: which backend makes the noise, and the launch of its kernel.

Nothing here validates, knows gradients, or may be traced: that is for `functional`, `autograd` and `ops`. ``at`` is a
`NoiseAddress`, ``sigma`` float32 of 1 or C values, ``scale`` and ``shift`` float32 [C] or None, all on the device of the input.
"""

import functools
import warnings

import torch

from rse_fast import reference
from rse_fast.address import NoiseAddress
from rse_fast.kernels import cpu, triton
from rse_fast.kernels.cpu import winograd
from rse_fast.kernels.cpu.winograd import CONVOLUTION, WEIGHT_GRAD
from rse_fast.layout import layout, packed_like


def active_backend(x: torch.Tensor) -> str:
    """What ``backend="auto"`` runs for a tensor like ``x``: "triton" (CUDA, ROCm), "cpu" (the C++ library) or "torch"."""
    if x.is_cpu and x.dtype in cpu.DTYPES and cpu.load().handle is not None:
        return "cpu"
    kind = x.device.type
    if kind == "cpu":
        real = torch.float32 if x.dtype in triton.LOW_PRECISION else x.dtype  # the noise on a convolution of such tensors is float32
        return "cpu" if real in cpu.DTYPES and cpu.load().handle is not None else "torch"
    if kind != "cuda" or not triton.runs_on(x):
        return "torch"
    if triton.problem() is None:
        return "triton"
    _say_once(triton.problem())
    return "torch"


@functools.cache
def _say_once(problem):
    warnings.warn(f"rse-fast: noise on GPUs is made by plain torch operations, slowly: {problem}", RuntimeWarning, stacklevel=2)


def choice(weight: torch.Tensor, groups: int) -> str:
    """Where a noisy convolution of ``weight`` and channels-last images like it makes its noise: "in_kernel" or "separate"."""
    if weight.dim() != 4 or active_backend(weight) != "triton":
        return "separate"
    return triton.noise_choice("input", weight, weight, groups)


def convolution(y, weight, bias, stride, padding, dilation, groups) -> torch.Tensor:
    """torch's own, of any number of spatial dimensions."""
    return torch.convolution(y, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)


def add_noise(x, sigma, at: NoiseAddress, scale, shift, relu, backend, out=None) -> torch.Tensor:
    """out: memory to write to, laid out as the result would be; not for the torch backend."""
    backend = active_backend(x) if backend == "auto" else backend
    if backend == "torch":
        return reference.add_noise(x, sigma, *at, scale, shift, relu)
    x = x.resolve_neg()  # a view such as the imaginary part of a conjugate holds the opposite of its values
    memory_layout = layout(x)
    x = x if memory_layout else x.contiguous()
    if out is None:
        out = torch.empty_like(x) if memory_layout and x.shape[0] == at.rows else packed_like(x, at.rows)
    if scale is not None or shift is not None or sigma.dim():
        sigma, scale, shift = _dense(sigma, scale, shift)
    launch = cpu.add_noise if backend == "cpu" else triton.launcher("add_noise")
    launch(x, out, memory_layout == "flat", sigma, at, scale, shift, relu)
    return out


def add_noise_(x, sigma, at: NoiseAddress, scale, shift, relu, backend) -> None:
    """x has a row for each row of the result and is dense, contiguous or channels last."""
    backend = active_backend(x) if backend == "auto" else backend
    if backend != "torch" and x.is_neg():
        x.copy_(add_noise(x, sigma, at, scale, shift, relu, backend))
        return
    if backend == "torch":
        x.copy_(reference.add_noise(x, sigma, *at, scale, shift, relu))
        return
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)  # autograd refuses to go back through what was kept of x before
    sigma, scale, shift = _dense(sigma, scale, shift)
    launch = triton.launcher("add_noise") if backend == "triton" else cpu.add_noise
    launch(x, x, layout(x) == "flat", sigma, at, scale, shift, relu)


def activate_noise(
    x, sigma, at: NoiseAddress, scale, shift, relu, pool, backend, clean_output, out=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """clean = maxpool2x2?(act(x * scale + shift)), one row for each row of x (none unless ``clean_output``); noisy = clean before its
    rounding + sigma * eps. out: memory for noisy, laid out as it would be."""
    backend = active_backend(x) if backend == "auto" else backend
    x = x.resolve_neg()
    if layout(x) is None:
        x = x.contiguous()
    noisy = packed_like(x, at.rows, pool) if out is None else out
    clean = packed_like(x, x.shape[0] if clean_output else 0, pool)
    if backend == "torch":
        value = reference.activate(x, scale, shift, relu, pool)
        noisy.copy_(reference.add_noise(value, sigma, *at))
        return noisy, clean.copy_(value) if clean_output else clean
    sigma, scale, shift = _dense(sigma, scale, shift)
    launch = triton.launcher("add_noise") if backend == "triton" else cpu.add_noise
    launch(x, noisy, layout(x) == "flat", sigma, at, scale, shift, relu, clean if clean_output else None, pool)
    return noisy, clean


def add_noise_u8(x, step, zero_point, sigma, at: NoiseAddress, scale, shift, relu, pool, backend) -> torch.Tensor:
    if backend == "torch" or (backend == "auto" and not (x.device.type == "cpu" and cpu.load().handle is not None)):
        if any(bool((p.abs() > step * 2.0**124).any()) for p in (sigma, scale, shift) if p is not None):
            raise ValueError(cpu.TOO_FEW_STEPS)
        return reference.add_noise_u8(x, step, zero_point, sigma, *at, scale, shift, relu, pool)
    if layout(x) is None:
        x = x.contiguous()
    out = packed_like(x, at.rows, pool, torch.uint8)
    sigma, scale, shift = _dense(sigma, scale, shift)
    cpu.add_noise(x, out, layout(x) == "flat", sigma, at, scale, shift, relu, pool=pool, step=step, zero_point=zero_point)
    return out


def noisy_conv(x, weight, bias, sigma, at: NoiseAddress, stride, padding, dilation, groups, backend) -> torch.Tensor:
    backend = active_backend(x) if backend == "auto" else backend
    if backend == "triton" and x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        if triton.convolves("input", x, weight, groups):
            sigma, bias = _dense(sigma, bias)
            return triton.launcher("noisy_conv")(x, weight, bias, sigma, at, stride, padding, dilation)
    if (
        backend == "cpu"
        and max(*stride, *dilation, groups) == 1
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == torch.float32 and _is_plain(bias)))
        and (tile := winograd_tile(CONVOLUTION, x, at.rows, weight, padding))
    ):
        sigma, bias, weight = *_dense(sigma, bias), weight.resolve_neg()
        out = _map(x, at.rows, weight.shape[0], padding[0])
        winograd.convolution(x, winograd.transform_filters(weight, tile), out, padding[0], bias=bias, at=at, sigma=sigma)
        return out
    y = add_noise(x, sigma, at, None, None, False, backend)
    return convolution(y, weight, bias, stride, padding, dilation, groups)


def winograd_tile(cost, x, rows, weight, padding) -> int | None:
    """The tile of the form of Winograd's algorithm that a convolution of stride, dilation and groups 1 is to take, or None.

    It is taken on CPUs where it is the faster one, see `rse_fast.kernels.cpu.winograd.best_tile`: the noisy input is then never stored.
    x: [rows or fewer, C, H, W]. cost: `CONVOLUTION`, or `WEIGHT_GRAD` for the gradient of the weight. A weight that does not go with x,
    such as one that was put into a layer, is left to torch, which says so.
    """
    if not (x.dtype == weight.dtype == torch.float32 and weight.shape[2:] == (3, 3) and padding[0] == padding[1] <= 2):
        return None
    if not (x.is_cpu and layout(x) == "flat") or x.is_neg() or weight.shape[1] != x.shape[1] or not _is_plain(weight):
        return None
    if cpu.load().handle is None:
        return None
    return winograd.best_tile(cost, rows, x.shape[1], weight.shape[0], *x.shape[2:], padding[0])


def input_grad_tile(g, weight, padding) -> int | None:
    """`winograd_tile` of `convolution_input_grad`."""
    return winograd_tile(CONVOLUTION, g, len(g), weight.transpose(0, 1), [2 - p for p in padding]) if _is_plain(weight) else None


def convolution_input_grad(g, weight, padding, tile) -> torch.Tensor:
    """The gradient of the input of a convolution of stride, dilation and groups 1, by Winograd's algorithm with turned weights."""
    out = _map(g, len(g), weight.shape[1], 2 - padding[0])
    winograd.convolution(g, winograd.transform_filters(weight.resolve_neg(), tile, turn=True), out, 2 - padding[0])
    return out


def convolution_weight_grad(g, x, weight, sigma, at: NoiseAddress, padding) -> torch.Tensor | None:
    """The gradient of the weight of such a convolution, x being its clean input, by Winograd's algorithm; None: another is faster."""
    if layout(g) != "flat" or g.is_neg() or (tile := winograd_tile(WEIGHT_GRAD, x, at.rows, weight, padding)) is None:
        return None
    (sigma,) = _dense(sigma)
    return winograd.weight_grad(x, g, weight, tile, padding[0], at, sigma)


def _map(x, rows, channels, padding):
    height, width = (side + 2 * padding - 2 for side in x.shape[2:])
    return torch.empty((rows, channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def conv_activate_noise(
    x, weight, sigma, at: NoiseAddress, scale, shift, relu, stride, padding, dilation, groups, dtype, backend
) -> torch.Tensor:
    """act(conv(x) * scale + shift) + sigma * eps, rounded to dtype: in the convolution's epilogue, or by add_noise behind the vendor's."""
    backend = active_backend(x) if backend == "auto" else backend
    if backend == "triton" and triton.convolves("output", x, weight, groups):
        x = x.contiguous(memory_format=torch.channels_last)
        sigma, scale, shift = _dense(sigma, scale, shift)
        launch = triton.launcher("conv_activate_noise")
        return launch(x, weight, sigma, at, scale, shift, relu, stride, padding, dilation, dtype)
    low = x.dtype in triton.LOW_PRECISION
    with torch.autocast(x.device.type, enabled=False):  # casts are `functional`'s; a cast of integers would lose some
        y = convolution(*((x.float(), weight.float()) if low else (x, weight)), None, stride, padding, dilation, groups)
    dtype = dtype or x.dtype
    y = y if dtype == y.dtype else y.float()  # so that add_noise does not round
    y = add_noise(y.movedim(1, -1).contiguous().movedim(-1, 1), sigma, at, scale, shift, relu, backend)
    return reference.narrow(y, dtype).movedim(1, -1).contiguous().movedim(-1, 1)


def sigma_grad(g, at: NoiseAddress, per_channel, backend) -> torch.Tensor:
    """``sum(g * eps)`` over everything, or per channel."""
    backend = active_backend(g) if backend == "auto" else backend
    if backend == "torch":
        return reference.sigma_grad(g, *at, per_channel)
    g = g.resolve_neg()
    memory_layout = layout(g)
    if backend == "triton":
        g = g if memory_layout else g.contiguous()
        return triton.launcher("sigma_grad")(g, memory_layout == "flat", at, per_channel)
    # One draw of all images at a time: the transient eps stays that small, and the order of summation is fixed.
    total = torch.zeros((g.shape[1],) if per_channel else (), dtype=torch.float64, device=g.device)
    # Whatever torch's default type and device are.
    real = {"dtype": torch.float32, "device": g.device}
    one, zeros = torch.ones((), **real), torch.zeros((at.images, *g.shape[1:]), **real)
    if memory_layout == "flat":
        zeros = packed_like(g, at.images).float().zero_()
    over = [d for d in range(g.dim()) if d != 1 or not per_channel]
    for d in range(at.draws if at.images else 0):
        ids = None if at.sample_ids is None else at.sample_ids + torch.tensor([0, d], device=g.device)
        one_draw = at._replace(draws=1, draw_offset=at.draw_offset + d, sample_ids=ids)
        eps = add_noise(zeros, one, one_draw, None, None, False, backend)
        total += (eps * g[d * at.images : (d + 1) * at.images]).sum(over, dtype=torch.float64)
    return total.float()


def _is_plain(parameter):
    """Whether the values are in memory of the CPU, and a tensor's own: subclasses keep theirs elsewhere."""
    return type(parameter) in (torch.Tensor, torch.nn.Parameter) and parameter.is_cpu and not parameter._is_zerotensor()


def _dense(*parameters):
    return (p if p is None or p.is_contiguous() and not p.is_neg() else p.resolve_neg().contiguous() for p in parameters)
