"""Whether the noise stands at a model's input, and its rows are independent: what a certificate needs of a model."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rse_fast import ops, outputs
from rse_fast.context import NoiseContext
from rse_fast.ensemble import Ensemble
from rse_fast.ensemble.hooks import twin
from rse_fast.ensemble.runner import agree, probe_images, unmoved
from rse_fast.nn import NoiseLayer, noise_layers
from rse_fast.trace import Generators, draws

_aten = torch.ops.aten
_REARRANGE = {  # what may stand between the image and its noise: the same numbers, in another shape or order of memory
    _aten.view, _aten._unsafe_view, _aten._reshape_alias, _aten.permute, _aten.transpose, _aten.t, _aten.unsqueeze, _aten.squeeze,
    _aten.clone, _aten.detach, _aten.alias, _aten._to_copy,
}  # fmt: skip
_NOISE = {ops.add_noise}
_EXITS = {"tolist", "numpy", "item", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"}


class _Readers(TorchDispatchMode):
    """Follows an image through a forward pass. ``noisy``: the streams of the noise that reads it; ``others``: other ops that do.
    ``random``: whether numbers of torch's generators were drawn. ``noisy_image``: the noisy image; one that is given replaces it."""

    def __init__(self, x: Tensor, noisy_image: Tensor | None) -> None:
        super().__init__()
        self.noisy_image = noisy_image
        self.image = [x]
        self.noisy: list[int] = []
        self.others: list[str] = []
        self.random = False

    def _is_image(self, value: object) -> bool:
        return any(value is t for t in self.image)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.random = self.random or draws(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs))
        if not any(map(self._is_image, tensors)):
            return result
        packet = func.overloadpacket
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        if packet in _NOISE and named.get("scale") is None and named.get("shift") is None and not named.get("relu"):
            self.noisy.append(named["stream"])
            if self.noisy_image is None:
                self.noisy_image = result.clone()
            result = self.noisy_image.clone()
        elif packet in _REARRANGE and result.dtype in (args[0].dtype, torch.float32, torch.float64):
            self.image.append(result)
        else:
            self.others.append(str(packet))
        return result


class _Leaves(TorchFunctionMode):
    """Tells `_Readers` of calls that take an image's numbers out of torch, which no dispatch mode sees."""

    def __init__(self, readers: _Readers):
        super().__init__()
        self.readers = readers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) in _EXITS and any(map(self.readers._is_image, args)):
            self.readers.others.append(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def input_noise(model: torch.nn.Module, x: torch.Tensor, logits: outputs.Choice = None) -> NoiseLayer:
    """The noisy layer at the input of ``model``, found by a run on the first of images x [B, ...] that watches every op which reads it.

    Then one on another image, for whose noisy image that of the first is put: what reads an image past torch shows there. logits: see
    `outputs.take`.

    Raises ValueError where a certificate would not hold: the image is changed before the noise or read beside it, or the noise is
    switched off, zero, per channel, or learnable. No image: the first noisy layer, unchecked but for its sigma.
    """
    layers = noise_layers(model)
    name, layer = next(iter(layers.items()))
    if len(x):
        name, layer = _first_noise(model, layers, x, logits)
    described = f"the noise at the input ({name or 'the model itself'})"
    if not layer.noise_enabled:
        raise ValueError(f"model must have its input noise on to be certified, got {described} switched off")
    raw = layer._parameters.get("sigma_raw")
    sigma = layer.current_sigma()
    if sigma.numel() != 1:
        raise ValueError(f"model must have one sigma at its input to be certified, got {described} with {sigma.numel()}, one a channel")
    if raw is not None and raw.requires_grad:
        raise ValueError(
            f"model must have a fixed sigma at its input to be certified, got {described} with a learnable one, which nothing bounds; "
            "sigma_raw.requires_grad_(False) fixes it"
        )
    if not float(sigma) > 0:
        raise ValueError(f"model must have noise at its input to be certified, got {described} with sigma 0")
    return layer


@torch.inference_mode()
def check_rows(ensemble: Ensemble, x: Tensor) -> None:
    """Votes are independent, and those of a function of the noisy image, only if a row of logits depends on no other row and on no random
    number but the seed's. Raises ValueError where two images show that it does; no image: unchecked."""
    if not len(x):
        return
    first = x[:1]
    both = torch.cat([first, torch.where(first < 0.5, first + 0.5, first - 0.5)])  # another one at every pixel, whatever the first is
    sample_ids, seed = torch.zeros((2, 2), dtype=torch.int64, device=x.device), torch.zeros((), dtype=torch.int64, device=x.device)

    rule = "model must treat each row of a batch by itself to be certified; it"
    random = f"{rule} draws random numbers of its own, which the rows of a batch may share"
    runner = ensemble.prepared(x).runner
    if runner.random:
        raise ValueError(random)

    def logits(images: Tensor) -> Tensor:
        return ensemble.logits_at(images, sample_ids[: len(images)], 1, seed)[0, :1].float()

    expected, again = logits(both), logits(both)
    compute = torch.bfloat16 if ensemble.dtype == "int8" else runner.compute
    if not agree(expected, again, compute):
        raise ValueError(random)
    if not unmoved(expected, logits(first.repeat(2, *[1] * (x.dim() - 1))), lambda: again) or not agree(expected, logits(first), compute):
        raise ValueError(f"{rule} gives an image other logits beside another image, as BatchNorm without running statistics does")


def _first_noise(model: torch.nn.Module, layers: dict[str, NoiseLayer], x: Tensor, logits: outputs.Choice) -> tuple[str, NoiseLayer]:
    image = x[:1].to(next(model.parameters(), x).dtype)
    copied = twin(model)  # modes and switches of the model stay; its hooks are called, since what they do is a part of it
    for layer in noise_layers(copied).values():
        layer.noise_enabled = True
    out, readers = _watched(copied, image)
    rule = "model must pass the image unchanged to the noise of one layer, and to nothing else, to be certified"
    if readers.others:
        raise ValueError(f"{rule}; got {', '.join(dict.fromkeys(readers.others))} reading it")
    found = [(name, layer) for name, layer in layers.items() if layer.stream in {stream & 0xFFFF for stream in readers.noisy}]
    if len(readers.noisy) != 1 or len(found) != 1:
        names = ", ".join(name or "the model itself" for name, _ in found) or "none"
        raise ValueError(f"{rule}; got {len(readers.noisy)} noisy calls reading it ({names})")
    if not readers.random:  # whose rows are not independent, for which there is another check

        def of(image: Tensor) -> Tensor:
            return outputs.take(_watched(copied, image, readers.noisy_image)[0], logits)

        if not unmoved(outputs.take(out, logits), of(_another(image)), lambda: of(image)):
            raise ValueError(f"{rule}; got other logits for another image whose noisy image is the same one, so something else reads it")
    return found[0]


def _another(image: Tensor) -> Tensor:
    """An image in [0, 1] that differs in its pixels and much in their mean."""
    moved = (image + probe_images(image, 1)).remainder(1) / 2
    return (moved if image.mean() > 0.5 else moved + 0.5).to(image.dtype)


def _watched(model: torch.nn.Module, image: Tensor, noisy_image: Tensor | None = None) -> tuple[object, _Readers]:
    """What ``model`` returns for ``image`` [1, ...], and what reads it; with ``noisy_image`` in place of its noisy one."""
    generators = Generators(model, image)
    with torch.inference_mode(False), torch.no_grad():
        image = image.clone()
        readers = _Readers(image, noisy_image)
        try:
            with NoiseContext(torch.zeros((), dtype=torch.int64, device=image.device), 1), readers, _Leaves(readers):
                out = model(image)
        finally:
            if readers.random:
                generators.restore()
    return out, readers
