"""Whatever changes in a model after an ensemble's first call, the next call is that of the model as it is; hooks get their calls."""

import argparse
import collections
import dataclasses
import gc
import itertools
import tracemalloc
import types

import numpy as np
import pytest
import torch
from torch import nn

import rse_fast
from rse_fast import Ensemble

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:rse-fast. the model runs unfused:RuntimeWarning"),
]
FUSE = pytest.mark.parametrize("fuse", [True, False])


@dataclasses.dataclass
class Config:
    scale: float = 1.0


@dataclasses.dataclass(slots=True)
class Slots:
    inner: Config = dataclasses.field(default_factory=Config)


class Gain:  # a helper of the user's own
    def __init__(self):
        self.value = 1.0

    def __call__(self, x):
        return x * self.value


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.act, self.conv = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(32, 3)
        self.scale, self._private, self.steps = 1.0, 1.0, [1.0, {"shift": 0.0}]
        self.extra = [torch.zeros(3)]
        self.slots, self.gain, self.array = Slots(), Gain(), np.ones(1)
        self.namespaces = types.SimpleNamespace(a=1.0), argparse.Namespace(a=1.0)
        self.ordered, self.stream = collections.OrderedDict(a=1.0), 1.0

    def forward(self, x):
        x = self.conv(self.act(self.stem(x)) * self.scale * self._private)
        x = self.head(self.pool(x).flatten(1)) * self.steps[0] + self.steps[1]["shift"] + self.extra[0]
        x = self.gain(x) * self.slots.inner.scale * self.namespaces[0].a * self.namespaces[1].a * self.ordered["a"]
        return x * float(self.array[0]) * self.stream


def build(seed=0):
    torch.manual_seed(seed)
    return rse_fast.convert(Net().eval())


def half(module, args, out):
    return out * 0.5


def zero(module, args):
    return (args[0] * 0,)


def of_all_modules(model, token):
    return nn.modules.module.register_module_forward_hook(lambda m, args, out: out * 0.5 if type(m) is nn.ReLU else None)


NOTHING = lambda m: None  # noqa: E731
CHANGES = {  # name: (before the first call, after it)
    "hook": (NOTHING, lambda m, t: m.conv.register_forward_hook(half)),
    "hook removed": (lambda m: m.conv.register_forward_hook(half), lambda m, t: t.remove()),
    "hook replaced": (
        lambda m: m.conv.register_forward_hook(half), lambda m, t: (t.remove(), m.conv.register_forward_hook(lambda m, a, o: o * 2))
    ),
    "hook of a container": (NOTHING, lambda m, t: m.register_forward_pre_hook(zero)),
    "hook with keywords": (NOTHING, lambda m, t: m.conv.register_forward_hook(lambda m, a, k, o: o * 0.5, with_kwargs=True)),
    "hook of all modules": (NOTHING, of_all_modules),
    "module replaced": (NOTHING, lambda m, t: setattr(m, "act", nn.Sigmoid())),
    "module replaced behind torch's back": (NOTHING, lambda m, t: m._modules.update(act=nn.Sigmoid())),
    "class replaced": (NOTHING, lambda m, t: setattr(m.act, "__class__", nn.Tanh)),
    "parameter replaced": (NOTHING, lambda m, t: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach() * 2))),
    "parameter's data replaced": (NOTHING, lambda m, t: setattr(m.head.weight, "data", m.head.weight.detach() * 2)),
    "parameter removed": (NOTHING, lambda m, t: setattr(m.head, "bias", None)),
    "parameter changed in place": (NOTHING, lambda m, t: m.head.weight.detach().mul_(2)),
    "stride": (NOTHING, lambda m, t: setattr(m.conv, "stride", (2, 2))),
    "padding": (NOTHING, lambda m, t: setattr(m.conv, "padding", (1, 1))),
    "attribute": (NOTHING, lambda m, t: setattr(m, "scale", 3.0)),
    "attribute called as one of noisy layers": (NOTHING, lambda m, t: setattr(m, "stream", 3.0)),
    "private attribute": (NOTHING, lambda m, t: setattr(m, "_private", 3.0)),
    "list changed in place": (NOTHING, lambda m, t: m.steps.__setitem__(0, 3.0)),
    "dict in a list changed in place": (NOTHING, lambda m, t: m.steps[1].update(shift=torch.tensor([0.0, 1.0, 3.0]))),
    "tensor in a list changed in place": (NOTHING, lambda m, t: m.extra[0].add_(torch.tensor([0.0, 1.0, 3.0]))),
    "dataclass in a dataclass": (NOTHING, lambda m, t: setattr(m.slots.inner, "scale", 3.0)),
    "object of the user's": (NOTHING, lambda m, t: setattr(m.gain, "value", 3.0)),
    "namespace": (NOTHING, lambda m, t: setattr(m.namespaces[0], "a", 3.0)),
    "arguments": (NOTHING, lambda m, t: setattr(m.namespaces[1], "a", 3.0)),
    "array changed in place": (NOTHING, lambda m, t: m.array.fill(3.0)),
    "ordered dict": (NOTHING, lambda m, t: m.ordered.update(a=3.0)),
    "hooks taken away with their dict": (
        lambda m: m.conv.register_forward_hook(half), lambda m, t: setattr(m.conv, "_forward_hooks", collections.OrderedDict())
    ),
    "hook in another's place": (
        lambda m: m.conv.register_forward_hook(half), lambda m, t: m.conv._forward_hooks.update({t.id: lambda m, a, o: o * 2})
    ),
    "hook without a handle": (NOTHING, lambda m, t: m.conv._forward_hooks.update({-1: half})),
    "modules replaced with their dict": (NOTHING, lambda m, t: setattr(m, "_modules", {**m._modules, "act": nn.Sigmoid()})),
    "convolution patched": (NOTHING, lambda m, t: setattr(m.conv, "_conv_forward", lambda x, w, b: nn.functional.conv2d(x, 2 * w, b))),
    "forward of a module": (NOTHING, lambda m, t: setattr(m.act, "forward", torch.sigmoid)),
    "forward of the model": (NOTHING, lambda m, t: setattr(m, "forward", lambda x, old=m.forward: old(x) * 2)),
    "noise switched off": (NOTHING, lambda m, t: setattr(m.conv, "noise_enabled", False)),
    "sigma": (NOTHING, lambda m, t: m.conv.set_sigma(2.0)),
}  # fmt: skip


@FUSE
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change, fuse, rng):
    before, after = CHANGES[change]
    model, x, options = build(int(rng.integers(2**31))), torch.rand(2, 3, 8, 8), {"seed": 1, "dtype": "float32", "fuse": fuse}
    token = before(model)
    ensemble = Ensemble(model, 3, **options)
    old, again = ensemble.predict(x), ensemble.predict(x)
    assert torch.equal(old.probs, again.probs)
    handle = after(model, token)
    try:
        new, expected = ensemble.predict(x), Ensemble(model, 3, **options).predict(x)
    finally:
        if change == "hook of all modules":
            handle.remove()
    assert torch.equal(new.probs, expected.probs) and (new.probs - old.probs).abs().max() > 1e-5


@FUSE
def test_a_forward_of_a_class_is_noticed(fuse, monkeypatch):
    model, x = build(), torch.rand(2, 3, 8, 8)
    ensemble = Ensemble(model, 3, seed=1, fuse=fuse, dtype="float32")
    old, forward = ensemble.predict(x), Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x: forward(self, x) * 2)
    assert (ensemble.predict(x).probs - old.probs).abs().max() > 1e-5


@FUSE
def test_a_change_of_a_module_that_is_not_registered_is_noticed(fuse, rng):
    class Loose(Net):
        def __init__(self):
            super().__init__()
            self.unregistered = [nn.Linear(3, 3)]

        def forward(self, x):
            return self.unregistered[0](super().forward(x))

    model, x = rse_fast.convert(Loose().eval()), torch.rand(2, 3, 8, 8)
    ensemble = Ensemble(model, 3, seed=1, fuse=fuse, dtype="float32")
    old = ensemble.predict(x)
    model.unregistered[0].weight.detach().mul_(3)
    new, expected = ensemble.predict(x), Ensemble(model, 3, seed=1, fuse=fuse, dtype="float32").predict(x)
    assert torch.equal(new.probs, expected.probs) and (new.probs - old.probs).abs().max() > 1e-5


@FUSE
def test_another_method_of_a_class_is_noticed(fuse, monkeypatch):
    model, x = build(), torch.rand(2, 3, 8, 8)
    monkeypatch.setattr(Net, "step", lambda self, x: x, raising=False)
    monkeypatch.setattr(Net, "forward", lambda self, x: self.step(self.head(self.pool(self.conv(self.stem(x))).flatten(1))))
    ensemble = Ensemble(model, 3, seed=1, fuse=fuse, dtype="float32")
    old = ensemble.predict(x)
    monkeypatch.setattr(Net, "step", lambda self, x: x * 2)
    assert (ensemble.predict(x).probs - old.probs).abs().max() > 1e-5


def test_what_stays_as_it_is_keeps_the_snapshot():
    model, x = build(), torch.rand(2, 3, 8, 8)
    model.parent, model.itself = [nn.Sequential(model)], types.SimpleNamespace(model=model)
    model.itself.itself, model.array = model.itself, np.full(2, np.nan)
    model.ring = {"inside": [1.0]}
    model.ring["inside"].append(model.ring)
    model.forward = lambda x, old=model.forward: (
        old(x) if model.itself is None else model.head(model.pool(model.conv(model.stem(x))).flatten(1))
    )
    ensemble = Ensemble(model, 3, dtype="float32")
    ensemble.predict(x)
    assert ensemble.prepared(x) is ensemble.prepared(x)


@FUSE
def test_a_tensor_with_a_history_may_be_in_a_container(fuse, rng):
    model, x = build(int(rng.integers(2**31))), torch.rand(2, 3, 8, 8)
    expected = Ensemble(model, 3, seed=1, fuse=fuse, dtype="float32").predict(x)
    model.extra, model.gain.kept = [torch.zeros(3, requires_grad=True) * 2], {"kept": torch.ones(1, requires_grad=True) * 2}
    assert torch.equal(Ensemble(model, 3, seed=1, fuse=fuse, dtype="float32").predict(x).probs, expected.probs)


@pytest.mark.parametrize("holder", [lambda t: t, lambda t: [t]], ids=["attribute", "list"])
def test_probes_write_nothing_into_the_tensors_of_attributes(holder):
    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.calls = holder(torch.zeros(()))

        def forward(self, x):
            (self.calls[0] if isinstance(self.calls, list) else self.calls).add_(1)
            return super().forward(x)

    model, x = rse_fast.convert(Counts().eval()), torch.rand(2, 3, 8, 8)
    ensemble = Ensemble(model, 3, seed=1, fuse=False, dtype="float32")
    ensemble.predict(x)
    assert model.calls == holder(torch.ones(())) and ensemble.prepared(x) is ensemble.prepared(x)


class Activations:
    """Records as Grad-CAM tools do: bound methods as hooks, gradients by hooks on what the layer gives."""

    def __init__(self, *layers):
        self.values, self.gradients, self.layers = [], [], []
        self.handles = [layer.register_forward_hook(self.record) for layer in layers]

    def record(self, layer, args, out):
        self.layers.append(layer)
        self.values.append(out.detach().clone())
        if out.requires_grad:
            out.register_hook(lambda g: self.gradients.append(g.clone()))

    def __deepcopy__(self, memo):
        raise AssertionError("a tool must not be copied")


@FUSE
def test_tools_that_hook_layers_late_get_their_calls(fuse, rng):
    model, x = build(int(rng.integers(2**31))), torch.rand(2, 3, 8, 8)
    ensemble = Ensemble(model, 3, seed=1, dtype="float32", fuse=fuse)
    ensemble.predict(x)
    tool = Activations(model.conv, model.act)
    ensemble(x.clone().requires_grad_())[:, 0].sum().backward()
    # No probe among them, and each with the layer that it was put on.
    assert [v.shape for v in tool.values] == [(6, 8, 6, 6) if layer is model.act else (6, 8, 4, 4) for layer in tool.layers]
    assert tool.layers == [model.act, model.conv] and [g.shape for g in tool.gradients] == [(6, 8, 4, 4), (6, 8, 6, 6)]
    tool.values.clear()
    ensemble.predict(x)
    assert [len(v) for v in tool.values] == [6, 6]
    seen = len(tool.values)
    for handle in tool.handles:
        handle.remove()
    ensemble.predict(x)
    assert len(tool.values) == seen


def test_snapshots_leave_nothing_behind():
    model, x = build(), torch.rand(2, 3, 8, 8)
    ensemble = Ensemble(model, 3, dtype="float32")

    def renew(times):
        for _ in range(times):
            ensemble.refresh()
            ensemble.predict(x)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        sizes = [renew(6), *(renew(8) for _ in range(3))]
    finally:
        tracemalloc.stop()
    grown = min(after - before for before, after in itertools.pairwise(sizes)) / 8  # a table that grows once does so in one stretch alone
    assert grown < 4000, f"{grown:.0f} bytes a snapshot"  # what leaked was 18 KB and more


class Trigger:
    """An attribute that does something when it is first copied: what another thread may do while a snapshot is taken."""

    def __init__(self, action):
        self.actions = [action]

    def __deepcopy__(self, memo):
        while self.actions:
            self.actions.pop()()
        return self


def test_a_snapshot_is_not_half_of_one_model_and_half_of_another(rng, recwarn):
    model, x = build(int(rng.integers(2**31))), torch.rand(2, 3, 8, 8)

    def change():
        model.stem.weight.data = model.stem.weight.data * -2
        model.head.weight.data = model.head.weight.data * 3

    model.act.trigger = Trigger(change)  # the stem is copied before it, the head afterwards
    ensemble = Ensemble(model, 3, seed=1, dtype="float32")
    found = ensemble.predict(x)
    assert torch.equal(found.probs, Ensemble(model, 3, seed=1, dtype="float32").predict(x).probs)
    assert not model.act.trigger.actions and not [w for w in recwarn if "rse-fast" in str(w.message)]


@FUSE
def test_backward_of_a_model_that_changed_in_between(fuse, rng):
    """A snapshot is as it was; of a model that runs itself, packed batches that backward runs again are not."""
    model, x = build(int(rng.integers(2**31))).requires_grad_(False), torch.rand(6, 3, 8, 8, requires_grad=True)
    ensemble = Ensemble(model, 3, seed=1, dtype="float32", fuse=fuse, max_rows=3)
    (expected,) = torch.autograd.grad(ensemble(x)[:, 0].sum(), x)
    out = ensemble(x)[:, 0].sum()
    model.head.weight.data = model.head.weight.data * 3
    if fuse:
        assert torch.equal(torch.autograd.grad(out, x)[0], expected)
    else:
        with pytest.raises(RuntimeError, match="the model must be the same in backward"):
            torch.autograd.grad(out, x)


@FUSE
def test_memory_that_is_used_again_hides_no_change(fuse, rng):
    """Two new values of one tensor: the second may lie where the first one's predecessor lay."""
    model, x = build(int(rng.integers(2**31))), torch.rand(2, 3, 8, 8)
    model.head = nn.Sequential(nn.Linear(32, 4096), nn.Linear(4096, 3))  # large enough for pages of their own
    ensemble = Ensemble(model, 3, seed=1, dtype="float32", fuse=fuse)
    for _ in range(5):
        old = ensemble.predict(x)
        for factor in (4.0, 0.5):
            model.head[0].weight.data = model.head[0].weight.data * factor
        new, expected = ensemble.predict(x), Ensemble(model, 3, seed=1, dtype="float32", fuse=fuse).predict(x)
        assert torch.equal(new.probs, expected.probs) and not torch.equal(new.probs, old.probs)


@FUSE
def test_a_tensor_of_one_number_is_not_another_of_the_same_value(fuse, rng):
    """The registry then holds a tensor that nobody watches."""
    model, x = build(int(rng.integers(2**31))), torch.rand(2, 3, 8, 8)
    del model.scale
    model.scale = nn.Parameter(torch.ones(1))
    ensemble = Ensemble(model, 3, seed=1, dtype="float32", fuse=fuse)
    old = ensemble.predict(x)
    model.scale = nn.Parameter(torch.ones(1))
    assert torch.equal(ensemble.predict(x).probs, old.probs)
    with torch.no_grad():
        model.scale.fill_(3)
    expected = Ensemble(model, 3, seed=1, dtype="float32", fuse=fuse).predict(x)
    assert torch.equal(ensemble.predict(x).probs, expected.probs) and not torch.equal(expected.probs, old.probs)


@FUSE
def test_the_order_of_modules_is_noticed(fuse, rng):
    torch.manual_seed(int(rng.integers(2**31)))
    model = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Tanh(), nn.Softplus()), nn.Flatten(), nn.Linear(144, 3)))
    x, ensemble = torch.rand(2, 3, 8, 8), Ensemble(model, 3, seed=1, dtype="float32", fuse=fuse)
    old, inner = ensemble.predict(x), model[1]._modules
    inner["0"] = inner.pop("0")
    expected = Ensemble(model, 3, seed=1, dtype="float32", fuse=fuse).predict(x)
    assert torch.equal(ensemble.predict(x).probs, expected.probs) and not torch.equal(expected.probs, old.probs)


def test_tensors_without_a_version_are_said_to_be_unnoticed(rng):
    with torch.inference_mode():
        model = build(int(rng.integers(2**31)))
    x, ensemble = torch.rand(2, 3, 8, 8), Ensemble(model, 3, seed=1, dtype="float32")
    with pytest.warns(RuntimeWarning, match=r"made in torch.inference_mode.*call refresh\(\)"):
        old = ensemble.predict(x)
    with torch.inference_mode():
        model.head.weight.mul_(2)
    ensemble.refresh()
    assert not torch.equal(ensemble.predict(x).probs, old.probs)
    model.head.weight.data = model.head.weight * 3  # where it lies is noticed all the same
    assert torch.equal(ensemble.predict(x).probs, Ensemble(model, 3, seed=1, dtype="float32").predict(x).probs)


@pytest.mark.parametrize("options", [{}, {"algorithm": "winograd"}, {"dtype": "int8"}, {"fuse": False}], ids=str)
def test_a_dropped_snapshot_is_gone_at_once(options, rng):
    """Its memory does not wait for the garbage collector."""
    model, x = build(int(rng.integers(2**31))), torch.rand(2, 3, 8, 8)
    if options.get("dtype") == "int8":
        if not torch.backends.mkldnn.is_available():
            pytest.skip("needs oneDNN")
        options = options | {"calibration": [x]}
    ensemble = Ensemble(model, 3, **({"dtype": "float32"} | options))

    def tensors():
        return sum(issubclass(type(thing), torch.Tensor) and not thing.is_meta for thing in gc.get_objects())

    for _ in range(2):
        ensemble.refresh()
        ensemble.predict(x)
    gc.collect()
    gc.disable()
    try:
        counts = []
        for _ in range(3):
            ensemble.refresh()
            ensemble.predict(x)
            counts.append(tensors())
    finally:
        gc.enable()
    assert counts[0] == counts[1] == counts[2]


@FUSE
@pytest.mark.parametrize("change", [lambda m: m.mix.mul_(2), lambda m: setattr(m, "mix", m.mix * 2)], ids=["in place", "another"])
def test_a_change_of_a_sparse_tensor_is_noticed(change, fuse, rng):
    """Such as the edges of a graph; it has no address."""

    class Mixes(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mix", torch.eye(3).to_sparse())

        def forward(self, x):
            return (self.mix @ super().forward(x).T).T

    torch.manual_seed(int(rng.integers(2**31)))
    model, x = rse_fast.convert(Mixes().eval()), torch.rand(2, 3, 8, 8)
    ensemble = Ensemble(model, 3, seed=1, fuse=fuse, dtype="float32")
    old = ensemble.predict(x)
    change(model)
    new, expected = ensemble.predict(x), Ensemble(model, 3, seed=1, fuse=fuse, dtype="float32").predict(x)
    assert torch.equal(new.probs, expected.probs) and (new.probs - old.probs).abs().max() > 1e-5


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:rse-fast. convert gives no noise:RuntimeWarning")
@FUSE
def test_scripted_submodules_are_watched(fuse, rng):
    inner = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(inner), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    ensemble, x = Ensemble(rse_fast.convert(model), 3, fuse=fuse), torch.from_numpy(rng.random((2, 3, 8, 8), dtype=np.float32))
    before = ensemble.predict(x, seed=1).probs
    assert torch.equal(ensemble.predict(x, seed=1).probs, before)
    ensemble(x.requires_grad_()).sum().backward()  # nothing has changed in between
    with torch.no_grad():
        next(model[1].parameters()).mul_(-3)
    after = ensemble.predict(x.detach(), seed=1).probs
    assert not torch.equal(after, before) and torch.equal(after, Ensemble(model, 3, fuse=fuse).predict(x.detach(), seed=1).probs)
