"""The gradients of the noise, and the shortest way from a call to a kernel.

A call goes straight to its kernel where nothing watches it. Where a compiler, a tracer, or a dispatch or function mode does, it goes
through the registered op (see `ops`), which they know how to handle. Inside a transform of `torch.func`, and in forward mode, it goes
through `AddNoise`, which has a rule for each; a convolution is then a noise and torch's own convolution. The results are the same.

Gradients regenerate eps from the seed. A noisy input is stored only where it is small (`STORED`), and inside a transform.
"""

import torch
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor, peek_interpreter_stack, unwrap_if_dead
from torch.autograd import forward_ad

from rse_fast import noise
from rse_fast.address import NoiseAddress
from rse_fast.layout import layout, packed_like

_registered = torch.ops.rse_fast
_gradients = torch.ops.aten.convolution_backward.default
_PLAIN = (torch.Tensor, torch.nn.Parameter)

# Bytes of a noisy input up to which one call of the vendor's library makes all gradients of a convolution. The noisy input then lives
# until the gradient of the input, as large as itself, is there; larger ones are freed before.
ONE_CALL = 2**22

# Bytes of an input up to which torch's own functions keep the noisy one for backward: they save more time than they cost memory. What
# runs in Python in backward takes longer than a convolution of so few values.
STORED = 2**14

NO_DERIVATIVE = "this op is for inference and has no forward-mode derivative; take add_noise or noisy_conv, which have one"
NO_GRADIENT = (
    "this op is for inference and has no gradient, but one of its inputs requires one: call it under torch.no_grad(), or take "
    "add_noise or noisy_conv, which have one"
)


def is_direct(x: torch.Tensor, named: bool = False) -> bool:
    """Whether a call on ``x`` may go straight to its kernel: nothing traces or watches it, and x is a plain tensor with data.

    named: the call is below the registered op, whose name a profile has already.
    """
    return not (
        torch.compiler.is_compiling()  # first: a compiler knows the answer, and what follows is not for it
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or type(x) not in _PLAIN
        or x.is_meta
        or x._is_zerotensor()  # which has no memory either
        or torch._C._get_tracing_state()
        or (torch.autograd.profiler._is_profiler_enabled and not named)  # a profile names the op
    )


def is_transformed() -> bool:
    """Whether a transform of `torch.func` that `AddNoise` has a rule for, or forward-mode differentiation, is under way."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return peek_interpreter_stack().key() != TransformType.Functionalize
    return forward_ad._current_level >= 0


def is_vectorised() -> bool:
    """Whether a vmap of `torch.func` is under way."""
    stack = get_interpreter_stack() if torch._C._are_functorch_transforms_active() else None
    return any(interpreter.key() == TransformType.Vmap for interpreter in stack or ())


def wants_gradient(*tensors) -> bool:
    """Whether a gradient of one of the tensors, each of which may be None, is to be recorded."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


# ------------------------------------------------------------------------------------------------------------------------- calls
def add_noise(x, sigma, at, scale=None, shift=None, relu=False, backend="auto", after=None, out=None) -> torch.Tensor:
    """``act(x * scale + shift) + sigma * eps``, with all gradients. Arguments as in `rse_fast.noise`.

    out: memory that the result may take where no gradient is wanted; the torch backend and what watches the call leave it alone.

    after: a tensor that backward has and forward has not, where backward makes the forward's noise again. It is not read. A compiler sees
    by it that the call belongs to backward; it would otherwise take both calls for one, and store the result in between.
    """
    if is_transformed():
        return AddNoise.apply(x, sigma, scale, shift, at, relu, backend)
    if not is_direct(x):
        return _registered.add_noise.default(x, sigma, *at, scale, shift, relu, backend, after)
    if wants_gradient(x, sigma, scale, shift):
        if scale is None and shift is None and not relu and _is_small(x, sigma, at, backend):
            return _noisy_copy(x, sigma, at, backend)
        return _add_noise(x, sigma, scale, shift, at, relu, backend)
    return noise.add_noise(x, sigma, at, scale, shift, relu, backend, out)


def noisy_conv(x, weight, bias, sigma, at, stride, padding, dilation, groups, backend="auto") -> torch.Tensor:
    """``conv(x + sigma * eps, weight, bias)``, with all gradients; saves the clean x for backward."""
    if is_transformed():
        return noise.convolution(add_noise(x, sigma, at, backend=backend), weight, bias, stride, padding, dilation, groups)
    if not (is_direct(x) and type(weight) in _PLAIN):
        return _registered.noisy_conv.default(x, weight, bias, sigma, *at, stride, padding, dilation, groups, backend)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or wants_gradient(bias, sigma)):
        if _is_small(x, sigma, at, backend):
            return noise.convolution(_noisy_copy(x, sigma, at, backend), weight, bias, stride, padding, dilation, groups)
        return _noisy_conv(x, weight, bias, sigma, at, (stride, padding, dilation), groups, backend)
    return noise.noisy_conv(x, weight, bias, sigma, at, stride, padding, dilation, groups, backend)


def noisy_linear(x, weight, bias, sigma, at, backend="auto") -> torch.Tensor:
    """``linear(x + sigma * eps, weight, bias)`` of x [rows, *, features], with all gradients; saves the clean x for backward."""
    if is_transformed():
        return torch.nn.functional.linear(add_noise(x.movedim(-1, 1), sigma, at, backend=backend).movedim(1, -1), weight, bias)
    if not (is_direct(x) and type(weight) in _PLAIN):
        return _registered.noisy_linear.default(x, weight, bias, sigma, *at, backend)
    if wants_gradient(x, weight, bias, sigma):
        if _is_small(moved := x.movedim(-1, 1), sigma, at, backend):
            return torch.nn.functional.linear(_noisy_copy(moved, sigma, at, backend).movedim(1, -1), weight, bias)
        return _noisy_linear(x, weight, bias, sigma, at, backend)
    y = noise.add_noise(x.movedim(-1, 1), sigma, at, None, None, False, backend).movedim(1, -1)
    return torch.nn.functional.linear(y, weight, bias)


def sigma_grad(g, at, per_channel, backend="auto") -> torch.Tensor:
    """``sum(g * eps)`` over everything, or per channel: the gradient of sigma; differentiable in g."""
    if is_transformed() or is_legacy_batchedtensor(g):  # the latter of autograd's is_grads_batched
        real = torch.promote_types(g.dtype, torch.float32)
        zeros, one = torch.zeros(g.shape, dtype=real, device=g.device), torch.ones((), dtype=real, device=g.device)
        eps = add_noise(zeros, one, at, backend=backend)
        return (g * eps).sum([d for d in range(g.dim()) if d != 1 or not per_channel])
    if not is_direct(g):
        return _registered.sigma_grad.default(g, *at, per_channel, backend)
    if wants_gradient(g):
        return _sigma_grad(g, at, per_channel, backend)
    return noise.sigma_grad(g, at, per_channel, backend)


def add_noise_(x, sigma, at, scale=None, shift=None, relu=False, backend="auto") -> None:
    """`add_noise` in the memory of x, for inference."""
    if is_transformed():
        raise RuntimeError(NO_DERIVATIVE)
    if not is_direct(x):
        return _registered.add_noise_.default(x, sigma, *at, scale, shift, relu, backend)
    if wants_gradient(x, sigma, scale, shift):
        raise RuntimeError(NO_GRADIENT)
    return noise.add_noise_(x, sigma, at, scale, shift, relu, backend)


def activate_noise(x, sigma, at, scale=None, shift=None, relu=False, pool=False, backend="auto", clean_output=True, out=None):
    """(noisy, clean) of ``maxpool?(act(x * scale + shift))`` in one pass, for inference. out: as in `add_noise`, for noisy."""
    if is_transformed():
        raise RuntimeError(NO_DERIVATIVE)
    if not is_direct(x):
        return _registered.activate_noise.default(x, sigma, *at, scale, shift, relu, pool, backend, clean_output)
    if wants_gradient(x, sigma, scale, shift):
        raise RuntimeError(NO_GRADIENT)
    return noise.activate_noise(x, sigma, at, scale, shift, relu, pool, backend, clean_output, out)


def _is_small(x, sigma, at, backend) -> bool:
    """Whether torch's own functions shall make the gradients of x plus noise."""
    return (
        x.numel() * x.element_size() <= STORED
        and x.shape[0] == at.rows
        and not sigma.requires_grad
        and layout(x) is not None
        and not x.is_neg()
        and (noise.active_backend(x) if backend == "auto" else backend) != "torch"
    )


def _noisy_copy(x, sigma, at, backend):
    """x plus noise, whose gradient is that of a copy."""
    y = x.clone()
    noise.add_noise(x, sigma, at, None, None, False, backend, y)
    return y


def _sum_draws(g, rows, at):
    """The gradient of lazy packing: one image was read by all its draws. By reshape: autograd's is_grads_batched knows no unflatten."""
    return g if g.shape[0] == rows else g.reshape(at.draws, at.images, *g.shape[1:]).sum(0)


def _below(x, sigma, at, scale, shift, relu, backend):
    """The noise without a gradient, for the forward of the functions below, also where the op is traced."""
    if is_direct(x):
        return noise.add_noise(x, sigma, at, scale, shift, relu, backend)
    with torch._C._AutoDispatchBelowAutograd():
        return _registered.add_noise.default(x, sigma, *at, scale, shift, relu, backend)


# --------------------------------------------------------------------------------------------------------------------- functions
class AddNoise(torch.autograd.Function):
    """`add_noise` in reverse and forward mode and under the transforms of `torch.func`. Keeps x only where a gradient reads it."""

    @staticmethod
    def forward(x, sigma, scale, shift, at, relu, backend):
        return _below(x, sigma, at, scale, shift, relu, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, sigma, scale, shift, at, relu, backend = inputs
        keep_x = relu or ctx.needs_input_grad[2] or scale is not None
        saved = x if keep_x else None, sigma, scale, shift, at.seed, at.sample_ids
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.like = x.shape, x.dtype
        ctx.rest = at[1:6], relu, backend

    @staticmethod
    def _mask(ctx, x, scale, shift):
        """Where the activation lets gradients pass, or None for everywhere."""
        if not ctx.rest[1]:
            return None
        if scale is None and shift is None:
            return x > 0
        column = [-1] + [1] * (x.dim() - 2)
        clean = x.to(torch.promote_types(x.dtype, torch.float32))
        clean = clean if scale is None else clean * scale.view(column)
        return (clean if shift is None else clean + shift.view(column)) > 0

    @staticmethod
    def backward(ctx, g):
        # A function that torch.func.vjp gave runs when its transform has ended, and what was saved in it is wrapped still.
        x, sigma, scale, shift, seed, sample_ids = (t if t is None else unwrap_if_dead(t) for t in ctx.saved_tensors)
        coordinates, _, backend = ctx.rest
        at = NoiseAddress(seed, *coordinates, sample_ids)
        needs_x, needs_sigma, needs_scale, needs_shift = ctx.needs_input_grad[:4]
        g_sigma = sigma_grad(g, at, sigma.dim() == 1, backend) if needs_sigma else None
        g_x = g_scale = g_shift = None
        if needs_x or needs_scale or needs_shift:
            g = _sum_draws(g, ctx.like[0][0], at)
            if (mask := AddNoise._mask(ctx, x, scale, shift)) is not None:
                g = g * mask
            over = [d for d in range(g.dim()) if d != 1]
            g_x = g if scale is None else (g * scale.view([-1] + [1] * (g.dim() - 2))).to(g.dtype)
            g_scale = (g * x).sum(over, dtype=scale.dtype) if needs_scale else None
            g_shift = g.sum(over, dtype=shift.dtype) if needs_shift else None
        return g_x if needs_x else None, g_sigma, g_scale, g_shift, None, None, None

    @staticmethod
    def jvp(ctx, t_x, t_sigma, t_scale, t_shift, *_):
        x, sigma, scale, shift, seed, sample_ids = ctx.saved_tensors
        coordinates, _, backend = ctx.rest
        at, (shape, dtype) = NoiseAddress(seed, *coordinates, sample_ids), ctx.like
        real = torch.promote_types(dtype, torch.float32)
        column = [-1] + [1] * (len(shape) - 2)
        t = torch.zeros(shape, dtype=real, device=seed.device)
        if t_x is not None:
            t = t + (t_x if scale is None else t_x * scale.view(column))
        if t_scale is not None:
            t = t + x * t_scale.view(column)
        if t_shift is not None:
            t = t + t_shift.view(column)
        if (mask := AddNoise._mask(ctx, x, scale, shift)) is not None:
            t = t * mask
        if t.shape[0] != at.rows:
            t = t.repeat(at.draws, *[1] * (t.dim() - 1))
        if t_sigma is not None:
            zeros, one = torch.zeros((at.rows, *shape[1:]), dtype=real, device=seed.device), torch.ones_like(sigma)
            t = t + add_noise(zeros, one, at, backend=backend) * (t_sigma.view(column) if t_sigma.dim() else t_sigma)
        return t.to(dtype)

    @staticmethod
    def vmap(info, in_dims, x, sigma, scale, shift, at, relu, backend):
        """Computes the entries one by one. Each has its own seed, or all have the same noise, as the ``randomness`` of the vmap says."""

        def entry(value, dim, i):
            return value if dim is None else value.select(dim, i)

        *dims, dims_at, _, _ = in_dims
        results = []
        for i in range(info.batch_size):
            own = [entry(value, dim, i) for value, dim in zip((x, sigma, scale, shift), dims, strict=True)]
            own_at = at if dims_at is None else NoiseAddress(*(entry(v, d, i) for v, d in zip(at, dims_at, strict=True)))
            results.append(add_noise(own[0], own[1], own_at, own[2], own[3], relu, backend))
        return torch.stack(results), 0


class NoisyConv(torch.autograd.Function):
    """`noisy_conv` in reverse mode. Keeps the clean input, and regenerates the noisy one where the weight's gradient needs it.

    It takes few steps of Python, since in a small layer's backward these steps are the whole cost beyond the plain layer.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, sigma, at, geometry, groups, backend):
        if at.sample_ids is None:
            ctx.save_for_backward(x, weight, sigma, at.seed)
        else:
            ctx.save_for_backward(x, weight, sigma, at.seed, at.sample_ids)
        ctx.rest = None if bias is None else [bias.shape[0]], at[1:6], geometry, groups, backend
        if is_direct(x, named=True):
            return noise.noisy_conv(x, weight, bias, sigma, at, *geometry, groups, backend)
        with torch._C._AutoDispatchBelowAutograd():
            return noise.convolution(_below(x, sigma, at, None, None, False, backend), weight, bias, *geometry, groups)

    @staticmethod
    def backward(ctx, g):
        x, weight, sigma, *seed = ctx.saved_tensors
        bias_sizes, coordinates, (stride, padding, dilation), groups, backend = ctx.rest
        needs_x, needs_w, needs_b, needs_sigma, *_ = ctx.needs_input_grad
        at, zeros = NoiseAddress(seed[0], *coordinates, *seed[1:]), (0,) * len(stride)
        needs_noisy, direct = needs_x or needs_sigma, is_direct(x, True) and is_direct(g, True) and not torch.is_grad_enabled()
        direct = direct and not is_legacy_batchedtensor(g)  # of autograd's is_grads_batched
        g_noisy = g_w = g_b = tile = None
        if direct and x.dim() == 4 and max(*stride, *dilation, groups) == 1 and backend != "torch":
            if layout(x) == "flat":  # torch would lay g out like it as well
                g = g.contiguous(memory_format=torch.channels_last)
            tile = noise.input_grad_tile(g, weight, padding) if needs_noisy else None
            if needs_w:
                g_w = noise.convolution_weight_grad(g, x, weight, sigma, at, padding)
                needs_w = g_w is None
        if needs_w:
            if direct:
                read = noise.add_noise(x, sigma, at, None, None, False, backend)
            else:
                read = add_noise(x, sigma, at, backend=backend, after=g)
            step, whole = stride, needs_noisy and tile is None and read.numel() * read.element_size() <= ONE_CALL
            if weight.shape[1] < 16 and max(stride) > 1 and _written_astray(read, weight, padding):
                read, whole = read[(slice(None), slice(None), *(slice(None, None, s) for s in stride))], False
                step = (1,) * len(stride)
            needs = [whole, True, needs_b]
            g_noisy, g_w, g_b = _gradients(g, read, weight, bias_sizes, step, padding, dilation, False, zeros, groups, needs)
            del read  # before the gradient of the input, as large as it, is there
            needs_noisy, needs_b = needs_noisy and not whole, False
        if tile is not None:
            g_noisy = noise.convolution_input_grad(g, weight, padding, tile)
        elif needs_noisy:
            read = x if x.shape[0] == at.rows else packed_like(x, at.rows)  # of which the shape alone is read
            needs = [True, False, needs_b]
            g_noisy, _, g_bias = _gradients(g, read, weight, bias_sizes, stride, padding, dilation, False, zeros, groups, needs)
            g_b, needs_b = g_bias if needs_b else g_b, False
        if needs_b:
            g_b = g.sum([d for d in range(g.dim()) if d != 1])
        g_x = _sum_draws(g_noisy, x.shape[0], at) if needs_x else None
        g_sigma = sigma_grad(g_noisy, at, sigma.dim() == 1, backend) if needs_sigma else None
        return g_x, g_w, g_b, g_sigma, None, None, None, None


def _written_astray(x, weight, padding):
    """Whether oneDNN would write past its workspace for the weight's gradient: strided 1x1 convolutions of few channels, channels last
    (https://github.com/uxlfoundation/oneDNN/issues/6035). Taken at the pixels that it reads, the same convolution has no stride."""
    return x.device.type == "cpu" and all(k == 1 for k in weight.shape[2:]) and not any(padding)


class NoisyLinear(torch.autograd.Function):
    """`noisy_linear` in reverse mode. Keeps the clean input."""

    @staticmethod
    def forward(ctx, x, weight, bias, sigma, at, backend):
        ctx.save_for_backward(x, weight, sigma, at.seed, at.sample_ids)
        ctx.rest = at[1:6], backend
        y = _below(x.movedim(-1, 1), sigma, at, None, None, False, backend).movedim(1, -1)
        return torch.nn.functional.linear(y, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, weight, sigma, seed, sample_ids = ctx.saved_tensors
        coordinates, backend = ctx.rest
        at = NoiseAddress(seed, *coordinates, sample_ids)
        needs_x, needs_w, needs_b, needs_sigma = ctx.needs_input_grad[:4]
        g_w = None
        if needs_w:
            noisy = add_noise(x.movedim(-1, 1), sigma, at, backend=backend, after=g).movedim(1, -1)
            g_w = g.reshape(-1, g.shape[-1]).mT @ noisy.reshape(-1, noisy.shape[-1])
        g_b = g.reshape(-1, g.shape[-1]).sum(0) if needs_b else None
        g_noisy = g @ weight if needs_x or needs_sigma else None
        g_x = _sum_draws(g_noisy, x.shape[0], at) if needs_x else None
        g_sigma = sigma_grad(g_noisy.movedim(-1, 1), at, sigma.dim() == 1, backend) if needs_sigma else None
        return g_x, g_w, g_b, g_sigma, None, None


class SigmaGrad(torch.autograd.Function):
    """`sigma_grad`, which is linear in g: its gradient is eps, scaled."""

    @staticmethod
    def forward(ctx, g, at, per_channel, backend):
        ctx.save_for_backward(at.seed, at.sample_ids)
        ctx.rest = g.shape, g.dtype, at[1:6], backend
        if is_direct(g):
            return noise.sigma_grad(g, at, per_channel, backend)
        with torch._C._AutoDispatchBelowAutograd():
            return _registered.sigma_grad.default(g, *at, per_channel, backend)

    @staticmethod
    def backward(ctx, gg):
        seed, sample_ids = ctx.saved_tensors
        shape, dtype, coordinates, backend = ctx.rest
        zeros = gg.new_zeros(shape, dtype=dtype)
        eps = add_noise(zeros, torch.ones_like(gg), NoiseAddress(seed, *coordinates, sample_ids), backend=backend)
        return eps * (gg.view([-1] + [1] * (len(shape) - 2)) if gg.dim() else gg).to(dtype), None, None, None


def _apply(function):
    """``function.apply`` without the look at transforms of `torch.func`, which the calls above have taken: a third of its time."""
    return super(torch.autograd.Function, function).apply


_add_noise, _noisy_conv, _noisy_linear, _sigma_grad = map(_apply, (AddNoise, NoisyConv, NoisyLinear, SigmaGrad))
