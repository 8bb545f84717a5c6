"""Which algorithm runs each convolution of a snapshot on a CPU: the vendor library's direct one, or Winograd's with the noise inside.

Both compute the same function, up to rounding. Which one is faster depends on the layer and the processor, so it is measured, once in a
process for each shape of layer. The measurement is of a full packed batch, whatever the size of the call. So rows, chunks and the order
of calls do not change the choice, and a renewed snapshot computes the same function. In int8 the two differ by more than rounding. There
a rule chooses (`faster_in_bytes`) among what the limit of `rse_fast.ensemble.quantize` allows.
"""

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch._C._functorch import is_legacy_batchedtensor

from rse_fast import autograd
from rse_fast.context import NoiseContext
from rse_fast.ensemble.fused_conv import FusedConv, finish
from rse_fast.kernels import cpu
from rse_fast.kernels.cpu import winograd

ALGORITHMS = ("auto", "direct", "winograd")
CLEARLY = 0.97  # Winograd replaces the direct convolution where it takes less than this share of its time
_ROUNDS = 4
FEWEST_BYTE_CHANNELS = 48  # from which on the direct int8 convolution takes longer than F(2x2)
_MOST_WORK = 1.5e9  # multiplications (of the direct algorithm) of one run that is timed: 40 rows of VGG16


class Form(NamedTuple):
    """F(tile x tile, 3x3), and the dtype of its products."""

    tile: int
    products: torch.dtype

    def __str__(self):
        narrow = "" if self.products == torch.float32 else f", products in {str(self.products).removeprefix('torch.')}"
        return f"winograd F({self.tile}x{self.tile}, 3x3){narrow}"


class Choice(NamedTuple):
    """What a convolution runs: "direct" or a form of Winograd's, and why."""

    algorithm: str
    why: str


def forms(dtype: torch.dtype) -> list[Form]:
    """Forms of Winograd's algorithm for maps of ``dtype`` on this processor: some wherever `unavailable` is None.

    F(4x4) with products in bfloat16 is not among them: its error is five times that of the direct convolution in bfloat16.
    """
    narrow = [Form(2, torch.bfloat16)] if dtype == torch.bfloat16 and cpu.load().unit == "avx512bf16" else []
    return [Form(2, torch.float32), Form(4, torch.float32), *narrow]


def byte_forms() -> list[Form]:
    """Forms with products in int8: where the unit "avx512bf16" runs, which has AVX-512 VNNI as well.

    F(4x4) is not among them: its error is 2.7 times that of F(2x2), and most of it stays when draws are averaged.
    """
    return [Form(2, torch.int8)] if cpu.load().unit == "avx512bf16" else []


def faster_in_bytes(layer: nn.Conv2d) -> bool:
    """Whether products of bytes by F(2x2) take less time than the direct int8 convolution of a layer without `obstacle`.

    A rule and no measurement: an image's answer does not depend on how busy the machine was. On two cores of an AMD EPYC with AVX-512 VNNI
    each of 44 layers from 48 channels on took 0.22 to 0.94 of the direct one's time, on maps of 2x2 to 64x64; with 24 or 32 channels on
    one side it was 0.66 to 1.13, with 3 0.98 to 5.2. AMX multiplies bytes several times as fast as what Winograd's products use.
    """
    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return not amx and min(layer.in_channels, layer.out_channels) >= FEWEST_BYTE_CHANNELS


def obstacle(layer: nn.Conv2d) -> str | None:
    """What keeps a convolution from being run by Winograd's algorithm, or None."""
    wanted = {"kernel_size": [(3, 3)], "stride": [(1, 1)], "dilation": [(1, 1)], "groups": [1], "padding": [(0, 0), (1, 1)]}
    wanted["padding_mode"] = ["zeros"]
    for name, values in wanted.items():
        if (got := getattr(layer, name)) not in values:
            return f"its {name} is {got}"
    return None


def unavailable(dtype: torch.dtype, device: torch.device, backend: str) -> str | None:
    """Why no convolution of a snapshot can be run by Winograd's algorithm, or None."""
    if device.type != "cpu":
        return f"it runs on CPUs, and the model is on {device}"
    if backend == "torch":
        return "backend 'torch' makes the noise outside of the convolution"
    if dtype not in winograd.DTYPES:
        return f"there is none in {str(dtype).removeprefix('torch.')}"
    return cpu.load().problem


def check(model: nn.Module, algorithm: str, dtype: torch.dtype | None, fuse: bool, int8: bool, backend: str) -> None:
    """Raises ValueError unless ``model`` can be run by ``algorithm``; dtype is None where it is the best of the device."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(map(repr, ALGORITHMS))}, got {algorithm!r}")
    if algorithm != "winograd":
        return
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if not fuse:
        raise refusal("fuse=False runs the model itself")
    if int8 and not byte_forms():
        raise refusal("in int8 there is one for processors with AVX-512 VNNI and BF16 alone")
    if (problem := unavailable(dtype or torch.float32, device, backend)) is not None:
        raise refusal(problem)
    if all(obstacle(m) for m in model.modules() if isinstance(m, nn.Conv2d)):
        raise refusal("the model has no 3x3 convolution of stride, dilation and groups 1 and padding 0 or 1")


def refusal(problem: str) -> ValueError:
    return ValueError(f"algorithm must be 'auto' or 'direct' here, got 'winograd': {problem}")


# ------------------------------------------------------------------------------------------------------------------- the algorithm
class Winograd:
    """The convolution of a `FusedConv`, with the noise and the activation before it, by one form of Winograd's algorithm.

    Its call takes x [rows, C, H, W] in the layer's dtype on the CPU, and is differentiable in it. It returns what the `FusedConv` does.
    """

    def __init__(self, fused: FusedConv, form: Form, weight: torch.Tensor | None = None):
        """weight: as the kernel reads it, None to make it of the layer's."""
        self.layer, self.form = fused.layer, form  # not fused, which holds this
        self.follow(fused)
        self.padding, bias = fused.layer.padding[0], fused.layer.bias
        self.weight = winograd.transform_weight(fused.layer.weight, *form) if weight is None else weight
        self.bias, self.units = None if bias is None else bias.float(), None
        self._turned = None

    def follow(self, fused: FusedConv) -> None:
        """Takes over what stands around the convolution."""
        self.activation, self.rectified, self.overwrites = fused.activation, fused.rectified, fused.overwrites

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x can be run: what watches torch's ops, or transforms them, does not know the kernel."""
        if x.dim() != 4 or x.shape[1] != self.layer.in_channels or x.device.type != "cpu" or x.dtype not in winograd.DTYPES:
            return False
        pool = self.activation is not None and self.activation.pool
        least = 3 - 2 * self.padding
        fits = x.numel() and min(x.shape[2:]) // (1 + pool) >= least
        return bool(fits) and autograd.is_direct(x) and not autograd.is_transformed()

    def __call__(self, x, residual=None):
        layer, sigma, at = self.layer, None, None
        if getattr(layer, "noise_enabled", False):
            sigma, at, _ = layer.noise(x)
            sigma = sigma.contiguous()  # its memory is read
        shape = self._shape(x, at)
        added = residual
        if residual is not None and (residual.shape != shape or residual.dtype != x.dtype or not autograd.is_direct(residual)):
            added = None
        if torch.is_grad_enabled() and (x.requires_grad or added is not None and added.requires_grad):
            y = _Convolution.apply(x, added, self, sigma, at)
        elif added is residual:
            return self.convolve(x, added, sigma, at, self.rectified, self.overwrites)
        else:
            y = self.convolve(x, added, sigma, at)
        return finish(y, None if added is residual else residual, self.rectified)

    def _shape(self, x, at) -> tuple[int, int, int, int]:
        pool = 2 if self.activation is not None and self.activation.pool else 1
        height, width = (side // pool + 2 * self.padding - 2 for side in x.shape[2:])
        return len(x) if at is None else at.rows, self.layer.out_channels, height, width

    def convolve(self, x, residual, sigma, at, relu=False, overwrites=False):
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None and not residual.is_contiguous(memory_format=torch.channels_last):
            residual, overwrites = residual.contiguous(memory_format=torch.channels_last), True  # a copy
        before, activation = {}, self.activation
        out = residual if overwrites and residual is not None else _map(x, *self._shape(x, at))
        if activation is not None:
            before = {"scale": activation.scale, "shift": activation.shift, "relu_in": True, "pool": activation.pool}
        clean = None
        if self.activation is not None and self.activation.clean_output:
            clean = _map(x, *x.shape[:2], *(side // (2 if activation.pool else 1) for side in x.shape[2:]))
        winograd.convolution(
            x, self.weight, out, self.padding, units=self.units, bias=self.bias, residual=residual, relu=relu, at=at, sigma=sigma,
            clean=clean, **before,
        )  # fmt: skip
        return out if clean is None else (out, clean)

    def gradient(self, g, g_clean, x, shape):
        """The gradient of x [shape] of those of the result and of the clean values; x is None where there is no activation."""
        differentiable = torch.is_grad_enabled()  # its gradient will be wanted as well
        layer, activation = self.layer, self.activation
        if differentiable or not autograd.is_direct(g) or autograd.is_transformed() or is_legacy_batchedtensor(g):
            g = nn.functional.conv_transpose2d(g, layer.weight, None, 1, self.padding)
        else:
            if self._turned is None:
                self._turned = winograd.transform_weight(winograd.turned(layer.weight), *self.form)
            g = g.contiguous(memory_format=torch.channels_last)
            back = _map(g, len(g), layer.in_channels, *(side + 2 - 2 * self.padding for side in g.shape[2:]))
            winograd.convolution(g, self._turned, back, 2 - self.padding)
            g = back
        if len(g) != shape[0]:  # lazy packing: one image was read by all its draws
            g = g.reshape(-1, shape[0], *g.shape[1:]).sum(0)
        if activation is None:
            return g
        g = g if g_clean is None else g + g_clean
        with torch.enable_grad():
            x = x if differentiable else x.detach().requires_grad_()
            return torch.autograd.grad(activation.clean(x), x, g, create_graph=differentiable)[0]


def _map(like, *shape):
    """Room for a map, channels last; no view, so that an in-place ReLU of it has a gradient."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


class _Convolution(torch.autograd.Function):
    """The gradient of the input of a `Winograd`, by the same algorithm with turned weights; that gradient's own by torch's operations."""

    @staticmethod
    def forward(ctx, x, residual, algorithm, sigma, at):
        ctx.save_for_backward(x if algorithm.activation is not None else None)
        ctx.algorithm, ctx.shape = algorithm, x.shape
        return algorithm.convolve(x, residual, sigma, at)

    @staticmethod
    def backward(ctx, g, g_clean=None):
        (x,) = ctx.saved_tensors
        g_x = ctx.algorithm.gradient(g, g_clean, x, ctx.shape) if ctx.needs_input_grad[0] else None
        return g_x, g if ctx.needs_input_grad[1] else None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------- the choice
_seconds: dict[tuple, dict[Form | None, float]] = {}  # what one run took by form, None being direct; by layer, see `_seconds_of`
_lock = threading.Lock()  # measured one after the other: two at a time would disturb each other


def choose(
    snapshot: torch.fx.GraphModule, run: Callable[[], object], rows: int, algorithm: str, allowed: list[Form], why_none: str | None = None
) -> dict[str, Choice]:
    """Gives every `FusedConv` of ``snapshot`` its algorithm; returns what they are by the names that their layers have in the model.

    Args:
        snapshot: a fused model.
        run: runs the snapshot on a few images.
        rows: of a full packed batch.
        algorithm: "auto", or "winograd" for the fastest form of it wherever there is one.
        allowed: forms of Winograd's algorithm; where there are none, ``why_none`` says why.
    """
    called = [snapshot.get_submodule(node.target) for node in snapshot.graph.nodes if node.op == "call_module"]
    convolutions = [module for module in called if isinstance(module, FusedConv)]
    for fused in convolutions:
        fused.winograd = None
    shapes, found = _shapes(convolutions, run) if allowed else {}, {}
    for fused in convolutions:
        problem = obstacle(fused.layer) or (None if allowed else why_none)
        if problem is None and fused not in shapes:
            problem = "the model does not call it"
        if problem is not None:
            found[fused.name] = Choice("direct", problem)
            continue
        timed, seconds = _measured(fused, shapes[fused], rows, allowed)
        best = min(allowed, key=seconds.get)
        share = seconds[best] / seconds[None]
        if algorithm == "winograd" or share < CLEARLY:
            fused.winograd, fused.packed = Winograd(fused, best), None
            found[fused.name] = Choice(str(best), f"{share:.2f} of the direct one's time, at {timed} rows")
        else:
            found[fused.name] = Choice("direct", f"{best} takes {share:.2f} of its time, at {timed} rows")
    return found


def _shapes(convolutions, run) -> dict[FusedConv, torch.Size]:
    """[C, H, W] of what each convolution reads."""
    shapes = {}

    def note(fused, args, kwargs):
        x = args[0] if args else kwargs["input"]
        shapes.setdefault(fused, x.shape[1:])

    hooks = [fused.register_forward_pre_hook(note, with_kwargs=True) for fused in convolutions]
    try:
        with contextlib.suppress(Exception):  # the probe will tell
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return {fused: shape for fused, shape in shapes.items() if len(shape) == 3}


def _measured(fused: FusedConv, shape, rows: int, candidates) -> tuple[int, dict[Form | None, float]]:
    """(rows, seconds of the direct convolution and of ``candidates`` with that many), by looking it up where a layer like it was timed."""
    layer, activation = fused.layer, fused.activation
    pooled = 4 if activation is not None and activation.pool else 1
    rows = max(1, min(rows, int(_MOST_WORK / (9 * math.prod(shape) * layer.out_channels // pooled))))
    before = None if activation is None else (activation.pool, activation.scale is not None, activation.alone, activation.clean_output)
    noisy = getattr(layer, "noise_enabled", False)
    x = functools.cache(lambda: _normal(layer.weight, rows, *shape))

    def make(form):
        algorithm = None
        if form is not None:  # the values of the weights do not matter
            like = winograd.transform_weight(layer.weight[:1], *form)
            panels = -(-layer.out_channels // winograd.COLUMNS)
            algorithm = Winograd(fused, form, like.expand(panels, *like.shape[1:]).contiguous())

        def run():
            kept, fused.winograd = fused.winograd, algorithm
            try:
                fused.forward(x())
            finally:
                fused.winograd = kept

        return run

    key = layer.weight.dtype, tuple(shape), layer.out_channels, layer.padding, before, noisy
    return rows, _seconds_of(key, rows, {form: functools.partial(make, form) for form in (None, *candidates)})


def _normal(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Normal numbers, channels last, in the dtype of ``like``. Torch's generator is the caller's, and stays where it is."""
    return _map(like, *shape).normal_(generator=torch.Generator(like.device).manual_seed(0))


def _seconds_of(key: tuple, rows: int, makers: dict[Form | None, Callable[[], Callable[[], object]]]) -> dict[Form | None, float]:
    """Seconds of one run for each form; None is the direct algorithm. They are measured once for a ``key`` and a number of rows, on what
    the makers give."""
    with _lock:
        known = _seconds.setdefault((cpu.load().unit, *key, rows), {})
        if missing := [form for form in makers if form not in known]:
            known.update(_time({form: makers[form]() for form in missing}, rows))
        return dict(known)


@torch.no_grad()
def _time(runs: dict[Form | None, Callable[[], object]], rows: int) -> dict[Form | None, float]:
    """Least seconds of processor time of a few runs in turns: what other processes take of a core is not counted."""
    seconds = dict.fromkeys(runs, math.inf)
    for number in range(_ROUNDS):
        for form, run in runs.items():
            with NoiseContext(torch.zeros((), dtype=torch.int64, device="cpu"), rows):
                if not number:  # makes primitives, maps memory, reads weights for the first time
                    run()
                begin = time.process_time()
                run()
                seconds[form] = min(seconds[form], time.process_time() - begin)
    return seconds
