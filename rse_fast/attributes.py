"""What attributes of modules hold that torch knows nothing of: modules that are not registered, tensors, and objects with more of them."""

import argparse
import dataclasses
import functools
import types
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

OF_TORCH = frozenset(vars(nn.Module()))  # what torch keeps in every module: its registries, hooks and mode


@dataclass(frozen=True)
class Reached:
    """What a model holds. modules: each with its name, those first that torch knows of. objects: whose attributes were looked at.
    tensors: those that are in no registry of a module."""

    modules: dict[nn.Module, str]
    objects: list[Any]
    tensors: list[torch.Tensor]


def reached(model: nn.Module) -> Reached:
    """Follows attributes through lists, tuples, dicts, dataclasses, namespaces, and objects of the packages that the model's own classes
    are of, in linear time."""
    packages = {package(type(module)) for module in model.modules()} - {"torch", "rse_fast"}
    followed = functools.cache(functools.partial(_is_followed, packages=packages))  # asked for each entry of what may be a long list
    modules: dict[nn.Module, str] = {}
    objects, tensors, seen = [], [], {}  # those seen are kept: their ids stand for them
    waiting: deque[tuple[Any, Any]] = deque([(model, "")])  # with a path: (path of what holds it, own name), joined where a name is needed
    while waiting:
        value, path = waiting.popleft()
        if isinstance(value, nn.Module):
            # One that was reached before was so with all below it.
            new = [] if value in modules else [(n, m) for n, m in value.named_modules(prefix=_name(path)) if m not in modules]
            modules |= {module: name for name, module in new}
            held = [(v, (own, key)) for own, m in new for key, v in vars(m).items() if key not in OF_TORCH and followed(type(v))]
        elif id(value) in seen:
            continue
        elif isinstance(value, torch.Tensor):
            held = []
            tensors.append(value)
        else:
            if isinstance(value, (list, tuple, dict)):
                inner: Iterable = value.items() if isinstance(value, dict) else enumerate(value)
            else:
                objects.append(value)
                inner = of(value).items()
            held = [(v, (path, key)) for key, v in inner if followed(type(v))]
        seen[id(value)] = value
        waiting += held
    return Reached(modules, objects, tensors)


def unregistered(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that attributes of the model's modules hold and torch knows nothing of, each with a name: they are in no state dict, and get
    no noise."""
    registered = set(model.modules())
    return {module: name for module, name in reached(model).modules.items() if module not in registered}


def tensors(model: nn.Module) -> list[torch.Tensor]:
    """Every tensor that a model holds: parameters and buffers, also those of modules that are not registered, and those in attributes."""
    found = reached(model)
    registered = [t for m in found.modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    return registered + found.tensors


def detached(model: nn.Module) -> dict[int, torch.Tensor]:
    """Copies, by the ids of what they are copies of, of the tensors that have a history, such as the weight that old-style weight_norm
    computes: `copy.deepcopy` refuses these, and takes the copies as its memo."""
    return {id(t): t.detach().clone() for t in tensors(model) if not t.is_leaf}


def of(thing: Any) -> dict[str, Any]:
    """The attributes of an object by name; those of a dataclass may have slots. One that raises when it is read counts as None."""
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    kept = _read(thing, "__dict__")
    return {**(kept if isinstance(kept, dict) else {}), **{f.name: _read(thing, f.name) for f in fields}}


def package(cls: type) -> str:
    """The outermost package that a class is of."""
    return str(cls.__module__).partition(".")[0]  # that of a class made by hand may be anything


def _read(thing: Any, name: str) -> Any:
    try:
        return getattr(thing, name, None)
    except Exception:  # a property of the user's
        return None


def _is_followed(cls: type, packages: set[str]) -> bool:
    """Whether objects of a class are modules or tensors, or are looked into: containers, plain data, and what is of the ``packages``."""
    if issubclass(cls, (nn.Module, torch.Tensor, list, tuple, dict)):
        return True
    if issubclass(cls, (type, types.FunctionType, types.MethodType)):
        return False
    return dataclasses.is_dataclass(cls) or issubclass(cls, (types.SimpleNamespace, argparse.Namespace)) or package(cls) in packages


def _name(path: Any) -> str:
    """Of a path, the names with dots between them."""
    names = []
    while path:
        path, own = path if isinstance(path, tuple) else ("", path)
        names.append(str(own))
    return ".".join(filter(None, reversed(names)))
