"""Notices that a model is no longer what a snapshot of it was taken of, at the price of a look per module and tensor at every call.

On a ResNet-50 (149 modules, 320 tensors that count) half of that price is the tensors' versions and addresses, which nothing in Python
tells of all at once; what the registries hold is compared dict by dict, in one call.
"""

import weakref
from itertools import chain
from operator import attrgetter, is_, itemgetter

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_COUNTER = "num_batches_tracked"  # of BatchNorm, which no module in eval mode reads
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What torch keeps in a module is looked at by name. The rest changes no result of a snapshot: its modules are in eval mode, and have
# the streams of their own time.
_FREE = {*vars(nn.Module()), "stream", "layer_name", "_reversed_padding_repeated_twice"}
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
    """What a call of ``model`` depends on, as it was when the watch was made: tensors, modules, hooks and plain attributes.

    Lists, tuples, dicts and sets in attributes are compared by what they hold. What other objects hold inside goes unnoticed.
    """

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._types, self._classes = list(map(type, self._modules)), list({type(m) for m in self._modules})
        self._forwards = self._class_forwards()
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
        # One look-up for all attributes of a module.
        names = [[name for name in field if name not in _FREE] for field in fields]
        self._attributes = [(itemgetter(*wanted), field) for wanted, field in zip(names, fields, strict=True) if wanted]
        self._values = [_frozen(value) for value in self._look()]
        tensors = [v for kept in self._kept for name, v in kept.items() if name != _COUNTER]
        tensors = [*tensors, *chain.from_iterable(map(_tensors, self._values))]
        self._tensors = list({id(t): t for t in tensors if isinstance(t, torch.Tensor)}.values())
        self._versioned = list(filter(_has_version, self._tensors))
        # Memory that a tensor has left stays taken: what came to lie at its old address would look like it.
        self._memory = [t.untyped_storage() for t in self._tensors]
        self._versions, self._places = self._states()
        self._all_hooks = [field[name] for field in fields for name in HOOKS] + GLOBAL_HOOKS
        self._handles, self._hooks = RemovableHandle.next_id, self._hooked()
        self._some_hooks = [(hooks, len(hooks)) for hooks in self._all_hooks if hooks]
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
                and self._class_forwards() == self._forwards
                and list(map(len, self._fields)) == self._sizes
                and self._states() == (self._versions, self._places)
                and self._look() == self._values
                and all(len(hooks) == count for hooks, count in self._some_hooks)
                and (RemovableHandle.next_id == self._handles or self._same_hooks())
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
        return [look(field) for look, field in self._attributes]

    def _class_forwards(self):
        return [cls.forward for cls in self._classes]

    def _hooked(self):
        return [tuple(hooks) for hooks in self._all_hooks]  # their keys are numbers of handles

    def _same_hooks(self):
        """Asked only where some module of the process has got a hook since."""
        handles, same = RemovableHandle.next_id, self._hooked() == self._hooks
        if same:
            self._handles = handles
        return same


def _has_version(tensor):
    """Whether it counts what is written into it, which those that were made in inference mode do not."""
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def _frozen(value):
    """``value`` with a copy of each list, tuple, dict and set in it, which then stay as they are."""
    if type(value) in (list, tuple):
        return type(value)(map(_frozen, value))
    if type(value) is dict:
        return {key: _frozen(v) for key, v in value.items()}
    return set(value) if type(value) is set else value


def _tensors(value) -> list[torch.Tensor]:
    """The tensors in a frozen value."""
    if isinstance(value, torch.Tensor):
        return [value]
    if type(value) is dict:
        value = value.values()
    return list(chain.from_iterable(map(_tensors, value))) if type(value) in (list, tuple) or isinstance(value, type({}.values())) else []
