"""Everything a module tree holds, to see whether something changed it."""

import torch
from torch import nn


def frozen(value):
    is_data = isinstance(value, torch.Tensor) and not isinstance(value, nn.parameter.UninitializedTensorMixin)
    return value.detach().clone() if is_data else value


def fingerprint(model):
    """Classes, attributes, values of tensors, and hooks of every module, by (name, attribute)."""
    state = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            if isinstance(value, dict):
                value = {k: frozen(v) for k, v in value.items()}
            elif isinstance(value, (list, set)):
                value = type(value)(value)
            state[name, key] = frozen(value)
        state[name, "class"] = type(module)
    return state


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if a is b:
        return True
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return bool(a == b)


def assert_unchanged(model, before):
    after = fingerprint(model)
    assert after.keys() == before.keys(), after.keys() ^ before.keys()
    changed = [key for key in before if not same(before[key], after[key])]
    assert not changed, changed
