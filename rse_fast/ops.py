"""The ops as torch's dispatcher sees them: schemas, shapes without data, and what runs under which key.

Compilers, tracers and modes meet the noise here. The noise itself is one op. A noisy convolution or linear layer takes part as two: the
noise, and torch's own convolution or product, so a compiler lays out and fuses what stands around them, and counts its work as plain.

``seed`` is an int64 tensor on the device of ``x`` and ``sigma`` a float32 tensor (0-dim or [C]), so neither recompiles a graph when it
changes. ``sample_ids`` is int64 [images, 2] on the same device, or None. Nothing here validates: that is `functional`, which also
applies autocast's casts.
"""

import functools
import inspect

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from rse_fast import autograd, noise
from rse_fast.address import NoiseAddress
from rse_fast.layout import packed_like

_lib = torch.library.Library("rse_fast", "DEF")

_AT = "Tensor seed, int stream, SymInt images, SymInt draws, SymInt image_offset, SymInt draw_offset, Tensor? sample_ids"
_AFFINE = "Tensor? scale, Tensor? shift, bool relu"
_CONV = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
for _schema in (
    f"add_noise(Tensor x, Tensor sigma, {_AT}, {_AFFINE}, str backend, Tensor? after=None) -> Tensor",
    f"add_noise_(Tensor(a!) x, Tensor sigma, {_AT}, {_AFFINE}, str backend) -> ()",
    f"activate_noise(Tensor x, Tensor sigma, {_AT}, {_AFFINE}, bool pool, str backend, bool clean_output) -> (Tensor noisy, Tensor clean)",
    f"add_noise_u8(Tensor x, float step, int zero_point, Tensor sigma, {_AT}, {_AFFINE}, bool pool, str backend) -> Tensor",
    f"conv_activate_noise(Tensor x, Tensor weight, Tensor sigma, {_AT}, {_AFFINE}, {_CONV}, ScalarType? dtype, str backend) -> Tensor",
    f"noisy_conv(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, {_AT}, {_CONV}, str backend) -> Tensor",
    f"noisy_linear(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, {_AT}, str backend) -> Tensor",
    f"sigma_grad(Tensor g, {_AT}, bool per_channel, str backend) -> Tensor",
):
    _lib.define(_schema)

add_noise = torch.ops.rse_fast.add_noise
add_noise_ = torch.ops.rse_fast.add_noise_
activate_noise = torch.ops.rse_fast.activate_noise
add_noise_u8 = torch.ops.rse_fast.add_noise_u8
conv_activate_noise = torch.ops.rse_fast.conv_activate_noise
noisy_conv = torch.ops.rse_fast.noisy_conv
noisy_linear = torch.ops.rse_fast.noisy_linear
sigma_grad = torch.ops.rse_fast.sigma_grad


NO_ONNX = (
    "noisy layers have no form of their own in ONNX, where the seed would become a constant: call "
    "rse_fast.export(rse_fast.Ensemble(model), example, 'model.onnx'), which writes the ensemble with the seed as an input"
)


def _addressed(function):
    """``function`` for the op's loose arguments: those from the seed on become a `NoiseAddress`.

    Checks the rows, which are data by now: a graph that was traced for one batch size would have a kernel read beyond another's.
    """
    before = list(inspect.signature(function).parameters).index("at")
    after = before + len(NoiseAddress._fields)

    @functools.wraps(function)
    def run(*args):
        if torch.onnx.is_in_onnx_export():
            raise ValueError(NO_ONNX)
        at = NoiseAddress(*args[before:after])
        if args[0].shape[0] not in (at.images, at.rows):
            rows = f"images={at.images} or draws * images={at.rows}"
            raise ValueError(f"the input must have {rows} rows, got {args[0].shape[0]} (a traced call holds for one batch size only)")
        return function(*args[:before], at, *args[after:])

    return run


# ------------------------------------------------------------------------------------------------------------------- with data
def _add_noise(x, sigma, at, scale, shift, relu, backend, after=None):
    return noise.add_noise(x, sigma, at, scale, shift, relu, backend)


# --------------------------------------------------------------------------------------------------------------- without data
def _add_noise_fake(x, sigma, at, scale, shift, relu, backend, after=None):
    return packed_like(x, at.rows)


def _activate_noise_fake(x, sigma, at, scale, shift, relu, pool, backend, clean_output):
    return packed_like(x, at.rows, pool), packed_like(x, x.shape[0] if clean_output else 0, pool)


def _add_noise_u8_fake(x, step, zero_point, sigma, at, scale, shift, relu, pool, backend):
    return packed_like(x, at.rows, pool, torch.uint8)


def _conv_activate_noise_fake(x, weight, sigma, at, scale, shift, relu, stride, padding, dilation, groups, dtype, backend):
    y = noise.convolution(x.float(), weight.float(), None, stride, padding, dilation, groups)
    return x.new_empty((at.rows, *y.shape[2:], weight.shape[0]), dtype=dtype or x.dtype).movedim(-1, 1)


def _sigma_grad_fake(g, at, per_channel, backend):
    real = torch.float64 if g.dtype == torch.float64 else torch.float32
    return g.new_empty((g.shape[1],) if per_channel else (), dtype=real)


# --------------------------------------------------------------------------------------------------------------- with gradients
def _gradient_of(name, apply):
    """The op under autograd's key: ``apply`` where a gradient is wanted, else what stands below.

    apply: takes the op's loose arguments; None for ops that have no gradient.
    """
    op = getattr(torch.ops.rse_fast, name).default

    def run(*args):
        if apply is None and autograd.is_transformed():
            raise RuntimeError(autograd.NO_DERIVATIVE)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if apply is None:
                raise RuntimeError(autograd.NO_GRADIENT)
            return apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return run


def _add_noise_gradient(x, sigma, at, scale, shift, relu, backend, after=None):
    return autograd.AddNoise.apply(x, sigma, scale, shift, at, relu, backend)


def _sigma_grad_gradient(g, at, per_channel, backend):
    return autograd.SigmaGrad.apply(g, at, per_channel, backend)


for _name, _function, _fake, _gradient in (
    ("add_noise", _add_noise, _add_noise_fake, _add_noise_gradient),
    ("add_noise_", noise.add_noise_, None, None),
    ("activate_noise", noise.activate_noise, _activate_noise_fake, None),
    ("conv_activate_noise", noise.conv_activate_noise, _conv_activate_noise_fake, None),
    ("sigma_grad", noise.sigma_grad, _sigma_grad_fake, _sigma_grad_gradient),
    ("add_noise_u8", noise.add_noise_u8, _add_noise_u8_fake, None),
):
    _lib.impl(_name, _addressed(_function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"rse_fast::{_name}", _addressed(_fake) if _fake else lambda *_: None, lib=_lib)
    if _name != "add_noise_u8":
        _lib.impl(_name, _gradient_of(_name, _gradient and _addressed(_gradient)), "Autograd")


def _add_noise_traced(mode, function, types, args=(), kwargs=None):
    """On a GPU a compiler takes the Triton kernel itself into its graph, where the shapes are known; all else stays one op."""
    x, sigma, *at, scale, shift, relu, backend = args[:13]
    after = args[13] if len(args) > 13 else None
    known = all(type(n) is int for n in (*x.shape, *at[2:4]))
    if not (known and "triton" in (backend, backend == "auto" and noise.active_backend(x))):
        return mode.__torch_dispatch__(function, types, args, kwargs)
    with mode:
        at, out = NoiseAddress(*at), None
        if after is not None:  # memory that begins in backward ties the kernel to it
            like = packed_like(x, at.rows)
            out = after.new_empty_strided(like.shape, like.stride(), dtype=x.dtype)
        return noise.add_noise(x, sigma, at, scale, shift, relu, "triton", out)


torch.library.register_torch_dispatch("rse_fast::add_noise", FunctionalTensorMode, _add_noise_traced, lib=_lib)


# --------------------------------------------------------------------------------------------------- two nodes for a tracer
def _noisy_conv(x, weight, bias, sigma, at, stride, padding, dilation, groups, backend):
    if autograd.wants_gradient(x, weight, bias, sigma):
        return autograd.NoisyConv.apply(x, weight, bias, sigma, at, (stride, padding, dilation), groups, backend)
    if autograd.is_direct(x, named=True) and autograd.is_direct(weight, named=True):
        return noise.noisy_conv(x, weight, bias, sigma, at, stride, padding, dilation, groups, backend)
    return noise.convolution(add_noise.default(x, sigma, *at, None, None, False, backend), weight, bias, stride, padding, dilation, groups)


def _noisy_linear(x, weight, bias, sigma, at, backend):
    if autograd.wants_gradient(x, weight, bias, sigma):
        return autograd.NoisyLinear.apply(x, weight, bias, sigma, at, backend)
    y = add_noise.default(x.movedim(-1, 1), sigma, *at, None, None, False, backend).movedim(1, -1)
    return torch.nn.functional.linear(y, weight, bias)


for _name, _function in (("noisy_conv", _noisy_conv), ("noisy_linear", _noisy_linear)):
    _lib.impl(_name, _addressed(_function), "CompositeImplicitAutograd")
