"""Notices that a model is no longer what a snapshot of it was taken of, at the price of a look per module and tensor at every call.

On a ResNet-50 (149 modules, 320 tensors that count) a call takes 0.1 ms on an AMD EPYC. A third of it is the tensors' versions and
addresses, which nothing in Python tells of all at once; what the registries hold is compared dict by dict, in one call.
"""

import argparse
import collections
import dataclasses
import types
import weakref
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_COUNTER = "num_batches_tracked"  # of BatchNorm, which no module in eval mode reads
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What torch keeps in a module is looked at by name. The rest changes no result of a snapshot: its modules are in eval mode, and have
# the streams of their own time.
_FREE = {*vars(nn.Module()), "stream", "layer_name", "_reversed_padding_repeated_twice"}
_DICTS = (*_REGISTRIES, *HOOKS)
_dicts = itemgetter(*_DICTS)
# Hooks of every module in the process.
GLOBAL_HOOKS = [
    getattr(torch_module, f"_global_{name}")
    for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    if hasattr(torch_module, f"_global_{name}")
]


_watches: "weakref.WeakSet[Watch]" = weakref.WeakSet()


def _after_step(optimizer, args, kwargs) -> None:
    """A fused optimiser (torch 2.13) writes parameters and leaves their versions as they were."""
    written = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for watch in list(_watches) if written else ():
        watch.stepped(written)


register_optimizer_step_post_hook(_after_step)


class Watch:
    """What a call of ``model`` depends on, as it was when the watch was made: tensors, modules, hooks, classes and plain attributes.

    Attributes are compared by what they hold: lists, tuples, dicts, sets, arrays, dataclasses, namespaces, modules that are not registered,
    and objects of the packages that the model's own classes are of. What other objects hold inside goes unnoticed, and so does what a
    function refers to.
    """

    def __init__(self, model: nn.Module):
        self._modules, objects = _reached(model)
        self._types = list(map(type, self._modules))
        self._classes = [(cls, dict(vars(cls))) for cls in {c for t in set(self._types) for c in t.__mro__} if _is_users(cls)]
        self._forwards = [(cls, cls.forward) for cls in set(self._types) if not issubclass(cls, torch.jit.ScriptModule)]
        self._fields = fields = list(map(vars, self._modules))
        self._sizes = list(map(len, fields))
        registries = [field[name] for field in fields for name in _REGISTRIES]
        self._empty, self._filled = [r for r in registries if not r], [r for r in registries if r]
        self._kept = list(map(dict, self._filled))
        # Dicts are compared by identity first, and by value where that differs, which for large tensors raises. So there are three looks:
        # at all dicts; at the tensors of one number or none in them, whose values may be equal; at modules in their order.
        small = [(r, k) for r in self._filled for k, v in r.items() if isinstance(v, torch.Tensor) and v.numel() < 2 and k != _COUNTER]
        self._small_in, self._small_names = [r for r, _ in small], [name for _, name in small]
        self._small = [registry[name] for registry, name in small]
        self._children = [field["_modules"] for field in fields if field["_modules"]]
        self._order = self._in_order()
        # One look-up for the dicts that torch keeps in a module, of which there shall be no other, and for all of its attributes.
        names = [[name for name in field if name not in _FREE] for field in fields]
        of_modules = [(itemgetter(*_DICTS, *own), field) for own, field in zip(names, fields, strict=True)]
        self._looks = of_modules + [(_attributes, thing) for thing in objects]
        attributes = [_frozen([field[name] for name in own]) for own, field in zip(names, fields, strict=True)]
        inside = [_frozen(_attributes(thing)) for thing in objects]
        self._values = [(*_dicts(field), *own) for own, field in zip(attributes, fields, strict=True)] + inside
        tensors = [v for kept in self._kept for name, v in kept.items() if name != _COUNTER]
        tensors = [*tensors, *chain.from_iterable(map(_tensors, attributes + inside))]
        self._tensors = list({id(t): t for t in tensors if isinstance(t, torch.Tensor)}.values())
        self._versioned = list(filter(_has_version, self._tensors))
        # Memory that a tensor has left stays taken: what came to lie at its old address would look like it.
        self._memory = [t.untyped_storage() for t in self._tensors]
        self._versions, self._places = self._states()
        hooks = [field[name] for field in fields for name in HOOKS] + GLOBAL_HOOKS
        self._unhooked, self._hooked = [h for h in hooks if not h], [(h, list(h.items())) for h in hooks if h]
        self._stepped, self._ids = False, set(map(id, self._tensors))
        _watches.add(self)

    def stepped(self, parameters: set[int]) -> None:
        """Notes that parameters of these ids were written without a new version."""
        self._stepped = self._stepped or not self._ids.isdisjoint(parameters)

    def require(self) -> None:
        """Raises RuntimeError if any of it is another now, where backward needs the model of the forward pass."""
        if self.changed():
            raise RuntimeError(
                "the model must be the same in backward as it was in the ensemble's forward pass, but a parameter, buffer, switch, hook or "
                "attribute has changed in between; run backward first, then change the model"
            )

    def changed(self) -> bool:
        """Whether any of it is another now."""
        try:
            return self._stepped or not (
                not any(self._empty)
                and self._filled == self._kept
                and all(map(is_, map(dict.__getitem__, self._small_in, self._small_names), self._small))
                and self._in_order() == self._order
                and list(map(type, self._modules)) == self._types
                and all(cls.forward is forward for cls, forward in self._forwards)
                and all(vars(cls) == kept for cls, kept in self._classes)
                and list(map(len, self._fields)) == self._sizes
                and self._states() == (self._versions, self._places)
                and self._look() == self._values
                and not any(self._unhooked)
                and all(list(hooks.items()) == kept for hooks, kept in self._hooked)
            )
        except Exception:  # two tensors or arrays that are not the same one: their comparison is no bool
            return True

    @property
    def unversioned(self) -> bool:
        """Whether tensors were made in `torch.inference_mode`: what is written into them goes unnoticed."""
        return len(self._versioned) < len(self._tensors)

    def _in_order(self):
        return list(chain.from_iterable(map(dict.values, self._children)))

    def _states(self):
        """The sum of the versions, each of which only grows, and where the tensors are."""
        return sum(map(attrgetter("_version"), self._versioned)), list(map(torch.Tensor.data_ptr, self._tensors))

    def _look(self):
        return [look(where) for look, where in self._looks]


def _has_version(tensor):
    """Whether it counts what is written into it, which those that were made in inference mode do not."""
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def _reached(model: nn.Module) -> tuple[list[nn.Module], list[Any]]:
    """The modules of ``model``, those included that attributes hold unregistered, and the objects whose attributes are looked at."""
    packages = {_package(type(module)) for module in model.modules()} - {"torch", "rse_fast"}
    modules: dict[nn.Module, None] = {}
    objects, seen, waiting = [], {}, collections.deque([model])  # those seen are kept: their ids stand for them
    while waiting:
        value = waiting.popleft()
        if isinstance(value, nn.Module):
            new = [module for module in value.modules() if module not in modules]
            modules.update(dict.fromkeys(new))
            waiting += [v for module in new for name, v in vars(module).items() if name not in _FREE]
        elif id(value) not in seen and isinstance(value, (list, tuple, dict)):
            seen[id(value)] = value
            waiting += value.values() if isinstance(value, dict) else value
        elif id(value) not in seen and _is_transparent(value, packages):
            seen[id(value)] = value
            objects.append(value)
            waiting += _attributes(value).values()
    return list(modules), objects


def _is_transparent(value, packages: set[str]) -> bool:
    """Whether the attributes of an object are compared one by one: it is data, or of one of the ``packages``."""
    if isinstance(value, (type, types.FunctionType, types.MethodType, torch.Tensor)):
        return False
    return (
        dataclasses.is_dataclass(value)
        or isinstance(value, (types.SimpleNamespace, argparse.Namespace))
        or _package(type(value)) in packages
    )


def _attributes(thing) -> dict[str, Any]:
    """The attributes of an object by name; those of a dataclass may have slots."""
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    return {**getattr(thing, "__dict__", {}), **{f.name: getattr(thing, f.name, None) for f in fields}}


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _is_users(cls: type) -> bool:
    """Whether a class is neither torch's, ours nor built in."""
    return issubclass(cls, nn.Module) and _package(cls) not in ("torch", "rse_fast")


class _Array:
    """The values that a NumPy array had."""

    __array_ufunc__ = None  # an array that is compared with it asks it

    def __init__(self, array: np.ndarray):
        self.kept = self.read(array)

    @staticmethod
    def read(array):
        return array.dtype, array.shape, array.tobytes()

    def __eq__(self, other):
        return isinstance(other, np.ndarray) and self.read(other) == self.kept


def _frozen(value):
    """``value`` with a copy of each list, tuple, dict, set and array in it, which then stay as they are."""
    if isinstance(value, np.ndarray):
        return _Array(value)
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_frozen, value))
    if isinstance(value, dict):
        return {key: _frozen(v) for key, v in value.items()}
    return set(value) if isinstance(value, set) else value


def _tensors(value) -> list[torch.Tensor]:
    """The tensors in a frozen value."""
    if isinstance(value, torch.Tensor):
        return [value]
    value = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return list(chain.from_iterable(map(_tensors, value)))
