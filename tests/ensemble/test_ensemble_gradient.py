"""The gradient of an ensemble whose later packed batches are run again in backward: the same values, bounded memory, the same modes."""

import warnings

import numpy as np
import pytest
import torch
from small_nets import CLASSES, NETS, kept_for_gradient, rounding, sequential
from torch import nn

import rse_fast
from rse_fast import Ensemble
from rse_fast.context import NoiseContext
from rse_fast.ensemble import gradient
from rse_fast.ensemble.plan import MEMORY_SHARE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def seed(rng):
    return int(rng.integers(2**64, dtype=np.uint64))


def gradient_of(ensemble, x, weights, keep, monkeypatch):
    """d (weights . log mean softmax) / dx, and the gradients of the live model's parameters, with ``keep`` batches kept."""
    monkeypatch.setattr(gradient, "KEEP", keep)
    x = x.clone().requires_grad_()
    (ensemble(x) * weights).sum().backward()
    parameters = {name: p.grad for name, p in ensemble.model.named_parameters() if p.grad is not None}
    ensemble.model.zero_grad()
    return x.grad, parameters


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("net", ["smooth", "residual", "bypass", "shared", "late noise"])
def test_gradient_of_recomputed_batches_is_the_same(net, fuse, seed, monkeypatch):
    model, x, weights = NETS[net](), torch.rand(5, 3, 10, 10), torch.randn(5, CLASSES)
    trains = not fuse and net in ("smooth", "shared")
    model.requires_grad_(trains)
    ensemble = Ensemble(model, 6, seed=seed, max_rows=4, dtype="float32", fuse=fuse)  # 10 batches: images and draws are both cut
    kept, kept_parameters = gradient_of(ensemble, x, weights, 1000, monkeypatch)
    for keep in (0, 1, 4):
        again, parameters = gradient_of(ensemble, x, weights, keep, monkeypatch)
        assert torch.equal(again, kept) and kept.abs().max() > 0  # the same batches by the same kernels: bit for bit
        assert parameters.keys() == kept_parameters.keys() == ({n for n, _ in model.named_parameters()} if trains else set())
        for name, p in parameters.items():
            assert torch.equal(p, kept_parameters[name]), name


def test_gradient_in_batches_is_that_of_one_batch(seed, monkeypatch):
    model, x, draws = NETS["smooth"](), torch.rand(3, 3, 10, 10), 7
    weights = torch.randn(3, CLASSES)
    whole, _ = gradient_of(Ensemble(model, draws, seed=seed, max_rows=1000, dtype="float32"), x, weights, 1000, monkeypatch)
    parts, _ = gradient_of(Ensemble(model, draws, seed=seed, max_rows=2, dtype="float32"), x, weights, 1, monkeypatch)
    with torch.no_grad():
        scale = sequential(model, x, 1, seed).abs().max()
        # There and back is twice the depth, relative to the largest gradient.
        tolerance = 2 * rounding(model, scale) / scale * whole.abs().max()
    assert (parts - whole).abs().max() <= tolerance
    other, _ = gradient_of(Ensemble(model, draws, seed=seed ^ 1, max_rows=2, dtype="float32"), x, weights, 1, monkeypatch)
    assert (other - whole).abs().max() > 100 * tolerance


def peak_bytes(run) -> int:
    """The most memory that torch's CPU allocator had given out at once while ``run()`` ran, above what it had given out before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    assert changes
    return int(np.cumsum(changes).max())


@pytest.mark.parametrize("fuse", [True, False])
def test_memory_does_not_grow_with_draws_or_images(fuse, seed):
    model = NETS["plain"]().requires_grad_(False)

    def peak(images, draws):
        x = torch.rand(images, 3, 10, 10, requires_grad=True)
        ensemble = Ensemble(model, draws, seed=seed, max_rows=8, dtype="float32", fuse=fuse)
        ensemble(x).sum().backward()  # takes the snapshot
        return peak_bytes(lambda: ensemble(x)[:, 0].sum().backward())

    full = peak(1, 8 * gradient.KEEP)
    batch = (full - peak(1, 8)) / (gradient.KEEP - 1)
    assert batch > 8 * 8 * 10 * 10 * 4  # the first convolution's result alone
    # What a further batch leaves behind: the state of torch's generator (5 kB), logits [8, images, K], the images, their gradient.
    for images, draws in ((1, 80 * gradient.KEEP), (10, 8 * gradient.KEEP)):
        batches = images * draws / 8 - gradient.KEEP
        assert peak(images, draws) - full <= 2 * batch + batches * batch / 10


def test_backward_after_the_call_leaves_modes_and_the_noise_of_others_alone(seed, monkeypatch):
    """A live model runs again in backward: in eval mode, whatever its own mode is by then, with its own noise inside another's scope."""
    model, x = NETS["residual"]().requires_grad_(False), torch.rand(4, 3, 10, 10)
    ensemble = Ensemble(model, 8, seed=seed, max_rows=4, dtype="float32", fuse=False)
    expected, _ = gradient_of(ensemble, x, torch.ones(4, CLASSES), 1000, monkeypatch)
    monkeypatch.setattr(gradient, "KEEP", 1)
    y = x.clone().requires_grad_()
    logp = ensemble(y).sum()
    model.train()
    statistics = [m.running_mean.clone() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with NoiseContext(torch.tensor(1), 1):
        logp.backward()
    assert torch.equal(y.grad, expected) and all(m.training for m in model.modules())
    for before, m in zip(statistics, (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)), strict=True):
        assert torch.equal(before, m.running_mean)


def test_a_second_backward_runs_the_batches_again(seed):
    ensemble, x = Ensemble(NETS["smooth"](), 24, seed=seed, max_rows=4, dtype="float32"), torch.rand(2, 3, 10, 10, requires_grad=True)
    logp = ensemble(x)[:, 0].sum()
    first, second = (torch.autograd.grad(logp, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().max() > 0


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 255).round() / 255

    @staticmethod
    def backward(ctx, g):
        return g


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Own(nn.Module):
    """Its gradient is not that of its values: ``how`` the images or a branch pass."""

    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.other, self.head = how, nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, CLASSES)

    def forward(self, x):
        if self.how is None:
            with torch.no_grad():
                left = self.conv(x).relu()
        else:
            left = self.conv(self.how(x)).relu()
        return self.head((left + self.other(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("how", [Straight.apply, Reversed.apply, None], ids=["straight through", "reversed", "no_grad"])
def test_a_gradient_that_the_model_defines_is_the_ensembles(how, seed):
    model, x = rse_fast.convert(Own(how)).eval(), torch.rand(3, 3, 10, 10)
    found = []
    for fuse in (True, False):
        ensemble = Ensemble(model, 4, seed=seed, dtype="float32", fuse=fuse)
        probs = ensemble.predict(x).probs  # a snapshot for values alone, first
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            asks = x.clone().requires_grad_()
            found.append(torch.autograd.grad(ensemble(asks)[:, 0].sum(), asks)[0])
        assert any("gives other gradients" in str(w.message) for w in said) == fuse
        assert (ensemble.predict(x).probs - probs).abs().max() < 1e-5
    assert (found[0] - found[1]).norm() <= 1e-4 * found[1].norm()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("net", ["plain", "residual", "bypass"])
def test_what_is_kept_for_the_gradient_is_known_beforehand(net, fuse, monkeypatch):
    monkeypatch.setattr("rse_fast.autograd.STORED", -1)  # noisy copies of 16 KiB or less are not planned for, nor is anything below 16 MiB
    ensemble = Ensemble(NETS[net]().requires_grad_(False), 8, dtype="float32", fuse=fuse, algorithm="direct")
    x = torch.rand(2, 3, 10, 10, requires_grad=True)
    ensemble(x)
    planned, kept, behind = kept_for_gradient(ensemble, x)
    assert 0.99 * kept - behind <= planned <= 1.25 * kept  # BatchNorm keeps more on the meta device
    free = 6 * planned / 16 * (gradient.KEEP + 1) / MEMORY_SHARE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rse_fast.ensemble.memory.free_memory", lambda device: free)
        patch.setattr("rse_fast.ensemble.plan._ALWAYS_THERE", 0)
        assert ensemble.prepared(x).planner.rows(gradient=True) == 6
        expected, (found,) = ensemble(x).detach(), torch.autograd.grad(ensemble(x)[0, 0], x)
    assert expected.isfinite().all() and found[0].any()
