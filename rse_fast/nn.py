"""Layers that add Gaussian noise to their input, in training and in evaluation alike (Liu et al., ECCV 2018).

Where the noise's seed comes from: by default from torch's generator of the device, drawn anew at every call as dropout does it, so
``torch.manual_seed`` reproduces a run and activation checkpointing replays it. Inside a `NoiseContext` (Ensemble, certify, tests) the seed
is given, and every value of the noise is a function of (seed, layer, draw, image, position) alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from rse_fast import arguments, autograd, functional
from rse_fast.address import NoiseAddress
from rse_fast.context import active, ambient

__all__ = ["GaussianNoise", "NoisyConv1d", "NoisyConv2d", "NoisyConv3d", "NoisyLinear"]

_PROGRAM = "rse_fast.export(rse_fast.Ensemble(model), example, 'model.pt2') writes a program whose seed is an input"
NO_GRAPH = f"torch.fx cannot trace into a noisy layer or an ensemble, only a model around it, in which it is one node: {_PROGRAM}"
NO_SCRIPT = f"torch.jit.script cannot take noisy layers, whose seed comes from outside of TorchScript: {_PROGRAM}"
NO_SIGMA = (
    "sigma must have a value, got a tensor on the meta device that was read from a file there: load the model to a device with data, or "
    "set sigma (rse_fast.set_sigma) before the model leaves the meta device"
)


class NoiseLayer(nn.Module):
    """What all noisy layers share: sigma, the switch, and the arguments that address their noise.

    Attributes:
        sigma: standard deviation >= 0 of the noise, in the units of the input: a float32 buffer, 0-dim or [C], outside the state dict, so
            keys stay those of the plain layer. `set_sigma` changes it.
        sigma_raw: of a learnable sigma only, in place of the buffer: the float32 parameter of which sigma is the softplus, so it stays
            positive whatever the optimiser does. A state dict without it loads, and leaves it as it is.
        noise_enabled: the switch that `rse_fast.noise_off` turns.
        channel_dim: the dimension of the channels.
        stream: index of the layer in its model, set by `number_layers`; it addresses the noise within a `NoiseContext`.
        layer_name: name of the layer in its model.

    Reference: a learnable sigma is in the spirit of PNI, He et al., CVPR 2019.
    """

    stream = 0
    layer_name = ""
    noise_enabled = True
    channel_dim = 1
    sigma: Tensor
    sigma_raw: nn.Parameter
    _remembered_sigma: Tensor | None = None  # sigma's values, while its tensor is on the meta device and has none

    def init_noise(self, sigma: arguments.PerChannel, learnable: bool = False) -> None:
        """Gives the layer its sigma (a number or a float32 tensor, 0-dim or one per channel, >= 0; > 0 if learnable)."""
        arguments.check_sigma("sigma", sigma)
        device = sigma.device if isinstance(sigma, torch.Tensor) else "cpu"  # a number has its value also where the default device is meta
        value = torch.as_tensor(sigma, dtype=torch.float32, device=device).detach().clone()
        channels = getattr(self, "in_channels", None) or getattr(self, "in_features", None)  # 0 before a lazy layer knows
        if value.dim() > 1 or (channels and value.numel() not in (1, channels)):
            wanted = f"have shape [{channels}]" if channels else "have one value a channel"
            raise ValueError(f"sigma must be a number or {wanted}, got shape {tuple(value.shape)}")
        like = next(self.parameters(recurse=False), None)
        device = torch.get_default_device() if like is None else like.device
        value = value.reshape(()) if value.numel() == 1 and channels != 1 else value
        value = _raw(value) if learnable else value
        self._remember_sigma(value, device)
        if learnable:
            self.sigma_raw = nn.Parameter(value.to(device))
        else:
            self.register_buffer("sigma", value.to(device), persistent=False)

    @torch.no_grad()
    def set_sigma(self, sigma: arguments.PerChannel) -> None:
        """Gives the layer another sigma in place.

        The tensor stays the same one, so compiled and captured graphs, ensembles and optimisers see the change.

        Args:
            sigma: a number, or a float tensor of sigma's shape, >= 0; > 0 if learnable.

        Raises:
            TypeError: sigma is neither a number nor a float tensor.
            ValueError: sigma is negative, not finite, or of another shape; or it is 0 and learnable.
        """
        arguments.check_sigma("sigma", sigma)
        kept = self._parameters.get("sigma_raw")
        target = self.sigma if kept is None else kept
        value = torch.as_tensor(sigma, dtype=torch.float32, device="cpu" if target.is_meta else target.device)
        if value.dim() and value.shape != target.shape:
            raise ValueError(f"sigma must be a number or have shape {tuple(target.shape)}, got shape {tuple(value.shape)}")
        value = value if kept is None else _raw(value)
        if target.is_meta:
            self._remembered_sigma = value.expand(target.shape).clone()
        else:
            target.copy_(value)

    @torch.no_grad()
    def known_sigma(self) -> torch.Tensor:
        """sigma's values, float32, also while its tensor is on the meta device."""
        stored, kept = self._stored_sigma(), self._remembered_sigma
        if stored is None or not stored.is_meta:
            return self.current_sigma().float()
        if kept is None:
            raise ValueError(NO_SIGMA)
        return nn.functional.softplus(kept) if "sigma_raw" in self._parameters else kept

    def current_sigma(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """sigma for an input of ``dtype``: float32, whose memory kernels read, or as it is for float64. Attached to ``sigma_raw`` where it
        is learnable."""
        sigma = self._buffers.get("sigma")
        sigma = nn.functional.softplus(self.sigma_raw) if sigma is None else sigma
        return sigma if sigma.dtype == torch.float32 or dtype == torch.float64 else sigma.float()

    def noise(self, x: torch.Tensor) -> tuple[torch.Tensor, NoiseAddress, str]:
        """(sigma, address, backend) of the noise of one call on ``x``, which is a batch."""
        context = getattr(active, "context", None)
        return (self.current_sigma(x.dtype), ambient(x), "auto") if context is None else context.noise(self, x)

    def add_noise(self, x: torch.Tensor, out: Callable[[Tensor, int], Tensor | None] | None = None) -> torch.Tensor:
        """``x`` plus the noise of one call; the channels are dimension ``channel_dim``.

        out: gives memory for so many rows like ``x``, which the result may take, or None.
        """
        arguments.check_batch(x)
        sigma, at, backend = self.noise(x)
        if self.channel_dim == 1 and x.dim() >= 2 and _fits(x, 1, sigma, backend):
            return autograd.add_noise(x, sigma, at, out=None if out is None else out(x, at.rows))
        return functional.add_noise(x, sigma, **at._asdict(), channel_dim=self.channel_dim, backend=backend)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NoiseLayer":
        # model.half() or .bfloat16() must not round sigma: noise arithmetic is float32 whatever the model's dtype. And a state dict without
        # sigma could not bring back what to("meta") and to_empty() take away.
        before = self._stored_sigma()
        kept = None if before is None else self._remembered_sigma if before.is_meta else before.detach().clone()
        super()._apply(fn, recurse)
        after = self._stored_sigma()
        if kept is None and self._buffers.get("sigma") is after is not None and not after.is_meta:
            raise ValueError(NO_SIGMA)  # a learnable one comes with the state dict
        if kept is None or after is None:
            return self
        if after is not before or after.is_meta or after.dtype != torch.float32:
            self._remember_sigma(kept, after.device)
            self._store_sigma(kept.to(after.device))
        elif isinstance(after, nn.Parameter) and not after.is_meta:
            after.data.copy_(kept)  # to_empty() leaves a parameter the same tensor
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str], errors: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if prefix + "sigma_raw" in missing:  # a plain model's checkpoint
            missing.remove(prefix + "sigma_raw")
        stored = self._stored_sigma()
        if self._remembered_sigma is None or stored is None:
            return
        # With assign=True, the layer's weights have left the meta device by now.
        weights = [p for n, p in self._parameters.items() if p is not None and n != "sigma_raw"]
        if stored.is_meta and metadata.get("assign_to_params_buffers") and not any(p.is_meta for p in weights):
            device = weights[0].device if weights else self._remembered_sigma.device
            self._store_sigma(self._remembered_sigma.to(device))
            del self._remembered_sigma
        elif not stored.is_meta:
            del self._remembered_sigma

    def _stored_sigma(self) -> torch.Tensor | None:
        """The tensor that sigma is kept in: the buffer, or the parameter that a learnable one is computed of."""
        raw = self._parameters.get("sigma_raw")
        return self._buffers.get("sigma") if raw is None else raw

    def _store_sigma(self, value: Tensor) -> None:
        if "sigma_raw" not in self._parameters:
            self.sigma = value
        elif self.sigma_raw.is_meta:  # a tensor on the meta device takes no data
            self.sigma_raw = nn.Parameter(value, self.sigma_raw.requires_grad)
        else:
            self.sigma_raw.data = value

    def _remember_sigma(self, value: Tensor, device: torch.device | str) -> None:
        """Keeps the value while ``device`` is the meta device, where tensors have none."""
        if torch.device(device).type == "meta":
            self._remembered_sigma = value
        else:
            self.__dict__.pop("_remembered_sigma", None)

    def __prepare_scriptable__(self) -> None:  # what torch.jit.script asks first
        raise ValueError(NO_SCRIPT)

    def extra_repr(self) -> str:
        plain = super().extra_repr()
        if (stored := self._stored_sigma()) is not None and stored.is_meta and self._remembered_sigma is None:
            return f"{plain}, sigma unknown" if plain else "sigma unknown"
        sigma = self.known_sigma()
        text = f"sigma={sigma.item():.4g}" if sigma.numel() == 1 else f"sigma=[{sigma.min():.4g} .. {sigma.max():.4g}]"
        text += ", learnable" if "sigma_raw" in self._parameters else ""
        return f"{plain}, {text}" if plain else text


def _raw(sigma: torch.Tensor) -> torch.Tensor:
    """The parameter of a learnable sigma: the inverse of softplus."""
    if not bool((sigma > 0).all()):
        raise ValueError(f"sigma must be positive to be learnable, got {sigma.tolist()}")
    return sigma + torch.log(-torch.expm1(-sigma))


class GaussianNoise(NoiseLayer):
    """``x + sigma * eps`` for x [N, ...] of any float dtype; keeps dtype and memory layout, saves nothing for backward.

    The noise is on in ``train()`` and in ``eval()``; `rse_fast.noise_off` switches it off.

    Args:
        sigma: standard deviation of the noise, >= 0, in the units of the input: a number, or a float tensor, 0-dim or [C].
        channel_dim: the dimension that addresses channels, not 0.

    Raises:
        TypeError: sigma is neither a number nor a float tensor.
        ValueError: sigma is negative, not finite, or of another shape; channel_dim is 0.

    Examples:
        >>> model = nn.Sequential(GaussianNoise(0.25), network)  # noise at the input alone, as for certificates

    Reference: Liu, Cheng, Zhang, Hsieh, ECCV 2018.
    """

    def __init__(self, sigma: arguments.PerChannel, channel_dim: int = 1) -> None:
        super().__init__()
        if arguments.integer("channel_dim", channel_dim) == 0:
            raise ValueError("channel_dim must not be 0, the dimension of the images, got 0")
        self.channel_dim = channel_dim
        self.init_noise(sigma)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return one_node(self, x)
        if not self.noise_enabled:
            return x
        return self.add_noise(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, channel_dim={self.channel_dim}"


class NoisyInput(NoiseLayer):
    """Mixin for a layer with a forward of its own: noise on its first input, then that forward. Channels are dimension 1."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Proxy):
            return one_node(self, input, *args, **kwargs)
        if not self.noise_enabled:
            return super().forward(input, *args, **kwargs)
        arguments.check_batch(input)
        if not input.is_meta and (gone := [name for name, p in self._parameters.items() if p is not None and p.is_meta]):
            raise ValueError(f"{gone[0]} must have data, got a tensor on the meta device for x on {input.device}")
        one = isinstance(self, nn.modules.conv._ConvNd) and input.dim() == len(self.kernel_size) + 1  # a sample without a batch dimension
        noisy = self.add_noise(input.unsqueeze(0)).squeeze(0) if one else self.add_noise(input)
        try:
            return super().forward(noisy, *args, **kwargs)
        except RuntimeError:
            self._refuse(input.unsqueeze(0) if one else input)
            raise

    def _refuse(self, x: Tensor) -> None:
        """Raises what is wrong with x or with the layer's own attributes, after torch's own convolution has refused them."""
        own = next(cls for cls in type(self).__mro__ if "forward" in vars(cls) and not issubclass(cls, NoiseLayer))
        if own.__module__ == nn.modules.conv.__name__ and "_conv_forward" not in vars(self):
            layer: Any = self
            arguments.check_convolution_layer(self, *functional.autocast(x, layer.weight, layer.bias))


class NoisyConv(NoisyInput):
    """A plain ``nn.ConvNd`` whose forward is one noisy op: backward holds the clean input, as the plain convolution does."""

    weight: Any  # what nn.ConvNd, the second base of each layer, gives it
    bias: Any
    stride: Any
    padding: Any
    dilation: Any
    groups: Any
    _conv_forward: Any

    def __init__(self, *args: Any, sigma: arguments.PerChannel = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_noise(sigma)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.ConvNd gives it: callers may use it
        if isinstance(input, Proxy):
            return one_node(self, input)
        weight, bias = self.weight, self.bias
        if not self.noise_enabled:
            return self._conv_forward(input, weight, bias)
        stride, padding = self.stride, self.padding
        arguments.check_batch(input)
        dimensions = input.dim()
        if dimensions == weight.dim() - 1 and input.shape[0] == self.in_channels:  # one sample without a batch dimension
            return self.forward(input.unsqueeze(0)).squeeze(0)
        # Where the padding repeats noisy pixels, noise comes first; and what was patched, for tiled pictures say, shall be called.
        if self.padding_mode != "zeros" or "_conv_forward" in vars(self):
            return super().forward(input)
        sigma, at, backend = self.noise(input)
        input, weight, bias = functional.autocast(input, weight, bias)
        if (
            type(padding) is type(stride) is tuple
            and dimensions == weight.dim()
            and input.shape[1] == self.in_channels
            and input.dtype == weight.dtype
            and _fits(input, 1, sigma, backend)
            and _has_data(weight, bias)
        ):
            try:
                return autograd.noisy_conv(input, weight, bias, sigma, at, stride, padding, self.dilation, self.groups)
            except (RuntimeError, TypeError):  # the long way says what is wrong with the arguments, if they are the cause
                pass
        return functional.noisy_conv(
            input, weight, bias, sigma, **at._asdict(), stride=stride, padding=padding, dilation=self.dilation, groups=self.groups,
            backend=backend,
        )  # fmt: skip


class NoisyConv1d(NoisyConv, nn.Conv1d):
    """`nn.Conv1d` of ``x + sigma * eps``. The noise is on in ``train()`` and in ``eval()``.

    Args:
        *args, **kwargs: those of `nn.Conv1d`.
        sigma: standard deviation of the noise, >= 0, in the units of the input: a number, or a float tensor, 0-dim or [in_channels].

    Raises:
        TypeError: sigma is neither a number nor a float tensor.
        ValueError: sigma is negative, not finite, or of another shape.

    Examples:
        >>> y = NoisyConv1d(3, 8, 3, sigma=0.2)(torch.rand(4, 3, 8))  # [4, 8, 6]
    """


class NoisyConv2d(NoisyConv, nn.Conv2d):
    """`nn.Conv2d` of ``x + sigma * eps``. The noise is on in ``train()`` and in ``eval()``.

    Args:
        *args, **kwargs: those of `nn.Conv2d`.
        sigma: standard deviation of the noise, >= 0, in the units of the input: a number, or a float tensor, 0-dim or [in_channels].

    Raises:
        TypeError: sigma is neither a number nor a float tensor.
        ValueError: sigma is negative, not finite, or of another shape.

    Examples:
        >>> y = NoisyConv2d(3, 8, 3, sigma=0.2)(torch.rand(4, 3, 8, 8))  # [4, 8, 6, 6]
    """


class NoisyConv3d(NoisyConv, nn.Conv3d):
    """`nn.Conv3d` of ``x + sigma * eps``. The noise is on in ``train()`` and in ``eval()``.

    Args:
        *args, **kwargs: those of `nn.Conv3d`.
        sigma: standard deviation of the noise, >= 0, in the units of the input: a number, or a float tensor, 0-dim or [in_channels].

    Raises:
        TypeError: sigma is neither a number nor a float tensor.
        ValueError: sigma is negative, not finite, or of another shape.

    Examples:
        >>> y = NoisyConv3d(3, 8, 3, sigma=0.2)(torch.rand(4, 3, 8, 8, 8))  # [4, 8, 6, 6, 6]
    """


class NoisyLinear(NoisyInput, nn.Linear):
    """`nn.Linear` of ``x + sigma * eps``, x [N, *, in_features]. The noise is on in ``train()`` and in ``eval()``.

    Args:
        *args, **kwargs: those of `nn.Linear`.
        sigma: standard deviation of the noise, >= 0, in the units of the input: a number, or a float tensor, 0-dim or [in_features].

    Raises:
        TypeError: sigma is neither a number nor a float tensor.
        ValueError: sigma is negative, not finite, or of another shape.

    Examples:
        >>> y = NoisyLinear(16, 4, sigma=0.1)(torch.rand(2, 16))  # [2, 4]
    """

    channel_dim = -1
    bias: Any  # a parameter or None

    def __init__(self, *args: Any, sigma: arguments.PerChannel = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_noise(sigma)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return one_node(self, input)
        weight, bias = self.weight, self.bias
        if not self.noise_enabled:
            return nn.functional.linear(input, weight, bias)
        arguments.check_batch(input)
        if input.dim() == 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        sigma, at, backend = self.noise(input)
        input, weight, bias = functional.autocast(input, weight, bias)
        same = input.shape[-1] == self.in_features and input.dtype == weight.dtype
        if input.dim() >= 2 and same and _fits(input, -1, sigma, backend) and _has_data(weight, bias):
            try:
                return autograd.noisy_linear(input, weight, bias, sigma, at)
            except RuntimeError:  # as in a convolution
                pass
        return functional.noisy_linear(input, weight, bias, sigma, **at._asdict(), backend=backend)


def _fits(x: Tensor, channel_dim: int, sigma: Tensor, backend: str) -> bool:
    """Whether a layer's call on ``x`` has nothing left to check, which `functional` would do at length.

    What cannot change was checked when the layer was made, and its rows by the context.
    """
    return (
        backend == "auto"
        and x.dtype in arguments.FLOATS
        and x.numel() <= 2**32  # so that the counter holds every position
        and (sigma.dim() == 0 or (sigma.dim() == 1 and sigma.shape[0] == x.shape[channel_dim]))
        and x.device == sigma.device
    )


def _has_data(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether neither is on the meta device: torch's convolution takes such a one beside an input with data, and gives what memory held."""
    return not weight.is_meta and (bias is None or not bias.is_meta)


def one_node(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A noisy layer, or an ensemble, as one node of a graph that torch.fx traces, as torch's own layers are: it draws noise when the graph
    runs, and branches on shapes that a tracer does not know."""
    tracer = args[0].tracer
    if tracer.root is layer:
        raise ValueError(NO_GRAPH)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, kwargs)


def noise_layers(model: nn.Module) -> dict[str, NoiseLayer]:
    """The noisy layers of a model by name, in module order; a shared layer once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    return {name: module for name, module in model.named_modules() if isinstance(module, NoiseLayer)}


def number_layers(model: nn.Module) -> dict[str, NoiseLayer]:
    """Sets every noisy layer's stream to its index in module order, which is the same for a copy of the model; returns the layers.

    Raises ValueError for more than 65,536 layers, which a stream has no room for.
    """
    layers = noise_layers(model)
    if len(layers) > 2**16:
        raise ValueError(f"model must have at most 65536 noisy layers, got {len(layers)}")
    for index, (name, layer) in enumerate(layers.items()):
        layer.stream, layer.layer_name = index, name
    return layers
