"""What a snapshot calls in place of a 2-D convolution: a module that also does noise and activation before it, sum and ReLU behind it."""

import functools

import torch
from torch import nn

from rse_fast import arguments, autograd
from rse_fast.context import room


class Activation(nn.Module):
    """``[x * scale + shift] -> ReLU -> [2x2 max-pool] -> noise of a layer``, one pass over memory for all of it.

    affine: scale and shift [C], or None. Returns (noisy, clean) of x; clean, to which the noise was added, is complete if ``clean_output``.
    alone: whether x is memory that nobody else reads, so that the result may take its place.
    """

    def __init__(
        self,
        layer: nn.Module,
        pool: bool = False,
        affine: tuple[torch.Tensor, torch.Tensor] | None = None,
        clean_output: bool = False,
        alone: bool = False,
    ):
        super().__init__()
        self.layer, self.pool, self.clean_output, self.alone = layer, pool, clean_output, alone
        self.scale, self.shift = affine or (None, None)  # no buffers: they stay in float32, as the noise arithmetic is

    def forward(self, x):
        x = x.to(self.layer.weight.dtype)
        noisy = self.layer.noise_enabled
        # The op that does it all is for inference, in numbers that the transforms of torch.func do not see.
        if not noisy or x.requires_grad or autograd.is_transformed() or x.shape[1] != self.layer.in_channels:
            clean = self.clean(x)
            return self.layer.add_noise(clean) if noisy else clean, clean
        sigma, at, backend = self.layer.noise(x)
        if backend != "auto":
            arguments.check_backend(backend, x)
        options = at, self.scale, self.shift, True
        if self.pool or self.clean_output:
            out = room(x, at.rows, self.pool)
            return autograd.activate_noise(x, sigma, *options, self.pool, backend, self.clean_output, out)
        if self.alone and len(x) == at.rows and x.is_contiguous(memory_format=torch.channels_last):
            autograd.add_noise_(x, sigma, *options, backend)  # no fresh memory, and the convolution that reads it finds it in the cache
            return x, x
        return autograd.add_noise(x, sigma, *options, backend, out=room(x, at.rows)), x

    def clean(self, x):
        """What the noise is added to, by torch's operations."""
        x = x if self.scale is None else (x * self.scale[:, None, None] + self.shift[:, None, None]).to(x.dtype)
        return nn.functional.max_pool2d(x.relu(), 2) if self.pool else x.relu()


class FusedConv(nn.Module):
    """A 2-D convolution with its weight in the vendor library's order: of x with the layer's noise, of an `Activation` of x, or of x.

    name: of the layer in the model. activation: makes the noisy input out of x; where it keeps the clean values, (result, clean) is
    returned. winograd: another algorithm for all of it, see `rse_fast.ensemble.convolution`, or None. Its call may be given what is to
    be added to the result. rectified: whether a ReLU of the sum ends it. overwrites: whether the result may take the memory of what is
    added.

    A noisy input takes memory that all convolutions of a packed batch share.
    """

    def __init__(self, layer: nn.Module, name: str, activation: Activation | None = None):
        super().__init__()
        self.layer, self.activation = layer, activation
        self.name = name.removeprefix("0.")  # of the container that `copy` puts around the model
        self.packed = self.winograd = None
        self.rectified = self.overwrites = False

    @property
    def clean_output(self) -> bool:
        return self.activation is not None and self.activation.clean_output

    def forward(self, input, residual=None):  # the name that nn.Conv2d gives it
        layer = self.layer
        x = input.to(layer.weight.dtype)  # a forward may make a float32 tensor on the way, and autocast does not know the vendor's op
        if self.winograd is not None and self.winograd.takes(x):
            return self.winograd(x, residual)
        if self.activation is not None:
            x, clean = self.activation.forward(x)  # nobody hangs a hook there
            return (self._convolve(x, residual), clean) if self.clean_output else self._convolve(x, residual)
        return self._convolve(layer.add_noise(x, room) if getattr(layer, "noise_enabled", False) else x, residual)

    def _convolve(self, x, residual):
        layer = self.layer
        # The vendor's op for packed weights has no gradient, and what watches torch's ops does not know it. It exists on the CPU alone.
        watched = autograd.is_transformed() or not autograd.is_direct(x)
        unpacked = x.device.type != "cpu" or x.requires_grad or watched or not x.numel() or not _packs(x.dtype)
        if unpacked or x.dim() != 4 or x.shape[1] != layer.in_channels:  # of the latter, torch says what is wrong
            return finish(layer._conv_forward(x, layer.weight, layer.bias), residual, self.rectified)
        geometry = layer.padding, layer.stride, layer.dilation, layer.groups
        if self.packed is None:  # by the first batch's shape, which is the usual one; other shapes are right too
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *geometry, list(x.shape))
        takes = residual is not None and residual.shape == self._shape(x) and residual.dtype == x.dtype
        if takes and autograd.is_direct(residual) and not residual.requires_grad:
            add = "add", 1.0, None, [], ""
            if self.overwrites and residual.is_contiguous(memory_format=torch.channels_last):
                y = torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, self.packed, layer.bias, *geometry, *add)
            else:
                residual = residual.contiguous(memory_format=torch.channels_last)
                y = torch.ops.mkldnn._convolution_pointwise.binary(x, residual, self.packed, layer.bias, *geometry, *add)
        else:
            y = torch.ops.mkldnn._convolution_pointwise(x, self.packed, layer.bias, *geometry, "none", [], "")
            y = y if residual is None else y + residual
        return y.relu_() if self.rectified else y  # the vendor's own makes 0 of NaN

    def _shape(self, x):
        layer = self.layer
        geometry = zip(x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True)
        return len(x), layer.out_channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in geometry)


def finish(y: torch.Tensor, residual: torch.Tensor | None, rectified: bool) -> torch.Tensor:
    """What a `FusedConv` does to the result of its convolution, by torch's operations."""
    y = y if residual is None else y + residual
    return y.relu() if rectified else y


def _packs(dtype: torch.dtype) -> bool:
    """Whether the vendor's library keeps weights of ``dtype`` in its own order on this processor."""
    return torch.backends.mkldnn.enabled and _packs_in_hardware(dtype)


@functools.cache
def _packs_in_hardware(dtype):
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()
