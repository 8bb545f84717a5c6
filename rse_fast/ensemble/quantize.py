"""Turns noisy convolutions of a traced model into int8 ones; the noise is the dither of their rounding.

A quantised layer takes its input to bytes in the pass that adds the noise (`add_noise_u8`), which also does a 2x2 max-pool before it, with
one step and zero point a tensor, chosen on calibration batches with the noise on. Weights are symmetric bytes, one step an output channel.
The convolution is oneDNN's, and does a ReLU that alone reads it. Where the result goes to quantised layers only, directly or through
max-pools, it stays in bytes; everything else, additions and concatenations among it, happens in the model's own dtype.

On processors with AVX-512 VNNI a 3x3 convolution of stride 1 runs by Winograd's algorithm with products of bytes where that is faster (a
rule of its channels, `convolution.faster_in_bytes`). It reads and gives the higher precision, makes the noise in its input transform, and
takes the transformed input to bytes, a step and a zero point for each position of a tile. Transformed noise is Gaussian too, and stays the
dither. Activation, max-pool and additions around such a layer are merged as in floating point.

Where the calibration shows that bytes would disturb a layer's output by more than `LIMIT` of what the layer's own noise does, it stays in
the higher precision, and so does what cannot be quantised; the `Report` says which and why.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rse_fast import arguments, autograd, functional
from rse_fast.address import NoiseAddress
from rse_fast.context import note_undefined
from rse_fast.ensemble import convolution
from rse_fast.ensemble.convolution import Choice, Form, Winograd
from rse_fast.ensemble.fused_conv import FusedConv
from rse_fast.ensemble.merge import has_hooks, is_relu, is_simple, pair, pools_2x2
from rse_fast.kernels.cpu import winograd
from rse_fast.nn import NoiseLayer, NoisyConv2d

# A layer is quantised where the root mean square of its error stays below this share of the standard deviation that its own noise gives
# its output. Errors of layers and noises of layers add up alike, so this bounds the network's error in units of its noise, too.
LIMIT = 0.5

_WIDE = f"of {convolution.FEWEST_BYTE_CHANNELS} channels or more"
_SAMPLES = 2**16  # values kept of each batch to choose a step by
_PATCHES = 2**22  # values of patches that each batch adds to a layer's covariance
_BLOCK = 64  # weights rounded before the others are corrected


@dataclass(frozen=True)
class Report:
    """What was quantised.

    quantized: names of the layers that run in int8, in execution order, each with its error as a share of its own noise (see `LIMIT`).
    kept: names of the layers that run in the higher precision, each with the reason.
    weight_bits: 8, or 7 on processors whose int8 products would saturate with 8.
    """

    quantized: dict[str, float]
    kept: dict[str, str]
    weight_bits: int

    def __str__(self):
        lines = [f"int8: {len(self.quantized)} of {len(self.quantized) + len(self.kept)} layers, weights of {self.weight_bits} bits"]
        return "\n".join([*lines, *(f"  {name}: higher precision, {reason}" for name, reason in self.kept.items())])


def check_available(device: torch.device) -> None:
    """Raises RuntimeError unless int8 convolutions run on ``device``."""
    if device.type != "cpu":
        raise RuntimeError(f"dtype 'int8' runs on the CPU only, but the model is on {device}; take bfloat16 or float16 there")
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qconv_pointwise"):
        raise RuntimeError("dtype 'int8' needs a torch with oneDNN's int8 convolutions (torch.ops.onednn.qconv_pointwise)")


def check_calibration(batches) -> tuple[torch.Tensor, ...]:
    """The calibration batches as float32 tensors [N, C, H, W] of one image shape on the CPU.

    Raises TypeError or ValueError where there is none, or they are of no use.
    """
    if batches is None:
        raise ValueError("calibration must give batches of images [N, C, H, W] for dtype 'int8', got None; some hundred images will do")
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping)):
        raise TypeError(f"calibration must be an iterable of batches of images [N, C, H, W], got {type(batches).__name__}")
    batches = (batches,) if isinstance(batches, torch.Tensor) else tuple(batches)
    for batch in batches:
        if not isinstance(batch, torch.Tensor) or not batch.is_floating_point():
            got = batch.dtype if isinstance(batch, torch.Tensor) else type(batch).__name__
            raise TypeError(f"calibration must give floating-point tensors (images scaled to [0, 1]), got {got}")
        if not arguments.is_dense(batch) or batch.is_meta:
            raise TypeError(f"calibration must give dense tensors with data, got {batch.layout} on {batch.device}")
        if batch.dim() != 4 or batch.shape[1:] != batches[0].shape[1:]:
            shapes = ", ".join(str(tuple(b.shape)) for b in (batches[0], batch))
            raise ValueError(f"calibration must give batches [N, C, H, W] of one image shape, got {shapes}")
        if not bool(batch.isfinite().all()):
            raise ValueError("calibration must give finite images, got NaN or infinite pixels")
    if not sum(map(len, batches)):
        raise ValueError("calibration must give at least one image, got none")
    return tuple(batch.detach().float() for batch in batches if len(batch))


def check_no_gradient(x: torch.Tensor) -> None:
    """Raises RuntimeError where a gradient of ``x`` is asked for."""
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "an ensemble of dtype 'int8' is for inference and has no gradient: call it under torch.no_grad(), or for attacks take an "
            "Ensemble of the same model with dtype 'float32' or 'bfloat16'"
        )


@functools.cache
def weight_bits() -> int:
    """8 where the vendor's products of bytes are exact with 8-bit weights, which takes VNNI or AMX; else 7.

    Without these, products are added in pairs in 16 bits, which 8-bit weights can overflow without an error. A convolution is run to find
    out, since ``ONEDNN_MAX_CPU_ISA`` may keep the vendor's library from instructions that the processor has.
    """
    x = torch.full((1, 64, 3, 3), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight, steps = torch.full((32, 64, 3, 3), 127, dtype=torch.int8), torch.ones(32, dtype=torch.float32)
    geometry = (1, 1), (0, 0), (1, 1), 1
    packed = _pack(weight, steps, (1.0, 0), geometry)
    y = _convolve(x, (1.0, 0), packed, steps, steps.long() * 0, steps * 0, geometry, (1.0, 0), torch.float32, "none")
    return 8 if (y == 64 * 9 * 255 * 127).all() else 7


def _pack(weight, steps, noisy, geometry):
    """The weight in the vendor's order, which is opaque."""
    return torch.ops.onednn.qconv_prepack(weight, steps, *noisy, *map(list, geometry[:3]), geometry[3], None)


def _convolve(x, noisy, packed, steps, zeros, bias, geometry, output, dtype, activation):
    """The vendor's convolution of bytes."""
    return torch.ops.onednn.qconv_pointwise(x, *noisy, packed, steps, zeros, bias, *geometry, *output, dtype, activation, [], "")


def quantize(
    model: torch.fx.GraphModule,
    names: Sequence[str],
    run: Callable[[], None],
    dtype: torch.dtype,
    forms: Sequence[Form],
    algorithm: str,
) -> tuple[Report, dict[nn.Module, "QuantizedWinograd"], dict[str, Choice]]:
    """Quantises, in place, what it can of a traced model in float32, whose BatchNorms are folded as far as they can be.

    Args:
        names: of the noisy layers, by stream.
        run: runs the calibration batches through ``model``, with the noise on and the same noise at every call; it is called twice.
        dtype: of the results that are no bytes.
        forms: of Winograd's algorithm with products of bytes, which a layer may run where they are faster than the direct one.
        algorithm: "auto", or "winograd" for it wherever there is a form.

    Returns:
        The report; what the layers that stay as they are in ``model`` shall run, once they are fused; what each layer runs, by name.
    """
    bits = weight_bits()
    layers, kept = _candidates(model, names)
    observers = {node: _Observer(layer, forms) for node, layer in layers.items()}
    _replace(model, observers)
    run()
    comparisons = {node: _Comparison(layer, observers[node], bits, dtype, algorithm) for node, layer in layers.items()}
    _replace(model, comparisons)
    run()
    quantized, fast, errors, choices = {}, {}, {}, {}
    for node, layer in layers.items():
        name = names[layer.stream]
        best, error, choice = comparisons[node].choose()
        if error > LIMIT:
            kept[name] = f"its error would be {error:.2f} of its own noise (limit {LIMIT})"
            _replace(model, {node: layer})
            continue
        errors[name], choices[name] = error, choice
        (fast if isinstance(best, QuantizedWinograd) else quantized)[node] = best
    for node, conv in fast.items():
        conv.finite = _source(model, node) in {*quantized, *fast}
        _replace(model, {node: layers[node]})
    _replace(model, quantized)
    _merge_relu(model, quantized)
    _merge_pools(model, quantized)
    _keep_bytes(model, {node: (conv, observers[node].output) for node, conv in quantized.items()})
    model.delete_all_unused_submodules()
    model.recompile()
    return Report(errors, kept, bits), {layers[node]: conv for node, conv in fast.items()}, choices


# ------------------------------------------------------------------------------------------------------------------------- the layer
class QuantizedConv(nn.Module):
    """A noisy 2-D convolution on bytes; with ``pool`` of the 2x2 max-pool of its input, with ``relu`` followed by a ReLU.

    noisy: (step, zero point) of the input with its noise. output: of a result in bytes; None: it is ``output_dtype``. The input
    [N, C, H, W] is float, unless `reads` has told what its bytes stand for.
    """

    def __init__(self, layer: NoisyConv2d, noisy: tuple[float, int], bits: int, moments: torch.Tensor):
        super().__init__()
        self.layer, self.noisy, self.units, self.output = layer, noisy, {}, None
        self.pool, self.relu, self.output_dtype = False, False, torch.float32
        self.geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        # 7 bits: 2 * 255 * 64 < 2^15
        weight, steps = quantize_weight(layer.weight.detach(), 127 if bits == 8 else 64, moments)
        # Plain attributes: a cast of the model must not reach what is float32 by nature, and the vendor's packed tensor is opaque.
        self.steps, self.zeros = steps, torch.zeros(len(steps), dtype=torch.int64)
        self.bias = torch.zeros_like(steps) if layer.bias is None else layer.bias.detach().float().clone()
        self.packed = _pack(weight, steps, noisy, self.geometry)

    def reads(self, step: float, zero_point: int) -> None:
        """The input is bytes: ``step * (byte - zero_point)``."""
        self.units = {
            name: torch.full((self.layer.in_channels,), v, dtype=torch.float32)
            for name, v in (("scale", step), ("shift", -step * zero_point))
        }

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution of noisy bytes."""
        output, dtype = ((1.0, 0), self.output_dtype) if self.output is None else (self.output, torch.uint8)
        activation = "relu" if self.relu else "none"
        return _convolve(x, self.noisy, self.packed, self.steps, self.zeros, self.bias, self.geometry, output, dtype, activation)

    def forward(self, input):  # the name that nn.Conv2d gives it
        check_no_gradient(input)
        if not self.units:
            note_undefined(input)
        return self.convolve(self.to_bytes(input, *self.layer.noise(input)))

    def to_bytes(self, x: torch.Tensor, sigma: torch.Tensor, at: NoiseAddress, backend: str) -> torch.Tensor:
        """Max-pool, noise and rounding in one pass."""
        return functional.add_noise_u8(x, sigma, *self.noisy, pool=self.pool, **self.units, **at._asdict(), backend=backend)

    def noisy_convolution(self, x: torch.Tensor, sigma: torch.Tensor, at: NoiseAddress, backend: str) -> torch.Tensor:
        return self.convolve(self.to_bytes(x, sigma, at, backend))

    def extra_repr(self):
        step, zero_point = self.noisy
        return f"input step={step:.4g}, zero_point={zero_point}, output={'float' if self.output is None else 'bytes'}"


class QuantizedWinograd(Winograd):
    """A noisy convolution by Winograd's algorithm, with the noise inside and products of bytes.

    Bytes have a step and a zero point for each position of a transformed tile, weights a step for each position and output. ``finite``: x
    comes from a layer that is quantised. Else rows with NaN are noted, and those with infinities, whose tiles would be NaN.
    """

    finite = False

    def __init__(self, layer: NoisyConv2d, form: Form, weight: torch.Tensor, units: torch.Tensor):
        super().__init__(FusedConv(layer, ""), form, weight)
        self.units = units
        self.bias = torch.zeros(layer.out_channels, dtype=torch.float32) if self.bias is None else self.bias.clone()

    @classmethod
    def calibrated(cls, layer: NoisyConv2d, form: Form, steps: torch.Tensor, zeros: torch.Tensor, factors: torch.Tensor):
        """steps, zeros: of each position of the transformed input with its noise, whose channels are multiplied by ``factors``."""
        weight = winograd.transformed_weight(layer.weight, form.tile).float() / factors
        weight_steps = torch.stack([_weight_steps(position, 127) for position in weight])  # one by one: they fit into the cache
        narrow = (weight / weight_steps[..., None]).round().clamp(-127, 127).to(torch.int8)
        packed = winograd.pack_bytes(narrow, weight_steps * steps[:, None], zeros)
        return cls(layer, form, packed, winograd.pack_units(steps, zeros, factors))

    def __call__(self, x, residual=None):
        check_no_gradient(x)
        if not self.finite:
            note_undefined(x - x)
        return super().__call__(x, residual)

    def noisy_convolution(self, x: torch.Tensor, sigma: torch.Tensor, at: NoiseAddress, backend: str) -> torch.Tensor:
        return self.convolve(x, None, sigma.contiguous(), at)


class BytesMaxPool(nn.Module):
    """`nn.MaxPool2d` of bytes, without ceil_mode and dilation: the larger of shifted slices. Torch's own fails on bytes of real sizes."""

    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        self.kernel, self.stride, self.padding = pair(pool.kernel_size), pair(pool.stride), pair(pool.padding)

    def forward(self, input):
        x, (vertical, horizontal) = input, self.padding
        if vertical or horizontal:
            x = nn.functional.pad(x, (horizontal, horizontal, vertical, vertical))  # with 0, which no byte is below
        for dim, kernel, stride in zip((2, 3), self.kernel, self.stride, strict=True):
            last = (x.shape[dim] - kernel) // stride * stride
            slices = [x[(slice(None),) * dim + (slice(i, last + i + 1, stride),)] for i in range(kernel)]
            x = slices[0]
            for other in slices[1:]:
                x = torch.maximum(x, other)
        return x


def quantize_weight(weight: torch.Tensor, most: int, moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 weight in [-most, most], float32 step [Cout]) of a float32 weight [Cout, Cin / groups, kh, kw].

    The steps are those of least square error. moments: float64 [groups, K, K], the covariance of an output's K inputs. Weights are rounded
    one input after the other, and those to come take over what the rounding did to the output as far as inputs correlate (GPTQ, Frantar
    et al., ICLR 2023, arXiv 2210.17323): systematic errors do not average out over the draws, so they count most.
    """
    groups, terms = moments.shape[:2]
    rest = weight.double().reshape(groups, -1, terms)
    steps = _weight_steps(rest, most).float().double()
    # Damped as there, by a hundredth: few images give moments of low rank, in which rounding leaves negative eigenvalues.
    damped = moments + 0.01 * moments.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(terms, dtype=torch.float64)
    # Row k: how the inputs after k make up for an error at k, by the inverse covariance of what is not rounded yet.
    pull = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    quantized = torch.empty_like(rest)
    for first in range(0, terms, _BLOCK):
        last = min(first + _BLOCK, terms)
        errors = torch.empty_like(rest[..., first:last])
        for k in range(first, last):
            quantized[..., k] = (rest[..., k] / steps).round().clamp(-most, most)
            errors[..., k - first] = (rest[..., k] - quantized[..., k] * steps) / pull[:, None, k, k]
            rest[..., k:last] -= errors[..., k - first, None] * pull[:, None, k, k:last]
        rest[..., last:] -= errors @ pull[:, first:last, last:]
    return quantized.to(torch.int8).reshape(weight.shape), steps.float().flatten()


def _weight_steps(weight: torch.Tensor, most: int) -> torch.Tensor:
    """Steps [...] of least square error of a weight [..., K] that is rounded to [-most, most]."""
    largest = weight.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    best, steps = torch.full_like(largest, math.inf), largest / most
    for share in torch.linspace(0.6, 1.0, 21, dtype=torch.float64).tolist():
        step = (share * largest / most)[..., None]
        error = ((weight / step).round().clamp(-most, most) * step - weight).square().sum(-1)
        best, steps = torch.minimum(best, error), torch.where(error < best, step[..., 0], steps)
    return steps


# ------------------------------------------------------------------------------------------------------------------------ calibration
class _Range:
    """What is known of a tensor's values: both ends, and a sample."""

    def __init__(self):
        self.low, self.high, self.samples = math.inf, -math.inf, []

    def add(self, x: torch.Tensor) -> None:
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
        flat = x.permute(0, 2, 3, 1).reshape(-1) if x.dim() == 4 else x.reshape(-1)
        self.samples.append(flat[:: 1 + len(flat) // _SAMPLES].float())

    def choose(self, relu: bool = False) -> tuple[float, int]:
        """(step, zero point) of least square error on the sample, of values after a ReLU or as they are."""
        samples = torch.cat(self.samples)
        samples = samples.relu() if relu else samples
        low, high = min(0.0, 0.0 if relu else self.low), max(0.0, self.high)
        if not math.isfinite(high - low):
            raise ValueError(f"calibration must give finite activations, got values in [{self.low}, {self.high}]")
        if high == low:
            return 1.0, 0
        best, chosen = math.inf, None
        for share in torch.linspace(0.8, 1.0, 21, dtype=torch.float64).tolist():
            step = share * (high - low) / 255
            zero_point = round(-share * low / step)
            error = samples - step * ((samples / step).round() + zero_point).clamp(0, 255).sub(zero_point)
            if (power := error.square().mean().item()) < best:
                best, chosen = power, (step, zero_point)
        return chosen


class _Transformed:
    """What is known of a layer's transformed noisy input: the largest magnitudes [positions, C], and a sample [positions, tiles, C]."""

    def __init__(self, form: Form, padding: int):
        self.form, self.padding, self.largest, self.samples = form, padding, 0.0, []

    def add(self, x: torch.Tensor) -> None:
        tiles = winograd.transform_input(x[: max(1, _PATCHES // x[0].numel())], self.form.tile, self.padding)
        self.largest = tiles.abs().amax(1).clamp_min(self.largest)
        count = max(1, _SAMPLES // (2 * tiles.shape[2]))
        picked = torch.randperm(tiles.shape[1], generator=torch.Generator().manual_seed(0))[:count]  # a stride might meet borders alone
        self.samples.append(tiles[:, picked])

    def choose(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(steps, zero points, factors): the first two of least square error on the sample, for each position.

        The factors bring channels half way, as logarithms go, to equal largest values: all the way would take from the weights what bytes
        of the input win.
        """
        samples = torch.cat(self.samples, 1)
        spread = samples.std((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
        factors = (self.largest / spread[:, None]).amax(0).clamp_min(1e-3).rsqrt()
        samples = (samples * factors).flatten(1)
        low, high = samples.amin(1).clamp_max(0), samples.amax(1).clamp_min(0)
        best, steps, zeros = torch.full_like(low, math.inf), torch.ones_like(low), torch.zeros_like(low)
        for share in torch.linspace(0.8, 1.0, 21, dtype=torch.float64).tolist():
            step = (share * (high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
            zero = (-share * low / step).round()
            error = samples - step[:, None] * ((samples / step[:, None] + zero[:, None]).round().clamp(0, 255) - zero[:, None])
            power = error.square().mean(1)
            better = power < best
            best, steps, zeros = torch.minimum(best, power), torch.where(better, step, steps), torch.where(better, zero, zeros)
        return steps, zeros, factors


class _Observer(nn.Module):
    """The layer itself; the ranges of its noisy input and of its output; and the covariance of each output's inputs."""

    def __init__(self, layer: NoisyConv2d, forms: list[Form]):
        super().__init__()
        self.layer, self.noisy, self.output = layer, _Range(), _Range()
        self.count, self.sum, self.products = 0, 0.0, 0.0
        forms = [] if convolution.obstacle(layer) else forms
        self.transformed = {form: _Transformed(form, layer.padding[0]) for form in forms}

    def forward(self, input):
        layer = self.layer
        noisy = layer.add_noise(input)
        y = layer._conv_forward(noisy, layer.weight, layer.bias)
        self.noisy.add(noisy)
        self.output.add(y)
        terms, positions = layer.weight[0].numel() * layer.groups, y[0, 0].numel()
        rows = max(1, 4 * _PATCHES // (terms * positions))  # what is unfolded for a moment, of which a part is taken
        patches = nn.functional.unfold(noisy[:rows], layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        patches = patches.movedim(1, -1).reshape(-1, layer.groups, terms // layer.groups)
        patches = patches[:: 1 + len(patches) * terms // _PATCHES].movedim(1, 0)  # [groups, patches, terms]
        self.count += patches.shape[1]
        self.sum, self.products = self.sum + patches.double().sum(1), self.products + (patches.mT @ patches).double()
        for transformed in self.transformed.values():
            transformed.add(noisy)
        return y

    def quantized(self, bits: int) -> QuantizedConv:
        mean = self.sum / self.count
        moments = self.products / self.count - mean[:, :, None] * mean[:, None, :]
        return QuantizedConv(self.layer, self.noisy.choose(), bits, moments)


class _Comparison(nn.Module):
    """The layer itself, and how its int8 forms differ from it on the same input and noise: the direct one (None), and what is faster."""

    def __init__(self, layer: NoisyConv2d, seen: _Observer, bits: int, dtype: torch.dtype, algorithm: str):
        super().__init__()
        self.layer, self.why = layer, "as asked for" if algorithm == "winograd" else f"a layer {_WIDE}"
        direct = seen.quantized(bits)
        direct.output_dtype = dtype
        self.forms, self.slower = {None: direct}, []
        for form, transformed in seen.transformed.items():
            if algorithm != "winograd" and not convolution.faster_in_bytes(layer):
                self.slower.append(form)
            else:
                self.forms[form] = QuantizedWinograd.calibrated(layer, form, *transformed.choose())
        # Of float minus int8, per channel.
        self.count, self.mean, self.power = 0, dict.fromkeys(self.forms, 0.0), dict.fromkeys(self.forms, 0.0)

    def forward(self, input):
        sigma, at, backend = self.layer.noise(input)
        y = self.layer._conv_forward(autograd.add_noise(input, sigma, at, backend=backend), self.layer.weight, self.layer.bias)
        self.count += y.numel() // y.shape[1]
        for form, conv in self.forms.items():
            difference = (y - conv.noisy_convolution(input, sigma, at, backend)).double()
            self.mean[form] = self.mean[form] + difference.sum((0, 2, 3))
            self.power[form] = self.power[form] + difference.square().sum((0, 2, 3))
        return y

    def relative_errors(self) -> dict[Form | None, float]:
        """Root mean square of the difference, without its mean, over that of what the layer's own noise makes of its output."""
        layer, sigma = self.layer, self.layer.current_sigma().double()
        weight = layer.weight.detach().double().square().sum((2, 3))  # [Cout, Cin / groups]
        if sigma.dim():
            sigma = sigma.reshape(layer.groups, -1).repeat_interleave(weight.shape[0] // layer.groups, 0)  # of each output's inputs
        noise = (weight * sigma.square()).sum(1)
        errors = {form: self.power[form] / self.count - (self.mean[form] / self.count).square() for form in self.forms}
        return {form: float((e.clamp_min(0).mean() / noise.mean()).sqrt()) if noise.any() else math.inf for form, e in errors.items()}

    def choose(self) -> "tuple[QuantizedConv | QuantizedWinograd, float, Choice]":
        """(Winograd's form where it may run and its error is within `LIMIT`, else the direct one; its error; what it is and why)."""
        errors = self.relative_errors()
        within = [form for form, error in errors.items() if error <= LIMIT]
        best = within[-1] if within else min(errors, key=errors.get)  # the first is the direct one
        conv = self.forms[best]
        conv.bias += (self.mean[best] / self.count).float()
        if best is not None:
            return conv, errors[best], Choice(str(best), f"in int8, {self.why}")
        why = ["in int8", *filter(None, [convolution.obstacle(self.layer)])]
        why += [f"the error of {form} would be {errors[form]:.2f} of its own noise (limit {LIMIT})" for form in errors if form]
        if self.slower:
            why.append(f"{self.slower[0]} is faster for layers {_WIDE} alone, on processors without AMX")
        return conv, errors[best], Choice("direct", "; ".join(why))


def _source(model, node) -> torch.fx.Node:
    """Whose values a node reads, directly or through ReLUs and max-pools."""
    source = node.args[0]
    while is_relu(model, source) or source.op == "call_module" and _is_pool(model.get_submodule(source.target)):
        source = source.args[0]
    return source


# -------------------------------------------------------------------------------------------------------------------------- the graph
def _candidates(model, names) -> tuple[dict[torch.fx.Node, NoisyConv2d], dict[str, str]]:
    """The layers that can be quantised, by the node that calls them, in order; and what cannot, with the reason."""
    found, kept, calls = {}, {}, {}
    for node in model.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(model.get_submodule(node.target), []).append(node)
    for layer, nodes in calls.items():
        noisy = isinstance(layer, NoiseLayer)
        if not noisy and not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
            continue
        name = names[layer.stream] if noisy else nodes[0].target.removeprefix("0.")
        if not isinstance(layer, nn.modules.conv._ConvNd):
            kept[name] = "no convolution"
        elif not noisy or not layer.noise_enabled or not bool((layer.current_sigma() > 0).all()):
            kept[name] = "its input has no noise to dither the rounding"
        elif type(layer) is not NoisyConv2d or not is_simple(layer) or has_hooks(layer):
            kept[name] = "no plain 2-D convolution with zero padding"
        elif len(nodes) > 1 or len(nodes[0].args) != 1:
            kept[name] = "it is called more than once, or by keyword"
        else:
            found[nodes[0]] = layer
    return found, kept


def _replace(model, modules: dict[torch.fx.Node, nn.Module]) -> None:
    """Makes each node call this module."""
    for node, module in modules.items():
        node.target = f"rse_fast_int8_{node.name}"
        model.add_submodule(node.target, module)
    model.recompile()


def _merge_relu(model, quantized: dict[torch.fx.Node, QuantizedConv]) -> None:
    """Lets each convolution do the ReLU that alone reads it."""
    for node, conv in quantized.items():
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is not None and is_relu(model, user):
            conv.relu = True
            user.replace_all_uses_with(node)
            model.graph.erase_node(user)


def _merge_pools(model, quantized: dict[torch.fx.Node, QuantizedConv]) -> None:
    """Lets each convolution do the 2x2 max-pool that it alone reads."""
    for node, conv in quantized.items():
        (source,) = node.args
        if len(source.users) == 1 and len(source.args) == 1 and pools_2x2(model, source):
            conv.pool = True
            node.args = source.args
            model.graph.erase_node(source)


def _keep_bytes(model, quantized: dict[torch.fx.Node, tuple[QuantizedConv, _Range]]) -> None:
    """Lets results that only quantised layers read, directly or through max-pools, stay in bytes."""
    for node, (conv, observed) in quantized.items():
        pools, readers, rest = {}, [], list(node.users)
        while rest:
            user = rest.pop()
            pool = model.get_submodule(user.target) if user.op == "call_module" else None
            if user in quantized:
                readers.append(user)
            elif _is_pool(pool):
                pools[user] = BytesMaxPool(pool)
                rest += user.users
            else:
                break
        else:
            conv.output = observed.choose(conv.relu)
            for reader in readers:
                quantized[reader][0].reads(*conv.output)
            _replace(model, pools)


def _is_pool(module) -> bool:
    simple = type(module) is nn.MaxPool2d and not (module.ceil_mode or module.return_indices) and module.dilation in (1, (1, 1))
    return simple and not has_hooks(module)
