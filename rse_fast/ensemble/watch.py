"""Notices that a model is no longer what a snapshot of it was taken of, at the price of a look per module at every call."""

from itertools import chain
from operator import attrgetter, itemgetter

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rse_fast.convert import tensor_attributes

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Attributes that change no result of a snapshot: its modules are in eval mode, and have the streams of their own time.
_FREE = {"training", "stream"}


class Watch:
    """What a call of ``model`` depends on, as it was when the watch was made: tensors, modules, hooks and plain attributes.

    What an attribute holds is compared, not what stands inside: a list that is changed in place goes unnoticed.
    """

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._types = list(map(type, self._modules))
        fields = list(map(vars, self._modules))
        self._registries = [field[name] for field in fields for name in _REGISTRIES]
        self._held = list(chain.from_iterable(map(dict.values, self._registries)))  # and thereby kept from being replaced at its address
        self._tensors = [value for value in self._held if isinstance(value, torch.Tensor)] + tensor_attributes(model)
        self._tensors = [t for t in self._tensors if not t.is_inference()]  # these have no version
        self._versions, self._places = self._states()
        self._fields, self._sizes = fields, list(map(len, fields))
        plain = [[name for name in field if name not in _FREE and name not in _REGISTRIES] for field in fields]
        plain = [[name for name in names if not isinstance(field[name], torch.Tensor)] for names, field in zip(plain, fields, strict=True)]
        # One look-up for all attributes of a module that are no container of torch's own, which stay the same objects.
        wanted = [[name for name in names if not name.startswith("_") or name == "_conv_forward"] for names in plain]
        self._attributes = [(itemgetter(*names), field) for names, field in zip(wanted, fields, strict=True) if names]
        self._values = self._look()
        self._all_hooks = [field[name] for field in fields for name in _HOOKS]
        self._handles, self._hooks = RemovableHandle.next_id, self._hooked()
        self._some_hooks = [(hooks, len(hooks)) for hooks in self._all_hooks if hooks]

    def changed(self) -> bool:
        """Whether any of it is another now."""
        try:
            return not (
                list(chain.from_iterable(map(dict.values, self._registries))) == self._held
                and list(map(type, self._modules)) == self._types
                and list(map(len, self._fields)) == self._sizes
                and self._states() == (self._versions, self._places)
                and self._look() == self._values
                and all(len(hooks) == count for hooks, count in self._some_hooks)
                and (RemovableHandle.next_id == self._handles or self._same_hooks())
            )
        except Exception:  # two tensors or arrays that are not the same one: their comparison is no bool
            return True

    def _states(self):
        return list(map(attrgetter("_version"), self._tensors)), list(map(torch.Tensor.data_ptr, self._tensors))

    def _look(self):
        return [look(field) for look, field in self._attributes]

    def _hooked(self):
        return [tuple(hooks) for hooks in self._all_hooks]  # their keys are numbers of handles

    def _same_hooks(self):
        """Asked only where some module of the process has got a hook since."""
        handles, same = RemovableHandle.next_id, self._hooked() == self._hooks
        if same:
            self._handles = handles
        return same
