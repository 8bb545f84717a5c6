"""The ops as torch sees them: schemas, shapes without data, gradients, and which kernel a device key runs.

``seed`` is an int64 tensor on the device of ``x`` and ``sigma`` a float32 tensor (0-dim or [C]), so neither recompiles a graph when it
changes. ``sample_ids`` (int64 [images, 2], on the same device, or None) gives each image its own (image, draw_offset) instead of
``(image_offset + i, draw_offset)``. Nothing here validates: that is `functional`, which also applies autocast's casts. Gradients regenerate eps
from the seed; no noise is ever stored.
"""

import functools
import inspect
import warnings

import torch
from torch.autograd import forward_ad

from rse_fast import reference
from rse_fast.kernels import cpu, triton

_lib = torch.library.Library("rse_fast", "DEF")

_NOISE = "Tensor sigma, Tensor seed, int stream, SymInt images, SymInt draws, SymInt image_offset, SymInt draw_offset"
_lib.define(f"add_noise(Tensor x, {_NOISE}, Tensor? scale, Tensor? shift, bool relu, str backend, Tensor? sample_ids=None) -> Tensor")
_lib.define(f"add_noise_(Tensor(a!) x, {_NOISE}, Tensor? scale, Tensor? shift, bool relu, str backend, Tensor? sample_ids=None) -> ()")
_lib.define(
    f"activate_noise(Tensor x, {_NOISE}, Tensor? scale, Tensor? shift, bool relu, bool pool, str backend, Tensor? sample_ids=None, "
    "bool keep=True) -> (Tensor noisy, Tensor clean)"
)
_lib.define(
    f"add_noise_u8(Tensor x, float step, int zero_point, {_NOISE}, Tensor? scale, Tensor? shift, bool relu, bool pool, str backend, "
    "Tensor? sample_ids=None) -> Tensor"
)
_lib.define(
    f"conv_activate_noise(Tensor x, Tensor weight, {_NOISE}, Tensor? scale, Tensor? shift, bool relu, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, ScalarType? dtype, str backend, Tensor? sample_ids=None) -> Tensor"
)
_lib.define(
    f"noisy_conv(Tensor x, Tensor weight, Tensor? bias, {_NOISE}, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str backend, Tensor? sample_ids=None) -> Tensor"
)
_lib.define(f"noisy_linear(Tensor x, Tensor weight, Tensor? bias, {_NOISE}, str backend, Tensor? sample_ids=None) -> Tensor")
_lib.define(
    "sigma_grad(Tensor g, Tensor seed, int stream, SymInt images, SymInt draws, SymInt image_offset, SymInt draw_offset, "
    "bool per_channel, str backend, Tensor? sample_ids=None) -> Tensor"
)

add_noise = torch.ops.rse_fast.add_noise
add_noise_ = torch.ops.rse_fast.add_noise_
activate_noise = torch.ops.rse_fast.activate_noise
add_noise_u8 = torch.ops.rse_fast.add_noise_u8
conv_activate_noise = torch.ops.rse_fast.conv_activate_noise
noisy_conv = torch.ops.rse_fast.noisy_conv
noisy_linear = torch.ops.rse_fast.noisy_linear
sigma_grad = torch.ops.rse_fast.sigma_grad


def _cuda_backend(x):
    if not triton.runs_on(x):
        return "torch"
    if triton.problem() is None:
        return "triton"
    _say_once(triton.problem())
    return "torch"


@functools.cache
def _say_once(problem):
    warnings.warn(f"rse-fast: noise on GPUs is made by plain torch operations, slowly: {problem}", RuntimeWarning, stacklevel=2)


def _cpu_backend(x):
    real = torch.float32 if x.dtype in triton.LOW_PRECISION else x.dtype  # what the noise on a convolution of such tensors is
    return "cpu" if real in cpu.DTYPES and cpu.load().handle is not None else "torch"


def _any_backend(x):
    return "torch"


# Dispatch keys, and what ``backend="auto"`` is under each.
_KEYS = {"CPU": _cpu_backend, "CUDA": _cuda_backend, "CompositeExplicitAutograd": _any_backend}


def active_backend(x: torch.Tensor) -> str:
    """What ``backend="auto"`` runs for a tensor like ``x``: "triton" (CUDA, ROCm), "cpu" (the C++ library) or "torch"."""
    return _KEYS.get(x.device.type.upper(), _any_backend)(x)


def writable(x: torch.Tensor) -> bool:
    """Whether `add_noise_` can write over ``x``: it is contiguous or channels last."""
    return reference.layout(x) is not None


def noise_choice(weight: torch.Tensor, groups: int) -> str:
    """Where a noisy convolution of ``weight`` and channels-last images like it makes its noise: "in_kernel" or "separate"."""
    if weight.dim() != 4 or active_backend(weight) != "triton":
        return "separate"
    return triton.noise_choice("input", weight, weight, groups)


# -------------------------------------------------------------------------------------------------------------------- add_noise
def _add_noise(x, sigma, seed, stream, images, draws, image_offset, draw_offset, scale, shift, relu, backend, sample_ids=None):
    if backend == "torch":
        return reference.add_noise(x, sigma, seed, stream, images, draws, image_offset, draw_offset, scale, shift, relu, sample_ids)
    lies = reference.layout(x)
    x = x if lies else x.contiguous()
    out = reference.packed_like(x, images * draws)
    sigma, scale, shift = (p if p is None else p.contiguous() for p in (sigma, scale, shift))
    launch = triton.launcher("add_noise") if backend == "triton" else cpu.add_noise
    launch(x, out, lies == "flat", sigma, seed, stream, images, draws, image_offset, draw_offset, scale, shift, relu, sample_ids)
    return out


def _add_noise_in_place(x, sigma, seed, stream, images, draws, image_offset, draw_offset, scale, shift, relu, backend, sample_ids=None):
    """x has a row for each row of the result and is dense, contiguous or channels last."""
    where = seed, stream, images, draws, image_offset, draw_offset
    if backend == "torch":
        x.copy_(reference.add_noise(x, sigma, *where, scale, shift, relu, sample_ids))
        return
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)  # autograd refuses to go back through what was kept of x before
    sigma, scale, shift = (p if p is None else p.contiguous() for p in (sigma, scale, shift))
    launch = triton.launcher("add_noise") if backend == "triton" else cpu.add_noise
    launch(x, x, reference.layout(x) == "flat", sigma, *where, scale, shift, relu, sample_ids)


def _add_noise_fake(x, sigma, seed, stream, images, draws, image_offset, draw_offset, scale, shift, relu, backend, sample_ids=None):
    return reference.packed_like(x, images * draws)


def _add_noise_setup(ctx, inputs, output):
    x, sigma, seed, *where, scale, shift, relu, backend, sample_ids = inputs
    affine = scale is not None or shift is not None
    # x is kept only where a gradient reads it: noise alone passes gradients through.
    keep_x = relu or ctx.needs_input_grad[8]
    ctx.save_for_backward(x if keep_x else None, sigma, seed, scale, shift, sample_ids)
    ctx.rows, ctx.where, ctx.relu, ctx.affine, ctx.backend = x.shape[0], where, relu, affine, backend


def _add_noise_backward(ctx, g):
    x, sigma, seed, scale, shift, sample_ids = ctx.saved_tensors
    stream, images, draws, image_offset, draw_offset = ctx.where
    needs_x, needs_sigma = ctx.needs_input_grad[:2]
    needs_scale, needs_shift = ctx.needs_input_grad[8:10]
    g_sigma = sigma_grad(g, seed, *ctx.where, sigma.dim() == 1, ctx.backend, sample_ids) if needs_sigma else None
    g_x = g_scale = g_shift = None
    if needs_x or needs_scale or needs_shift:
        g = _sum_draws(g, ctx.rows, images, draws)
        column = [-1] + [1] * (g.dim() - 2)
        if ctx.relu:
            clean = x
            if ctx.affine:
                clean = x.to(torch.promote_types(x.dtype, torch.float32))
                clean = clean if scale is None else clean * scale.view(column)
                clean = clean if shift is None else clean + shift.view(column)
            g = g * (clean > 0)
        over = [d for d in range(g.dim()) if d != 1]
        g_x = g if scale is None else (g * scale.view(column)).to(g.dtype)
        g_scale = (g * x).sum(over, dtype=scale.dtype) if needs_scale else None
        g_shift = g.sum(over, dtype=shift.dtype) if needs_shift else None
    return g_x if needs_x else None, g_sigma, *[None] * 6, g_scale, g_shift, None, None, None


def _sum_draws(g, rows, images, draws):
    """The gradient of lazy packing: one image was read by all its draws."""
    return g if g.shape[0] == rows else g.unflatten(0, (draws, images)).sum(0)


# --------------------------------------------------------------------------------------------------------------- activate_noise
def _activate_noise(x, sigma, seed, stream, images, draws, image_offset, draw_offset, scale, shift, relu, pool, backend, sample_ids=None, keep=True):
    """clean = maxpool2x2?(act(x * scale + shift)), one row for each row of x (none unless ``keep``); noisy = clean before its rounding
    + sigma * eps."""
    if reference.layout(x) is None:
        x = x.contiguous()
    noisy, clean = reference.packed_like(x, images * draws, pool), reference.packed_like(x, x.shape[0] if keep else 0, pool)
    where = seed, stream, images, draws, image_offset, draw_offset
    if backend in ("triton", "cpu"):
        launch = triton.launcher("add_noise") if backend == "triton" else cpu.add_noise
        sigma, scale, shift = (p if p is None else p.contiguous() for p in (sigma, scale, shift))
        options = {"clean": clean} if keep else {}
        options = {**options, "pool": True} if pool else options
        launch(x, noisy, reference.layout(x) == "flat", sigma, *where, scale, shift, relu, sample_ids, **options)
        return noisy, clean
    value = reference.activate(x, scale, shift, relu, pool)
    noisy.copy_(add_noise(value, sigma, *where, None, None, False, backend, sample_ids))
    return noisy, clean.copy_(value) if keep else clean


def _activate_noise_fake(x, sigma, seed, stream, images, draws, image_offset, draw_offset, scale, shift, relu, pool, backend, sample_ids=None, keep=True):
    return reference.packed_like(x, images * draws, pool), reference.packed_like(x, x.shape[0] if keep else 0, pool)


# ----------------------------------------------------------------------------------------------------------------- add_noise_u8
def _add_noise_u8(
    x, step, zero_point, sigma, seed, stream, images, draws, image_offset, draw_offset, scale, shift, relu, pool, backend, sample_ids=None
):
    """For inference: a result in bytes has no gradient."""
    where = seed, stream, images, draws, image_offset, draw_offset
    if backend == "torch" or (backend == "auto" and not (x.device.type == "cpu" and cpu.load().handle is not None)):
        return reference.add_noise_u8(x, step, zero_point, sigma, *where, scale, shift, relu, sample_ids, pool)
    if reference.layout(x) is None:
        x = x.contiguous()
    out = reference.packed_like(x, images * draws, pool, torch.uint8)
    sigma, scale, shift = (p if p is None else p.contiguous() for p in (sigma, scale, shift))
    units = {"pool": pool, "step": step, "zero_point": zero_point}
    cpu.add_noise(x, out, reference.layout(x) == "flat", sigma, *where, scale, shift, relu, sample_ids, **units)
    return out


def _add_noise_u8_fake(
    x, step, zero_point, sigma, seed, stream, images, draws, image_offset, draw_offset, scale, shift, relu, pool, backend, sample_ids=None
):
    return reference.packed_like(x, images * draws, pool, torch.uint8)


# ---------------------------------------------------------------------------------------------------------- conv_activate_noise
def _conv_activate_noise(
    x, weight, sigma, seed, stream, images, draws, image_offset, draw_offset, scale, shift, relu, stride, padding, dilation, groups, dtype, backend,
    sample_ids=None,
):  # fmt: skip
    """act(conv(x) * scale + shift) + sigma * eps, rounded to dtype: in the convolution's epilogue, or by add_noise behind the vendor's."""
    where = seed, stream, images, draws, image_offset, draw_offset
    if backend == "triton" and triton.convolves("output", x, weight, groups):
        x = x.contiguous(memory_format=torch.channels_last)
        sigma, scale, shift = (p if p is None else p.contiguous() for p in (sigma, scale, shift))
        more = scale, shift, relu, stride, padding, dilation, dtype, sample_ids
        return triton.launcher("conv_activate_noise")(x, weight, sigma, *where, *more)
    low = x.dtype in triton.LOW_PRECISION
    with torch.autocast(x.device.type, enabled=False):  # casts are `functional`'s; a cast of integers would lose some
        y = torch.convolution(
            *((x.float(), weight.float()) if low else (x, weight)), None, stride, padding, dilation, False, [0] * len(stride), groups
        )
    dtype = dtype or x.dtype
    y = y if dtype == y.dtype else y.float()  # so that add_noise does not round
    y = add_noise(y.movedim(1, -1).contiguous().movedim(-1, 1), sigma, *where, scale, shift, relu, backend, sample_ids)
    return reference.narrow(y, dtype).movedim(1, -1).contiguous().movedim(-1, 1)


def _conv_activate_noise_fake(
    x, weight, sigma, seed, stream, images, draws, image_offset, draw_offset, scale, shift, relu, stride, padding, dilation, groups, dtype, backend,
    sample_ids=None,
):  # fmt: skip
    y = torch.convolution(x.float(), weight.float(), None, stride, padding, dilation, False, [0] * len(stride), groups)
    return x.new_empty((images * draws, *y.shape[2:], weight.shape[0]), dtype=dtype or x.dtype).movedim(-1, 1)


# ------------------------------------------------------------------------------------------------------- noisy_conv, noisy_linear
def _noisy_conv(
    x, weight, bias, sigma, seed, stream, images, draws, image_offset, draw_offset, stride, padding, dilation, groups, backend, sample_ids=None
):
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    if backend == "triton" and channels_last and triton.convolves("input", x, weight, groups):
        sigma, bias = sigma.contiguous(), None if bias is None else bias.contiguous()
        where = seed, stream, images, draws, image_offset, draw_offset
        return triton.launcher("noisy_conv")(x, weight, bias, sigma, *where, stride, padding, dilation, sample_ids)
    y = _add_noise(x, sigma, seed, stream, images, draws, image_offset, draw_offset, None, None, False, backend, sample_ids)
    return torch.convolution(y, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _noisy_conv_fake(
    x, weight, bias, sigma, seed, stream, images, draws, image_offset, draw_offset, stride, padding, dilation, groups, backend, sample_ids=None
):
    y = reference.packed_like(x, images * draws)
    return torch.convolution(y, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _noisy_conv_setup(ctx, inputs, output):
    x, weight, bias, sigma, seed, *where, stride, padding, dilation, groups, backend, sample_ids = inputs
    ctx.save_for_backward(x, weight, sigma, seed, sample_ids)  # the clean input: the noisy one is regenerated when its gradient is asked for
    ctx.bias_sizes = None if bias is None else list(bias.shape)
    ctx.where, ctx.conv, ctx.groups, ctx.backend = where, (stride, padding, dilation), groups, backend


def _noisy_conv_backward(ctx, g):
    x, weight, sigma, seed, sample_ids = ctx.saved_tensors
    stream, images, draws, image_offset, draw_offset = ctx.where
    needs_x, needs_w, needs_b, needs_sigma = ctx.needs_input_grad[:4]
    needs_b = needs_b and ctx.bias_sizes is not None
    stride, padding, dilation = ctx.conv

    def gradients(read, stride, needs):
        return torch.ops.aten.convolution_backward.default(
            g, read, weight, ctx.bias_sizes, stride, padding, dilation, False, [0] * len(stride), ctx.groups, needs
        )

    def packed():  # where only the shape is read
        return x if x.shape[0] == images * draws else reference.packed_like(x, images * draws)

    # Weight first, on its own: the noisy input is gone before the gradient of the input, as large as it, is there.
    g_noisy = g_w = g_b = None
    if needs_w or needs_b:
        # One transient buffer and the vendor's gradient: `kernels.triton.choices` says why.
        read = add_noise(x, sigma, seed, *ctx.where, None, None, False, ctx.backend, sample_ids) if needs_w else packed()
        step = stride
        if _written_astray(read, weight, stride, padding):
            read, step = read[(slice(None), slice(None), *(slice(None, None, s) for s in stride))], [1] * len(stride)
        _, g_w, g_b = gradients(read, step, [False, needs_w, needs_b])
        del read
    if needs_x or needs_sigma:
        g_noisy = gradients(packed(), stride, [True, False, False])[0]
    g_x = _sum_draws(g_noisy, x.shape[0], images, draws) if needs_x else None
    g_sigma = sigma_grad(g_noisy, seed, *ctx.where, sigma.dim() == 1, ctx.backend, sample_ids) if needs_sigma else None
    return g_x, g_w, g_b, g_sigma, *[None] * 12


def _written_astray(x, weight, stride, padding):
    """Whether oneDNN would write past its workspace for the weight's gradient: strided 1x1 convolutions of few channels, channels last
    (https://github.com/uxlfoundation/oneDNN/issues/6035). Taken at the pixels that it reads, the same convolution has no stride."""
    pointwise = all(k == 1 for k in weight.shape[2:]) and not any(padding)
    return x.device.type == "cpu" and pointwise and max(stride) > 1 and weight.shape[1] < 16


def _noisy_linear(x, weight, bias, sigma, seed, stream, images, draws, image_offset, draw_offset, backend, sample_ids=None):
    y = add_noise(x.movedim(-1, 1), sigma, seed, stream, images, draws, image_offset, draw_offset, None, None, False, backend, sample_ids)
    return torch.nn.functional.linear(y.movedim(1, -1), weight, bias)


def _noisy_linear_fake(x, weight, bias, sigma, seed, stream, images, draws, image_offset, draw_offset, backend, sample_ids=None):
    return x.new_empty((images * draws, *x.shape[1:-1], weight.shape[0]))


def _noisy_linear_setup(ctx, inputs, output):
    x, weight, bias, sigma, seed, *where, backend, sample_ids = inputs
    ctx.save_for_backward(x, weight, sigma, seed, sample_ids)
    ctx.where, ctx.backend = where, backend


def _noisy_linear_backward(ctx, g):
    x, weight, sigma, seed, sample_ids = ctx.saved_tensors
    stream, images, draws, image_offset, draw_offset = ctx.where
    needs_x, needs_w, needs_b, needs_sigma = ctx.needs_input_grad[:4]
    g_w = None
    if needs_w:
        noisy = add_noise(x.movedim(-1, 1), sigma, seed, *ctx.where, None, None, False, ctx.backend, sample_ids).movedim(1, -1)
        g_w = g.flatten(0, -2).mT @ noisy.flatten(0, -2)
    g_b = g.flatten(0, -2).sum(0) if needs_b else None
    g_noisy = g @ weight if needs_x or needs_sigma else None
    g_x = _sum_draws(g_noisy, x.shape[0], images, draws) if needs_x else None
    g_sigma = sigma_grad(g_noisy.movedim(-1, 1), seed, *ctx.where, sigma.dim() == 1, ctx.backend, sample_ids) if needs_sigma else None
    return g_x, g_w, g_b, g_sigma, *[None] * 8


# ------------------------------------------------------------------------------------------------------------------- sigma_grad
def _sigma_grad(g, seed, stream, images, draws, image_offset, draw_offset, per_channel, backend, sample_ids=None):
    if backend == "torch":
        return reference.sigma_grad(g, seed, stream, images, draws, image_offset, draw_offset, per_channel, sample_ids)
    if backend == "triton":
        g = g if reference.layout(g) else g.contiguous()
        where = stream, images, draws, image_offset, draw_offset
        return triton.launcher("sigma_grad")(g, reference.layout(g) == "flat", seed, *where, per_channel, sample_ids)
    # One draw of all images at a time: the transient eps stays that small, and the order of summation is fixed.
    total = torch.zeros((g.shape[1],) if per_channel else (), dtype=torch.float64, device=g.device)
    # Whatever torch's default type and device are.
    real = {"dtype": torch.float32, "device": g.device}
    one, zeros = torch.ones((), **real), torch.zeros((images, *g.shape[1:]), **real)
    if reference.layout(g) == "flat":
        zeros = reference.packed_like(g, images).float().zero_()
    over = [d for d in range(g.dim()) if d != 1 or not per_channel]
    for d in range(draws if images else 0):
        at = None if sample_ids is None else sample_ids + torch.tensor([0, d], device=g.device)
        eps = add_noise(zeros, one, seed, stream, images, 1, image_offset, draw_offset + d, None, None, False, backend, at)
        total += (eps * g[d * images : (d + 1) * images]).sum(over, dtype=torch.float64)
    return total.float()


def _sigma_grad_fake(g, seed, stream, images, draws, image_offset, draw_offset, per_channel, backend, sample_ids=None):
    real = torch.float64 if g.dtype == torch.float64 else torch.float32
    return g.new_empty((g.shape[1],) if per_channel else (), dtype=real)


def _sigma_grad_setup(ctx, inputs, output):
    g, seed, *where, per_channel, backend, sample_ids = inputs
    ctx.save_for_backward(seed, sample_ids)
    ctx.like, ctx.where, ctx.backend = (g.shape, g.dtype), where, backend


def _sigma_grad_backward(ctx, gg):
    seed, sample_ids = ctx.saved_tensors
    shape, dtype = ctx.like
    zeros = gg.new_zeros(shape, dtype=dtype)  # linear in g: its gradient is eps, scaled
    eps = add_noise(zeros, torch.ones_like(gg), seed, *ctx.where, None, None, False, ctx.backend, sample_ids)
    return eps * (gg.view([-1] + [1] * (len(shape) - 2)) if gg.dim() else gg).to(dtype), *[None] * 9


# ----------------------------------------------------------------------------------------------------------------- registration
def _under(key, function):
    """``function`` as the implementation under a dispatch key: what "auto" means is settled there."""
    names = list(inspect.signature(function).parameters)
    index, images = names.index("backend"), names.index("images")

    @functools.wraps(function)
    def run(*args):
        if args[0].shape[0] not in (args[images], args[images] * args[images + 1]):  # a kernel would read beyond the input
            rows = f"images={args[images]} or draws * images={args[images] * args[images + 1]}"
            raise ValueError(f"{names[0]} must have {rows} rows, got {args[0].shape[0]} (a traced call holds for one batch size only)")
        if args[index] == "auto":
            args = (*args[:index], _KEYS[key](args[0]), *args[index + 1 :])
        return function(*args)

    return run


_NO_GRADIENT = (
    "this op is for inference and has no gradient, but one of its inputs requires one: call it under torch.no_grad(), or take "
    "add_noise or noisy_conv, which have one"
)


def _differentiable(name, implementation, setup, backward):
    """Registers the gradient of an op, or with ``backward`` None that it has none.

    `torch.library.register_autograd` would do, but looks the schema up anew at each call, argument by argument (torch 2.13): a third of
    what a noisy convolution of few pixels took.
    """
    op = getattr(torch.ops.rse_fast, name).default
    parameters = inspect.signature(implementation).parameters.values()
    defaults = [parameter.default for parameter in parameters]  # of what the dispatcher leaves out

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            setup(ctx, (*args, *defaults[len(args) :]), output)
            ctx.omitted = len(defaults) - len(args)
            return output

        @staticmethod
        def backward(ctx, *grads):
            found = backward(ctx, *grads)
            return found[: len(found) - ctx.omitted]

    def run(*args):
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in args if torch.is_tensor(t)):
            raise RuntimeError(f"rse_fast::{name} has no forward-mode derivative; take reverse mode (torch.autograd.grad, torch.func.vjp)")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if backward is None:
                raise RuntimeError(_NO_GRADIENT)
            return Gradient.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    Gradient.__name__ = f"Gradient_{name}"
    _lib.impl(name, run, "Autograd")


for _name, _impl, _fake, _setup, _backward in (
    ("add_noise", _add_noise, _add_noise_fake, _add_noise_setup, _add_noise_backward),
    ("add_noise_", _add_noise_in_place, lambda *_: None, None, None),
    ("activate_noise", _activate_noise, _activate_noise_fake, None, None),
    ("conv_activate_noise", _conv_activate_noise, _conv_activate_noise_fake, None, None),
    ("noisy_conv", _noisy_conv, _noisy_conv_fake, _noisy_conv_setup, _noisy_conv_backward),
    ("noisy_linear", _noisy_linear, _noisy_linear_fake, _noisy_linear_setup, _noisy_linear_backward),
    ("sigma_grad", _sigma_grad, _sigma_grad_fake, _sigma_grad_setup, _sigma_grad_backward),
):
    for _key in _KEYS:
        _lib.impl(_name, _under(_key, _impl), _key)
    torch.library.register_fake(f"rse_fast::{_name}", _fake, lib=_lib)
    _differentiable(_name, _impl, _setup, _backward)
_lib.impl("add_noise_u8", _add_noise_u8, "CompositeExplicitAutograd")
torch.library.register_fake("rse_fast::add_noise_u8", _add_noise_u8_fake, lib=_lib)
