"""Tracing by torch.fx that other threads do not notice, and what a forward pass draws."""

import threading
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_one_at_a_time = threading.RLock()


class Tracer(torch.fx.Tracer):
    """torch.fx replaces ``nn.Module.__call__`` in the whole process while it traces. Here the calls of other threads pass through.

    Of two traces at once the second waits. Each puts back what it found; if that were the replacement of the other, it would stay for good.
    """

    def trace(self, root, concrete_args=None):
        with _one_at_a_time:
            self._thread = threading.get_ident()
            try:
                return super().trace(root, concrete_args)
            finally:
                self.root, self.tensor_attrs = None, {}  # torch.fx leaves the tracer in cycles, and they would hold the model

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class RandomOpDetector(TorchDispatchMode):
    """``any``: whether this thread drew from a generator of torch's. (The generator's state also changes when other threads draw.)"""

    any = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.any = self.any or draws(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def draws(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of an op draws from a generator of torch's. Attention, for example, does so only if its dropout is above 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments} | {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    return all(given.get(name) != 0 for name in ("dropout_p", "dropout", "train", "training"))  # False is 0; None is none of these


class Generators:
    """The states of torch's generators that a pass of ``model`` on ``x`` may draw from: of the CPU, and of the CUDA devices they are on.

    Other threads share the generators, so `restore` is for where a pass has drawn.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor):
        devices = {t.device for t in (x, *model.parameters(), *model.buffers()) if t.device.type == "cuda"}
        self._cpu, self._cuda = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """The generators give again what they gave since."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
