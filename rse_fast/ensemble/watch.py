"""Notices that a model is no longer what a snapshot of it was taken of, at the price of a look per module and tensor at every call.

On a ResNet-50 (149 modules, 320 tensors that count) a call takes 0.1 ms on an AMD EPYC. A third of it is the tensors' versions and
addresses, which nothing in Python tells of all at once; what the registries hold is compared dict by dict, in one call.
"""

import weakref
from itertools import chain
from operator import attrgetter, is_, itemgetter

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook

from rse_fast import attributes
from rse_fast.nn import NoiseLayer

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_COUNTER = "num_batches_tracked"  # of BatchNorm, which no module in eval mode reads
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What torch keeps in a module is looked at by name, or changes no result of a snapshot, whose modules are in eval mode.
_FREE = attributes.OF_TORCH | {"_reversed_padding_repeated_twice"}
_NUMBERED = {"stream", "layer_name"}  # of noisy layers: a snapshot has those of its own time
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
        reached = attributes.reached(model)
        self._modules = list(reached.modules)
        self._types = list(map(type, self._modules))
        self._classes = [(cls, dict(vars(cls))) for cls in {c for t in set(self._types) for c in t.__mro__} if _is_users(cls)]
        self._forwards = [(cls, cls.forward) for cls in set(self._types) if not issubclass(cls, torch.jit.ScriptModule)]
        self._fields = fields = list(map(vars, self._modules))
        self._sizes = list(map(len, fields))
        registries = [field[name] for field in fields for name in _REGISTRIES]
        # Those of a scripted module are views that are equal to none, and hold the same things at each look.
        self._scripted = [(r, list(r.items())) for r in registries if not isinstance(r, dict)]
        registries = [r for r in registries if isinstance(r, dict)]
        self._empty, self._filled = [r for r in registries if not r], [r for r in registries if r]
        self._kept = list(map(dict, self._filled))
        # Dicts are compared by identity first, and by value where that differs, which for large tensors raises. So there are three looks:
        # at all dicts; at the tensors of one number or none in them, whose values may be equal; at modules in their order.
        small = [(r, k) for r in self._filled for k, v in r.items() if isinstance(v, torch.Tensor) and v.numel() < 2 and k != _COUNTER]
        self._small_in, self._small_names = [r for r, _ in small], [name for _, name in small]
        self._small = [registry[name] for registry, name in small]
        self._children = [field["_modules"] for field in fields if field["_modules"] and isinstance(field["_modules"], dict)]
        self._order = self._in_order()
        # One look-up for the dicts that torch keeps in a module, of which there shall be no other, and for all of its attributes.
        names = list(map(_watched, self._modules))
        of_modules = [(itemgetter(*_DICTS, *own), field) for own, field in zip(names, fields, strict=True)]
        self._looks = of_modules + [(attributes.of, thing) for thing in reached.objects]
        plain = [_frozen([field[name] for name in own]) for own, field in zip(names, fields, strict=True)]
        inside = [_frozen(attributes.of(thing)) for thing in reached.objects]
        self._values = [(*_dicts(field), *own) for own, field in zip(plain, fields, strict=True)] + inside
        kept = chain(chain.from_iterable(map(dict.items, self._kept)), *(items for _, items in self._scripted))
        tensors = [v for name, v in kept if name != _COUNTER]
        tensors = [t for t in tensors + reached.tensors if isinstance(t, torch.Tensor)]
        self._tensors = list({id(t): t for t in tensors}.values())
        self._versioned = list(filter(_has_version, self._tensors))
        self._placed = [t for t in self._tensors if t.layout is torch.strided]  # a sparse one has no address of its own
        # Memory that a tensor has left stays taken: what came to lie at its old address would look like it.
        self._memory = [t.untyped_storage() for t in self._placed]
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
                and all(_same_items(registry.items(), items) for registry, items in self._scripted)
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
        return sum(map(attrgetter("_version"), self._versioned)), list(map(torch.Tensor.data_ptr, self._placed))

    def _look(self):
        return [look(where) for look, where in self._looks]


def _has_version(tensor):
    """Whether it counts what is written into it, which those that were made in inference mode do not."""
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def _same_items(items, kept):
    """Whether a registry holds the very things that it held."""
    items = list(items)
    return len(items) == len(kept) and all(name == k and value is v for (name, value), (k, v) in zip(items, kept, strict=True))


def _watched(module):
    """The names of the attributes that are compared."""
    free = _FREE | _NUMBERED if isinstance(module, NoiseLayer) else _FREE
    return [name for name in vars(module) if name not in free]


def _is_users(cls: type) -> bool:
    """Whether a class is neither torch's, ours nor built in."""
    return issubclass(cls, nn.Module) and attributes.package(cls) not in ("torch", "rse_fast")


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


class _Same:
    """A container within itself: that very one is equal to it."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return other is self.value


def _frozen(value, within=()):
    """``value`` with a copy of each list, tuple, dict, set and array in it, which then stay as they are.

    within: the containers around it.
    """
    if isinstance(value, np.ndarray):
        return _Array(value)
    if isinstance(value, (list, tuple, dict)):
        if any(value is outer for outer in within):
            return _Same(value)
        within = (*within, value)
        if isinstance(value, dict):
            return {key: _frozen(v, within) for key, v in value.items()}
        return (list if isinstance(value, list) else tuple)([_frozen(v, within) for v in value])
    return set(value) if isinstance(value, set) else value
