"""Makes an existing model noisy in place, and back. Parameters, hooks and state-dict keys stay: only classes change."""

import contextlib
import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.utils import parametrize

from rse_fast import arguments, noise
from rse_fast.attributes import tensors, unregistered
from rse_fast.calls import Calls, calls
from rse_fast.nn import NoiseLayer, NoisyConv, NoisyConv1d, NoisyConv2d, NoisyConv3d, NoisyInput, NoisyLinear, noise_layers, number_layers
from rse_fast.trace import Tracer

__all__ = ["Description", "LayerDescription", "convert", "describe", "noise_off", "revert", "set_sigma"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NOISE_NAMES = {"channel_dim", "plain", "sigma", "sigma_raw", *(name for name in vars(NoiseLayer) if not hasattr(nn.Module, name))}
_NOISY: dict[type, type] = {nn.Conv1d: NoisyConv1d, nn.Conv2d: NoisyConv2d, nn.Conv3d: NoisyConv3d, nn.Linear: NoisyLinear}

Selection: TypeAlias = str | type | Iterable[str | type]  # name globs and layer types, one or several
Selector: TypeAlias = Callable[[str, nn.Module], bool]


# -------------------------------------------------------------------------------------------------------------- convert, revert
def convert(
    model: nn.Module,
    init_sigma: float = 0.2,
    inner_sigma: float = 0.1,
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
    learnable: bool | str = False,
) -> nn.Module:
    """Adds Gaussian noise to the input of every convolution of a model, in place.

    Only classes change: an exact ``nn.ConvNd`` becomes a `NoisyConvNd`, whose backward saves no more than the plain layer's; a subclass
    keeps its own forward behind the noise. State-dict keys stay. The noise is on in ``train()`` and in ``eval()``; only `noise_off`
    switches it off.

    Args:
        model: `nn.Module` with initialised parameters.
        init_sigma: standard deviation >= 0 of the noise of the layer that is executed first, in the units of its input: pixels. The paper's
            values are for pixels in [0, 1] without mean/std normalisation.
        inner_sigma: standard deviation >= 0 for all other layers.
        include: which layers get noise: types and name globs ("layer1.*"), one or several. Default: all of `nn.Conv1d/2d/3d`,
            `nn.ConvTranspose1d/2d/3d` and their subclasses. `nn.Linear` can be asked for. A shared layer is converted once.
        exclude: types and name globs of layers that stay plain.
        learnable: True or "layer" makes the sigma of each layer a parameter, "channel" that of each input channel. Sigmas must then be
            positive. Convert before you create the optimiser.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: an argument has a wrong type. Nothing was changed.
        ValueError: nothing matches, the model has noise already, or a sigma is out of range. Nothing was changed.

    Warns:
        RuntimeWarning: something that looks like a convolution gets no noise; ``exclude`` says that it is meant to be plain.

    Examples:
        >>> model = rse_fast.convert(model, init_sigma=0.2, inner_sigma=0.1)

    Reference: Liu, Cheng, Zhang, Hsieh, ECCV 2018.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if learnable not in (True, False, "layer", "channel"):
        raise ValueError(f"learnable must be True, False, 'layer' or 'channel', got {learnable!r}")
    _check_sigmas(init_sigma, inner_sigma, learnable)
    if noisy := list(noise_layers(model)):
        raise ValueError(f"model must not have noise yet, got noisy layers {listing(noisy)}; revert(model) first to convert it anew")
    included, excluded = _selector("include", include), _selector("exclude", exclude)
    layers: dict[str, Any] = {  # Any: they change their class
        names[0]: module
        for module, names in _names(model).items()
        if isinstance(module, (*CONVOLUTIONS, nn.Linear))
        and (isinstance(module, CONVOLUTIONS) if include is None else any(included(name, module) for name in names))
        and not any(excluded(name, module) for name in names)
    }
    if not layers:
        wanted = "a convolution" if include is None else f"a convolution or linear layer that include={include!r} matches"
        raise ValueError(f"model must contain {wanted}{'' if exclude is None else f' outside exclude={exclude!r}'}, got none")
    if lazy := [name for name, module in layers.items() if isinstance(module, nn.modules.lazy.LazyModuleMixin)]:
        raise ValueError(f"model must have its lazy layers initialised by a first forward pass, got uninitialised {listing(lazy)}")

    if meta := [name for name, module in layers.items() if any(p.is_meta for p in module.parameters())]:
        raise ValueError(f"model must have its values before it gets noise, as sigma is one of them, got meta tensors in {listing(meta)}")

    for name, module in layers.items():
        if taken := sorted(attribute for attribute in _NOISE_NAMES if hasattr(module, attribute)):
            used = f"{', '.join(taken)} in {listing([name])}"
            raise ValueError(f"model must leave the names of a noisy layer's attributes free, got {used}; exclude that layer")

    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.out_proj in layers.values():
            raise ValueError(
                "model must call the layers that get noise, but nn.MultiheadAttention reads the weight of its out_proj without calling it, "
                f"got {listing([f'{name}.out_proj'.lstrip('.')])}; exclude='*out_proj' leaves it plain"
            )

    if patched := [name for name, module in layers.items() if "forward" in vars(module)]:
        raise ValueError(f"model must have the forward of its classes, where noise is added, got one of its own in {listing(patched)}")

    first = first_executed(model, list(layers.values()))
    classes = [noisy_class(module) for module in layers.values()]
    for module, cls in zip(layers.values(), classes, strict=True):
        module.__class__ = cls
        sigma: arguments.PerChannel = init_sigma if module is first else inner_sigma
        if learnable == "channel":
            channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
            sigma = torch.full((channels,), float(sigma), dtype=torch.float32)
        module.init_noise(sigma, bool(learnable))
    for encoder in model.modules():
        inside = [layer for layer in encoder.modules() if layer in layers.values()]
        if isinstance(encoder, nn.TransformerEncoderLayer):
            for layer in inside:
                layer.register_forward_pre_hook(_disable_fast_path)
        elif isinstance(encoder, nn.TransformerEncoder) and inside:  # nested tensors know the fast path only
            vars(encoder)["use_nested_tensor_without_noise"] = encoder.use_nested_tensor
            encoder.use_nested_tensor = False
    number_layers(model)
    vars(model)["_converted_layers"] = tuple(layers)
    if plain := _left_out(model, layers, first, excluded, include is None):
        names = tuple(plain)
        described = ", ".join(f"{name!r} ({why})" for name, why in plain.items())
        warnings.warn(
            f"rse-fast: convert gives no noise to {described}; if that is meant, say so by exclude={names!r}", RuntimeWarning, stacklevel=2
        )
    return model


def _left_out(model: nn.Module, layers: dict[str, nn.Module], first: nn.Module, excluded: Selector, every: bool) -> dict[str, str]:
    """What convolves without noise, by name, with how; not what is excluded. every: whether all convolutions were asked for."""
    found, names = {}, _names(model)
    for module, own in names.items() if every else ():
        inside = any(m in layers.values() or isinstance(m, CONVOLUTIONS) for m in module.modules())
        leaf = next(module.parameters(recurse=False), None) is not None or (hasattr(module, "kernel_size") and not module._modules)
        kind = getattr(module, "original_name", type(module).__name__)  # of a scripted module, what it was made of
        if "conv" in kind.lower() and leaf and not inside and not any(excluded(name, module) for name in own):
            found[own[0]] = kind
    loose = {name: module for module, name in unregistered(model).items()}
    modules = loose | {name: module for module, own in names.items() for name in own}
    seen = _calls(model, first)
    for parameter in sorted(seen.read) if seen else [f"{name}.weight" for name, m in loose.items() if isinstance(m, CONVOLUTIONS)]:
        owner = parameter.rpartition(".")[0]
        if owner in layers:
            found[owner] = "its weight is read without a call of the layer"
        elif every and owner not in found and not (excluded(owner, modules[owner]) or excluded(parameter, modules[owner])):
            if owner in loose:
                found[owner] = f"{type(modules[owner]).__name__} in a plain attribute, which nn.ModuleList would make part of the model"
            else:
                found[parameter] = "a weight that forward convolves with by itself"
    return found


def vanished(model: nn.Module) -> list[str]:
    """Names of layers that `convert` made noisy and that are not there any more, or not noisy: a reparameterisation replaces them."""
    gone = []
    for prefix, module in model.named_modules():
        converted = vars(module).get("_converted_layers", ())
        if len(converted) <= len(noise_layers(module)):  # one that has only moved within the model has another name
            continue
        for name in converted:
            try:
                layer = module.get_submodule(name)
            except AttributeError:
                layer = None
            if not isinstance(layer, NoiseLayer):
                gone.append(f"{prefix}.{name}".lstrip("."))
    return gone


def set_sigma(model: nn.Module, init_sigma: float = 0.2, inner_sigma: float = 0.1) -> nn.Module:
    """Changes the sigmas of a converted model in place, for example to test it with less noise than it was trained with.

    Args:
        model: a converted model.
        init_sigma: of the layer that is executed first, >= 0.
        inner_sigma: of all others, >= 0. A learnable sigma gets the value and stays learnable; it must be positive.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: a sigma is not a number. Nothing was changed.
        ValueError: a sigma is out of range, or the model has no noisy layers. Nothing was changed.

    Examples:
        >>> rse_fast.set_sigma(model, init_sigma=0.1, inner_sigma=0.05)
    """
    layers = [layer for layer in noise_layers(model).values() if isinstance(layer, NoisyInput)]
    if not layers:
        raise ValueError("model must have noisy convolutions or linear layers, got none; convert(model) first")
    _check_sigmas(init_sigma, inner_sigma, any("sigma_raw" in layer._parameters for layer in layers))
    first = first_executed(model, layers)
    for layer in layers:
        layer.set_sigma(float(init_sigma if layer is first else inner_sigma))
    return model


def _check_sigmas(init_sigma: float, inner_sigma: float, learnable: bool | str) -> None:
    for name, sigma in (("init_sigma", init_sigma), ("inner_sigma", inner_sigma)):
        arguments.check_sigma(name, sigma)
        if isinstance(sigma, torch.Tensor) and sigma.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {tuple(sigma.shape)}")
        if learnable and not sigma > 0:
            raise ValueError(f"{name} must be positive to be learnable, got {sigma}")


def revert(model: nn.Module) -> nn.Module:
    """Undoes `convert`, in place: layers get their plain classes back, and sigmas are removed. Stand-alone `GaussianNoise` layers stay.

    Args:
        model: a converted model.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: there is nothing to revert.

    Examples:
        >>> rse_fast.revert(model)
    """
    layers = [layer for layer in noise_layers(model).values() if isinstance(layer, NoisyInput)]
    if not layers:
        raise ValueError("model must have noisy convolutions or linear layers to revert, got none")
    for layer in layers:
        layer._buffers.pop("sigma", None)
        layer._non_persistent_buffers_set.discard("sigma")
        layer._parameters.pop("sigma_raw", None)
        for attribute in ("stream", "noise_enabled", "layer_name", "_remembered_sigma"):
            layer.__dict__.pop(attribute, None)
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _disable_fast_path]:
            del layer._forward_pre_hooks[key]
        layer.__class__ = plain_class(type(layer))
    for module in model.modules():
        vars(module).pop("_converted_layers", None)
        if "use_nested_tensor_without_noise" in vars(module):
            module.use_nested_tensor = vars(module).pop("use_nested_tensor_without_noise")
    return model


def _disable_fast_path(module: nn.Module, args: Any) -> None:
    """Hook of a noisy layer in an `nn.TransformerEncoderLayer`, which in eval mode would read the weights and not call their layers: it
    does call them when one has a hook."""


@contextlib.contextmanager
def noise_off(model: nn.Module) -> Iterator[nn.Module]:
    """``with noise_off(model):`` runs the model without noise; each layer's switch is restored afterwards.

    Args:
        model: a model with noisy layers.

    Yields:
        ``model`` itself.

    Raises:
        ValueError: the model has none.

    Examples:
        >>> with rse_fast.noise_off(model):
        ...     clean = model(images)
    """
    layers = list(noise_layers(model).values())
    if not layers:
        raise ValueError("model must have noisy layers, got none; convert(model) first")
    before = [vars(layer).get("noise_enabled") for layer in layers]  # None: the class's own
    try:
        for layer in layers:
            layer.noise_enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            if enabled is None:
                vars(layer).pop("noise_enabled", None)
            else:
                layer.noise_enabled = enabled


# ------------------------------------------------------------------------------------------------------------------- describe
@dataclass(frozen=True)
class LayerDescription:
    """One noisy layer of a `Description`.

    Attributes:
        name: path of the module in the model.
        type: name of its class.
        sigma: standard deviation of its noise: a float, or a list with one value a channel.
        stream: its index, which addresses its noise.
        backend: "triton", "cpu" or "torch": what makes the noise on the device of its parameters.
        noise: where the noise is made: "in_kernel" of the convolution (for channels-last images on a GPU) or "separate".
        calls: "" where a forward pass calls the layer, or where nothing is known; "never called", "reads the weight without calling it", or
            "a forward of its own", which stands in place of the noisy one.
    """

    name: str
    type: str
    sigma: float | list[float]
    stream: int
    backend: str
    noise: str = "separate"
    calls: str = ""


@dataclass(frozen=True)
class Description:
    """What `describe` returns. Printed, it is a table.

    Attributes:
        layers: a `LayerDescription` for each noisy layer, in module order.
    """

    layers: tuple[LayerDescription, ...]

    def __str__(self) -> str:
        def text(sigma: float | list[float]) -> str:
            return f"{sigma:.4g}" if isinstance(sigma, float) else f"{min(sigma):.4g} .. {max(sigma):.4g} ({len(sigma)} channels)"

        rows: list[tuple[str, ...]] = [("stream", "name", "type", "sigma", "backend")]
        backend = lambda d: f"triton, {d.noise}" if d.backend == "triton" else d.backend  # noqa: E731 - others have no choice
        rows += [(str(d.stream), d.name or "(model)", d.type, text(d.sigma), backend(d)) for d in self.layers]
        if any(d.calls for d in self.layers):
            rows = [(*row, cell) for row, cell in zip(rows, ["calls", *(d.calls for d in self.layers)], strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def describe(model: nn.Module) -> Description:
    """The noisy layers of a model: name, type, sigma, stream, and the backend that runs them on the device of their parameters.

    Args:
        model: any `nn.Module`.

    Returns:
        A `Description` with ``layers`` in module order, which also says what is not called. Printed, it is a table.

    Examples:
        >>> print(rse_fast.describe(model))
    """
    layers: list[LayerDescription] = []
    noisy = noise_layers(model)
    called = _without_calls(model, {name: layer for name, layer in noisy.items() if isinstance(layer, NoisyInput)})
    for name, layer in noisy.items():
        like = next((p for n, p in layer.named_parameters(recurse=False) if n != "sigma_raw"), layer.current_sigma())
        sigma = layer.known_sigma().tolist()
        # A layer of another kind adds noise, then runs a forward of its own.
        place = noise.choice(layer.weight, layer.groups) if isinstance(layer, NoisyConv) else "separate"
        backend = noise.active_backend(like)
        layers.append(LayerDescription(name, type(layer).__name__, sigma, layer.stream, backend, place, called.get(name, "")))
    return Description(tuple(layers))


def _without_calls(model: nn.Module, layers: dict[str, NoiseLayer]) -> dict[str, str]:
    """Of noisy layers those that a forward pass does not call, with how; those it is known of."""
    seen = _calls(model, first_executed(model, list(layers.values()))) if layers else None
    read = {parameter.rpartition(".")[0] for parameter in seen.read} if seen else ()
    missing = [name for name, layer in layers.items() if (name not in seen.called if seen else "forward" in vars(layer))]

    def how(name: str) -> str:
        own = "forward" in vars(layers[name])
        return "a forward of its own" if own else "reads the weight without calling it" if name in read else "never called"

    return {name: how(name) for name in missing}


def _calls(model: nn.Module, first: nn.Module) -> Calls | None:
    """What a forward pass calls, by a run of a copy on the meta device whose input fits the layer ``first``."""
    try:
        copied = meta_copy(model).eval()
        names = {module: name for name, module in model.named_modules()}
        first = copied.get_submodule(names[first])
    except Exception:  # a module that cannot be copied
        return None
    for layer in noise_layers(copied).values():
        layer.noise_enabled = False
    with torch.random.fork_rng(devices=[]):
        return calls(copied, first)


# ------------------------------------------------------------------------------------------------------------------- selection
def _selector(argument: str, patterns: Selection | None) -> Selector:
    """A function (name, module) -> bool for types and name globs, one or several."""
    if patterns is None:
        patterns = ()
    elif isinstance(patterns, (str, type)):
        patterns = (patterns,)
    elif not isinstance(patterns, Iterable):
        raise TypeError(f"{argument} must hold types and name globs, got {type(patterns).__name__}")
    patterns = tuple(patterns)
    for p in patterns:
        if not (isinstance(p, str) or (isinstance(p, type) and issubclass(p, nn.Module))):
            raise TypeError(f"{argument} must hold nn.Module types and name globs, got {p!r}")
        if argument == "include" and isinstance(p, type) and not issubclass(p, (*CONVOLUTIONS, nn.Linear)):
            raise ValueError(f"include must name kinds of nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d or nn.Linear, got {p.__name__}")
    types = tuple(p for p in patterns if isinstance(p, type))
    globs = [p for p in patterns if isinstance(p, str)]
    return lambda name, module: isinstance(module, types) or any(fnmatchcase(name, g) for g in globs)


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name of every module, in module order: a shared module has several."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def listing(names: Sequence[str], most: int = 3) -> str:
    names = [repr(name) if name else "the model itself" for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ----------------------------------------------------------------------------------------------------------- execution order
class _Found(Exception):
    pass


def first_executed(model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
    """The layer of ``layers`` that ``model`` calls first: from a symbolic trace, else from a run on the meta device, else the first.

    Both act on a copy without data and without hooks, and the generator's state is put back: a forward may store what it sees.
    """
    if model in layers:
        return model
    try:
        copied = meta_copy(model)
    except Exception:  # a module that cannot be copied
        return layers[0]
    names = {module: name for name, module in model.named_modules()}
    originals = {copied.get_submodule(names[layer]): layer for layer in layers}
    with torch.random.fork_rng(devices=[]):
        first = _first_traced(copied, originals) or _first_on_meta(copied, originals)
    return layers[0] if first is None else originals[first]


def _first_traced(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> nn.Module | None:
    class OfLayers(Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return module in layers or (super().is_leaf_module(module, name) and not any(m in layers for m in module.modules()))

    try:
        graph = OfLayers().trace(model)
        called = [model.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"]
    except Exception:  # whatever a user's forward raises when it meets a proxy: the model is then not traceable
        return None
    return next((module for module in called if module in layers), None)


def _first_on_meta(model: nn.Module, layers: dict[Any, nn.Module]) -> nn.Module | None:
    """Runs the model on a guessed input until a layer's hook fires: what that layer's input looks like does not matter then."""

    def stop(module: nn.Module, args: Any) -> None:
        raise _Found(module)

    for layer in layers:
        layer.register_forward_pre_hook(stop)
    for layer in layers:  # the channels that the model wants are those of one of its layers
        shape = (2, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, *[64] * len(layer.kernel_size))
        try:
            with torch.no_grad():
                model(torch.empty(shape, device="meta"))
        except _Found as found:
            return found.args[0]
        except Exception:  # the guess did not fit, or the forward needs data
            continue
    return None


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` without forward hooks, its tensors on the meta device. Neither data nor what a hook belongs to is copied."""
    memo: dict[int, Any] = {id(hooks): OrderedDict() for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)}
    for tensor in tensors(model):
        try:
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        except RuntimeError:  # of a type that the meta device does not have, such as a quantised one: copied as it is
            continue
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


# --------------------------------------------------------------------------------------------------------------------- classes
_mixed: dict[type, type] = {}  # a subclass of nn.ConvNd or nn.Linear -> the same with noise in front of its forward


def noisy_class(module: nn.Module) -> type:
    """The noisy counterpart of a layer's class."""
    cls = type(module)
    if parametrize.is_parametrized(module):  # torch made this class for the one module, on top of the class it had
        return _rebase(cls, _noisy_class(cls.__bases__[0]))
    return _mixed_class(cls) if "_conv_forward" in vars(module) else _noisy_class(cls)  # patched, for tiled pictures: it shall be called


def _noisy_class(cls: type) -> type:
    return _NOISY[cls] if cls in _NOISY else _mixed_class(cls)


def _mixed_class(cls: type) -> type:
    if cls not in _mixed:
        members = {"__reduce_ex__": _reduce, "__doc__": f"`{cls.__name__}` of its input plus Gaussian noise.", "plain": cls}
        if issubclass(cls, nn.Linear):
            members["channel_dim"] = -1
        _mixed[cls] = type(f"Noisy{cls.__name__}", (NoisyInput, cls), members)
    return _mixed[cls]


def plain_class(cls: type) -> type:
    """The class that `noisy_class` was given."""
    for plain, noisy in _NOISY.items():
        if cls is noisy:
            return plain
    if "plain" in cls.__dict__:
        return cls.__dict__["plain"]
    return _rebase(cls, plain_class(cls.__bases__[0]))  # parametrised, or a user's subclass of a noisy layer


def _rebase(cls: type, base: type) -> type:
    members = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (base, *cls.__bases__[1:]), members)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickles and copies a layer whose class is made at run time by naming the plain class."""
    return _new, (type(self).plain,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__


def _new(plain: type) -> nn.Module:
    cls: Any = _noisy_class(plain)
    return cls.__new__(cls)
