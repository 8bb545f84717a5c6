"""Finds the logits in what a model returns. Training, ensembles and attacks all use it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = ("logits", "out")  # of Hugging Face and most others; of torchvision's segmentation
Choice = str | int | Callable[[object], Tensor] | None


class Unclear(TypeError):
    """A model's output in which the logits are not to be found."""


def check(model: nn.Module, logits: Choice) -> None:
    """Raises TypeError where ``logits`` is no choice, ValueError where the configuration of ``model`` says that it returns no logits of
    classes that exclude each other. A function of the user's is taken to know better."""
    if isinstance(logits, bool) or not (logits is None or isinstance(logits, (str, int)) or callable(logits)):
        raise TypeError(f"logits must be None, a name, an index or a function of the model's output, got {logits!r}")
    for module in () if callable(logits) else model.modules():
        task = getattr(getattr(module, "config", None), "problem_type", None)
        if task in ("regression", "multi_label_classification"):
            raise ValueError(
                f"model must return logits of classes that exclude each other, got one whose config says problem_type={task!r}: {_MISSING}"
            )


_MISSING = (
    "an ensemble averages a softmax and counts votes; rse-fast has no mean over draws of numbers (regression) or of sigmoids (several "
    "labels an image)"
)


def take(found: object, logits: Choice = None) -> Tensor:
    """The logits in what a model returned.

    Args:
        found: a tensor, mapping, dataclass, named tuple, tuple or list.
        logits: a name (of an entry or attribute), an index, or a function of ``found``. None finds them: the tensor itself; of entries
            with names "logits", "out" or the only one; of those without names the first.

    Raises:
        Unclear: a TypeError that says what was got and how to name the logits.
    """
    try:
        result = _find(found) if logits is None else logits(found) if callable(logits) else _pick(found, logits)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        if callable(logits):
            raise
        raise Unclear(f"logits={logits!r} is not in what the model returns, {_described(found)}") from error
    if isinstance(result, Tensor) and result.is_floating_point():
        return result
    got = _described(found) if logits is None else f"{_described(result)} by logits={logits!r}"
    if logits is None and result is not None and result is not found:
        got += f", and there {_described(result)}"
    raise Unclear(
        f"model must return logits, or something with obvious ones ('logits' or 'out' in it, or first in a tuple), got {got}; "
        "Ensemble(model, logits=...) takes their name, their index, or a function of what the model returns"
    )


def _find(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found
    entries = _entries(found)
    if entries is None:
        return found[0] if isinstance(found, (tuple, list)) and found else None
    values = [entries[name] for name in _NAMES if name in entries] or (list(entries.values()) if len(entries) == 1 else [])
    return values[0] if values else None


def _entries(found: Any) -> Mapping[Any, Any] | None:
    """What has names in a mapping, named tuple, dataclass or other object."""
    if isinstance(found, Mapping):
        return found
    names = getattr(found, "_fields", None) or [*getattr(found, "__dict__", ()), *(name for name in _NAMES if hasattr(found, name))]
    return {name: getattr(found, name) for name in names} or None


def _pick(found: Any, logits: str | int) -> Any:
    if isinstance(logits, str) and not isinstance(found, Mapping):
        return getattr(found, logits)
    return found[logits]


def _described(found: object) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of {found.dtype}"
    names = _entries(found)
    if names is None:
        return f"{type(found).__name__} of {len(found)}" if isinstance(found, (tuple, list)) else type(found).__name__
    return f"{type(found).__name__} with {', '.join(map(repr, list(names)[:10])) or 'nothing'}"


def check_rows(logits: Tensor, rows: tuple[int, ...]) -> None:
    """Raises ValueError unless ``logits`` are [N, K], or [N, K, H, W] or [N, K, D, H, W] of pixels, with N among ``rows`` and K > 1."""
    wanted = f"logits [N, K], or [N, K, H, W] of pixels, for N = {rows[-1]} rows"
    if logits.dim() == 1 or logits.dim() > 1 and logits.shape[1] == 1:
        what = "a number" if logits.dim() == 1 else "one logit"
        line = (
            "lambda z: torch.stack([torch.zeros_like(z), z], 1)"
            if logits.dim() == 1
            else "lambda z: torch.cat([torch.zeros_like(z), z], 1)"
        )
        raise ValueError(
            f"model must return logits of two classes or more, got {what} for each row, whose softmax is 1 whatever it is. If it is the "
            f"logit of one class against another: Ensemble(model, logits={line}). If it is a regression: {_MISSING}"
        )
    if not is_logits(logits) or logits.shape[0] not in rows or not logits.shape[1]:
        advice = "if it returns them elsewhere, Ensemble(model, logits=...) says where"
        raise ValueError(f"model must return {wanted}, got shape {tuple(logits.shape)}; {advice}")


def is_logits(found: object) -> bool:
    """Whether it has the form of logits: of images, or of pixels in two or three dimensions."""
    return isinstance(found, Tensor) and found.dim() in (2, 4, 5) and found.is_floating_point()


class SigmoidDetector(TorchDispatchMode):
    """Remembers the last sigmoid within ``with``: outputs that are sigmoids belong to labels that do not exclude each other."""

    _last: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.sigmoid, torch.ops.aten.sigmoid_):
            self._last = result
        return result

    def check(self, found: object) -> None:
        """Raises ValueError if ``found`` is what it gave, or a view of it."""
        if isinstance(found, Tensor) and self._last is not None and _place(found) == _place(self._last):
            raise ValueError(f"model must return logits of classes that exclude each other, got the results of a sigmoid: {_MISSING}")


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
