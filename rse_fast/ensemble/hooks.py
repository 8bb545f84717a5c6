"""Hooks of a live model in copies of it: a tool that put a hook on a layer gets its calls, whichever copy an ensemble runs."""

import contextlib
import threading
from copy import deepcopy

from torch import nn

from rse_fast.attributes import detached
from rse_fast.ensemble.watch import HOOKS

_probing = threading.local()


@contextlib.contextmanager
def without_hooks():
    """Within, this thread's calls of copies call no hook: a tool shall not take a probe for an image."""
    before, _probing.on = getattr(_probing, "on", False), True
    try:
        yield
    finally:
        _probing.on = before


class LiveHook:
    """A hook in a copy of the module that it was put on: it is called with that module, which a tool may know again."""

    def __init__(self, hook, module: nn.Module):
        self.hook, self.module = hook, module

    def __call__(self, copied, *args):
        return None if getattr(_probing, "on", False) else self.hook(self.module, *args)

    def __deepcopy__(self, memo):
        return self


def remember(model: nn.Module, memo: dict) -> None:
    """Adds the hooks of ``model`` to the memo of a deep copy: neither they nor what they belong to shall be copied."""
    memo.update({id(hook): hook for module in model.modules() for hooks in _of(module) for hook in hooks.values() if not _computes(hook)})


def attach(copied: nn.Module, model: nn.Module) -> None:
    """Makes, in place, `LiveHook`s of the hooks in a deep copy of ``model``."""
    for own, live in zip(copied.modules(), model.modules(), strict=True):
        for hooks in _of(own):
            for key, hook in hooks.items():
                if not _computes(hook) and not isinstance(hook, LiveHook):
                    hooks[key] = LiveHook(hook, live)


def twin(model: nn.Module) -> nn.Module:
    """Modules like those of ``model`` in eval mode that share its parameters and buffers, to try things with that the model shall not
    notice. Tensors in attributes, which a forward may write to, are copies."""
    memo = detached(model) | {id(t): t for t in (*model.parameters(), *model.buffers())}
    remember(model, memo)
    copied = deepcopy(model, memo).eval()
    attach(copied, model)
    return copied


def watched(model: nn.Module) -> bool:
    """Whether a hook, other than torch's own that compute weights, sees what passes through ``model``."""
    return any(not _computes(hook) for module in model.modules() for hooks in _of(module) if hooks for hook in hooks.values())


def _of(module):
    return [vars(module)[name] for name in HOOKS]


def _computes(hook) -> bool:
    """Whether it is one of torch's own that compute a weight of the module they are called with, such as old-style weight_norm, or ours."""
    own = ("torch.nn.utils", "rse_fast.")
    return type(hook).__module__.startswith(own) or (getattr(hook, "__module__", None) or "").startswith(own)
