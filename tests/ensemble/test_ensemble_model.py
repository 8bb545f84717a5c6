"""What an Ensemble does to its model (nothing), notices of it (every change), and is itself: copies, devices, threads, lifetime."""

import copy
import gc
import io
import itertools
import pickle
import re
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from module_state import assert_unchanged, fingerprint
from small_nets import CLASSES, NETS, rounding, sequential
from small_nets import plain as small_plain
from torch import nn

import rse_fast
from rse_fast import Ensemble
from rse_fast.ensemble import fuse as fusion
from rse_fast.ensemble import memory
from rse_fast.nn import GaussianNoise

pytestmark = pytest.mark.usefixtures("one_thread")
FUSE = pytest.mark.parametrize("fuse", [True, False])


@pytest.fixture
def seed(rng):
    return int(rng.integers(2**64, dtype=np.uint64))


def images(rows=4):
    return torch.rand(rows, 3, 10, 10)


class Fragile(nn.Module):
    """Fails once in its middle when told to."""

    def __init__(self, model):
        super().__init__()
        self.model, self.fails = model, False

    def forward(self, x):
        y = self.model(x)
        if self.fails and x.device.type != "meta":
            raise ArithmeticError("as told")
        return y


# ---------------------------------------------------------------------------------------------------------- the model stays as it is
@FUSE
@pytest.mark.parametrize("name", ["plain", "residual", "shared", "not traceable"])
@pytest.mark.filterwarnings("ignore:rse-fast. the model runs unfused:RuntimeWarning")
def test_the_model_is_not_changed(name, fuse, seed):
    model = NETS[name]().train()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()  # a frozen BatchNorm in a model in training
    before = fingerprint(model)
    ensemble = Ensemble(model, 3, fuse=fuse)
    ensemble.predict(images(), seed)
    ensemble(images().requires_grad_()).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    assert_unchanged(model, before)


@FUSE
@pytest.mark.filterwarnings("ignore:rse-fast. the model runs unfused:RuntimeWarning")
def test_modes_come_back_when_a_pass_fails(fuse):
    model = Fragile(NETS["plain"]()).train()
    model.model[1].eval()
    modes = [m.training for m in model.modules()]
    ensemble = Ensemble(model, 3, fuse=fuse)
    ensemble.predict(images())
    model.fails = True
    ensemble.refresh()
    with pytest.raises(ArithmeticError):
        ensemble.predict(images())
    assert [m.training for m in model.modules()] == modes
    model.fails = False
    ensemble.refresh()
    ensemble.predict(images())
    assert [m.training for m in model.modules()] == modes


@FUSE
def test_a_model_in_training_predicts_as_in_evaluation(fuse, seed):
    model, x = NETS["residual"](), images()
    expected = Ensemble(model, 3, fuse=fuse).predict(x, seed).probs
    ensemble = Ensemble(model.train(), 3, fuse=fuse).train()
    assert torch.equal(ensemble.predict(x, seed).probs, expected)
    assert all(m.training for m in model.modules())


def test_a_model_that_cannot_be_traced_is_told_and_works(seed):
    model, x = NETS["not traceable"](), images()
    ensemble = Ensemble(model, 4, dtype="float32")
    with pytest.warns(RuntimeWarning, match="runs unfused: it cannot be traced.*control flow") as caught:
        found = ensemble.predict(x, seed).probs
        ensemble.refresh()
        ensemble(x)
    assert [warning.filename for warning in caught] == [__file__] * 2  # it points to the call
    with torch.no_grad():
        logits = sequential(model, x, 4, seed)
    assert (found - logits.softmax(-1).mean(0)).abs().max() <= rounding(model, logits)


class Random(nn.Module):
    """Draws numbers of its own from torch's generator."""

    def __init__(self):
        super().__init__()
        self.conv = rse_fast.nn.NoisyConv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) + torch.rand(4)


@FUSE
@pytest.mark.filterwarnings("ignore:rse-fast. the model runs unfused.*draws random numbers:RuntimeWarning")
def test_random_numbers_of_the_models_own_are_drawn_at_each_call(fuse, seed):
    ensemble, x = Ensemble(Random(), 3, fuse=fuse), images()
    torch.manual_seed(1)
    first, state = ensemble.predict(x, seed).probs, torch.get_rng_state()
    assert not torch.equal(ensemble.predict(x, seed).probs, first)
    torch.manual_seed(1)
    assert torch.equal(ensemble.predict(x, seed).probs, first)
    assert torch.equal(torch.get_rng_state(), state)  # to prepare the model took none


# -------------------------------------------------------------------------------------------------------------- changes are noticed
def train_a_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(images()).square().sum().backward()
    optimizer.step()


def load_another(model):
    model.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def assign_another(model):
    model.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}, assign=True)


def replace_a_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)


def change_a_buffer(model):
    model[1].running_mean.add_(1)


def change_sigma(model):
    model[3].sigma.fill_(1.5)


def replace_sigma(model):
    model[3].init_noise(1.5)


def switch_one_layer(model):
    model[0].noise_enabled = False


CHANGES = [train_a_step, load_another, assign_another, replace_a_parameter, change_a_buffer, change_sigma, replace_sigma, switch_one_layer]


@FUSE
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_are_noticed(change, fuse, seed):
    model, x = NETS["plain"](), images()
    ensemble = Ensemble(model, 3, seed=seed, dtype="float32", fuse=fuse)
    before = ensemble.predict(x).probs
    assert torch.equal(ensemble.predict(x).probs, before)
    change(model)
    after = ensemble.predict(x).probs
    assert not torch.equal(after, before)
    assert torch.equal(after, Ensemble(model, 3, seed=seed, dtype="float32", fuse=fuse).predict(x).probs)


@FUSE
def test_noise_off_is_noticed_and_ends(fuse, seed):
    model, x = NETS["residual"](), images()
    ensemble = Ensemble(model, 3, seed=seed, dtype="float32", fuse=fuse)
    before = ensemble.predict(x)
    with rse_fast.noise_off(model):
        off = ensemble.predict(x)
        with torch.no_grad():
            logits = model(x)
        assert torch.equal(off.votes, 3 * nn.functional.one_hot(logits.argmax(-1), CLASSES))
        assert (off.probs - logits.softmax(-1)).abs().max() <= rounding(model, logits)
        assert (ensemble(x) - logits.log_softmax(-1)).abs().max() <= 2 * rounding(model, logits)
    assert torch.equal(ensemble.predict(x).probs, before.probs)


def test_refresh_takes_what_versions_do_not_show(seed):
    model, x = NETS["plain"](), images()
    ensemble = Ensemble(model, 3, seed=seed)
    before = ensemble.predict(x).probs
    model[0].weight.data.mul_(2)
    ensemble.refresh()
    after = ensemble.predict(x).probs
    assert not torch.equal(after, before)
    assert torch.equal(after, Ensemble(model, 3, seed=seed).predict(x).probs)


@FUSE
def test_a_model_whose_noise_was_reverted_is_refused(fuse):
    model = NETS["plain"]()
    ensemble = Ensemble(model, 3, fuse=fuse)
    ensemble.predict(images())
    rse_fast.revert(model)
    with pytest.raises(ValueError, match="model must have noisy layers"):
        ensemble.predict(images())


@FUSE
def test_another_image_size_is_another_dry_run(fuse, seed):
    model = NETS["plain"]()
    ensemble = Ensemble(model, 3, dtype="float32", fuse=fuse)
    for size in (10, 14, 10, 11):
        x = torch.rand(2, 3, size, size)
        with torch.no_grad():
            logits = sequential(model, x, 3, seed)
        assert (ensemble.predict(x, seed).probs - logits.softmax(-1).mean(0)).abs().max() <= rounding(model, logits)


# -------------------------------------------------------------------------------------------------------------- as an nn.Module
def test_an_ensemble_is_a_module_around_its_model(seed):
    model, x = NETS["plain"](), images()
    ensemble = Ensemble(model, 3, seed=seed)
    assert [id(p) for p in ensemble.parameters()] == [id(p) for p in model.parameters()]
    ensemble.predict(x)  # a snapshot adds nothing
    assert list(ensemble.state_dict()) == ["model." + key for key in model.state_dict()]
    assert list(ensemble.children()) == [model]
    other = Ensemble(NETS["plain"](), 3, seed=seed)
    other.load_state_dict(ensemble.state_dict(), strict=True)
    assert torch.equal(other.predict(x).probs, ensemble.predict(x).probs)
    assert "draws=3" in repr(ensemble) and str(seed) in repr(ensemble)
    assert ensemble.eval() is ensemble and not model.training and ensemble.train() is ensemble and model.training
    assert "fresh at every call" in repr(Ensemble(model))


@FUSE
def test_casts_of_the_ensemble_are_noticed(fuse, seed):
    ensemble, x = Ensemble(NETS["plain"](), 3, seed=seed, dtype="float32", fuse=fuse), images()
    with torch.no_grad():
        logits = sequential(ensemble.model, x, 3, seed)
    before = ensemble.predict(x).probs
    assert ensemble.to(torch.bfloat16) is ensemble and ensemble.model[0].weight.dtype == torch.bfloat16
    after = ensemble.predict(x).probs
    difference = (after - before).abs().max()
    assert 0 < difference <= 2 * rounding(ensemble.model, logits, torch.bfloat16)  # weights and activations
    assert ensemble.model[0].sigma.dtype == torch.float32


@FUSE
@pytest.mark.parametrize("warm", [True, False])
def test_copies_and_pickles(fuse, warm, seed):
    ensemble, x = Ensemble(NETS["residual"](), 3, seed=seed, max_rows=5, fuse=fuse), images()
    if warm:
        ensemble.predict(x)
    file = io.BytesIO()
    torch.save(ensemble, file)
    file.seek(0)
    for other in (copy.deepcopy(ensemble), copy.copy(ensemble), pickle.loads(pickle.dumps(ensemble)), torch.load(file, weights_only=False)):
        assert (other.draws, other.seed, other.max_rows, other.fuse) == (3, seed, 5, fuse)
        assert torch.equal(other.predict(x).probs, ensemble.predict(x).probs)
        if other.model is not ensemble.model:
            before = ensemble.predict(x).probs
            load_another(other.model)
            assert not torch.equal(other.predict(x).probs, before)
            assert torch.equal(ensemble.predict(x).probs, before)


@FUSE
def test_a_model_is_let_go_with_its_ensembles(fuse):
    model = NETS["plain"]()
    ensembles = [Ensemble(model, 2, fuse=fuse) for _ in range(2)]
    for ensemble in ensembles:
        ensemble.predict(images())
    model = weakref.ref(model)
    del ensembles, ensemble
    gc.collect()
    assert model() is None


# ------------------------------------------------------------------------------------------------------------------------ threads
@FUSE
def test_threads_get_what_they_would_get_alone(fuse, rng):
    """Eight threads, two ensembles over one model in training, two image sizes, a seed for each call."""
    model = NETS["residual"]().train()
    model.get_submodule("1.bn1").eval()
    modes, buffers = [m.training for m in model.modules()], [b.clone() for b in model.buffers()]
    seeds = [int(s) for s in rng.integers(2**63, size=32)]
    inputs = [torch.rand(2, 3, 10 + 2 * (i % 2), 10) for i in range(len(seeds))]

    def ensembles():
        return [Ensemble(model, draws, dtype="float32", fuse=fuse, max_rows=4) for draws in (3, 4)]

    serial = [ensembles()[i % 2].predict(x, s).probs for i, (x, s) in enumerate(zip(inputs, seeds, strict=True))]
    shared, start = ensembles(), threading.Barrier(8)

    def work(thread):
        torch.set_num_threads(1)
        start.wait(60)
        return [(i, shared[i % 2].predict(inputs[i], seeds[i]).probs) for i in range(thread, len(seeds), 8)]

    with ThreadPoolExecutor(8) as pool:
        results = dict(pair for pairs in pool.map(work, range(8)) for pair in pairs)
    assert all(torch.equal(results[i], expected) for i, expected in enumerate(serial))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


def test_a_scope_belongs_to_its_thread(seed):
    """While one thread predicts with a fixed seed, another's own passes keep their ambient noise."""
    model, x = NETS["plain"](), images(2)
    entered, leave = threading.Event(), threading.Event()

    def hold(module, args):
        if args[0].device.type != "meta" and threading.current_thread() is not threading.main_thread():
            entered.set()
            assert leave.wait(60)

    model[-1].register_forward_pre_hook(hold)
    ensemble = Ensemble(model, 2, seed=seed, fuse=False, dtype="float32")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ensemble.predict, x)
        assert entered.wait(60)
        with torch.no_grad():
            assert model(x).shape == (2, CLASSES) and not torch.equal(model(x), model(x))
        leave.set()
        assert torch.equal(waiting.result(60).probs, ensemble.predict(x).probs)


# ----------------------------------------------------------------------------------------------------- the check of the fused model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_fusion_is_found_told_and_not_used(dtype, seed, monkeypatch):
    model, x = NETS["residual"](), images()
    expected = Ensemble(model, 4, fuse=False, dtype="float32").predict(x, seed).probs
    fold = fusion.fold_batch_norm

    def wrong(graph):
        fold(graph)
        next(m for m in graph.modules() if isinstance(m, nn.Conv2d)).weight.mul_(1.3)

    monkeypatch.setattr(fusion, "fold_batch_norm", wrong)
    ensemble = Ensemble(model, 4, dtype=dtype)
    with pytest.warns(RuntimeWarning, match="runs unfused: fused, it gives other results .relative error"):
        found = ensemble.predict(x, seed).probs
    narrow = torch.float32 if dtype == "float32" else torch.bfloat16
    assert (found - expected).abs().max() <= rounding(model, sequential(model, x, 4, seed), narrow)


def test_a_model_that_fails_on_the_probe_runs_unfused_and_says_so(seed):
    class Refuses(GaussianNoise):  # no tracer looks inside
        def forward(self, x):
            if x.device.type != "meta" and x.min() < 1:
                raise ValueError("too dark")
            return super().forward(x)

    model, x = nn.Sequential(Refuses(0.0), *NETS["plain"]()), images(3)
    bright = 2 + x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Ensemble(model, 4, fuse=False, dtype="float32").predict(bright, seed)
    ensemble = Ensemble(model, 4, dtype="float32")
    with pytest.warns(RuntimeWarning, match="runs unfused.*probe batch.*failed.*too dark"):
        found = ensemble.predict(bright, seed)
    assert (found.probs - expected.probs).abs().max() <= rounding(model, sequential(model, bright, 4, seed))
    with pytest.raises(ValueError, match="too dark"):
        ensemble.predict(x, seed)


# --------------------------------------------------------------------------------------------------------------------- memory
class Room(GaussianNoise):
    """A layer that runs out of memory beyond so many rows, as all layers do."""

    def __init__(self, rows):
        super().__init__(0.2)
        self.rows, self.passed = rows, []

    def forward(self, x):
        if x.device.type != "meta":
            if x.shape[0] > self.rows:
                raise torch.OutOfMemoryError(f"no room for {x.shape[0]} rows")
            self.passed.append(x.shape[0])
        return super().forward(x)


@FUSE
@pytest.mark.parametrize("how", [None, "exact", 0.9])
def test_running_out_of_memory_loses_nothing_and_is_remembered(fuse, how, seed):
    model = NETS["plain"]()
    model.insert(3, room := Room(1000))
    number = int(seed)
    x, options = images(7), dict(draws=9, dtype="float32", fuse=fuse, early_exit=how, seed=number)
    expected = Ensemble(model, **options).predict(x)
    whole = Ensemble(model, **options)(x)
    room.rows = 11
    ensemble = Ensemble(model, **options)
    limited = [m for m in ensemble.modules() if isinstance(m, Room)]
    assert limited == [room]
    found = ensemble.predict(x)
    for name in ("labels", "draws_used", "votes"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    tolerance = rounding(model, sequential(model, x, 9, number))
    assert (found.probs - expected.probs).abs().max() <= tolerance
    assert (ensemble(x) - whole).abs().max() <= 2 * tolerance
    assert torch.cat([p.labels for p in ensemble.stream([x[:3], x[3:]])]).shape == (7,)
    assert ensemble.prepared(x).planner.limit < 2 * 11


@pytest.mark.parametrize("how", [None, 0.999999])
def test_memory_does_not_grow_with_draws(how, seed):
    model, x, peaks = NETS["plain"](), images(4), {}
    for draws in (60, 600):
        ensemble = Ensemble(model, draws, dtype="float32", max_rows=20, early_exit=how)
        ensemble.predict(x, seed)
        with memory.PeakBytes() as held:
            ensemble.predict(x, seed)
        peaks[draws] = held.peak
    assert peaks[600] <= 1.05 * peaks[60], peaks


def test_what_other_threads_draw_is_neither_taken_back_nor_taken_for_the_models():
    """The generator is the process's: a snapshot that put it back would make a training in another thread repeat its noise."""
    model, x, drawn, done = NETS["residual"](), torch.rand(2, 3, 10, 10), [], threading.Event()

    def draw():
        while not done.is_set():
            drawn.append(int(torch.randint(2**62, ())))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(5):
                Ensemble(model, 2, dtype="float32").predict(x)
    finally:
        done.set()
        thread.join()
    assert len(drawn) > 100 and len(set(drawn)) == len(drawn)


# ------------------------------------------------------------------------------------------------------------- shapes besides images
class Volumes(nn.Module):
    """Convolutions of images and of volumes side by side, and a buffer of six dimensions."""

    def __init__(self):
        super().__init__()
        self.flat, self.deep, self.head = nn.Conv2d(3, 4, 3), nn.Conv3d(4, 4, (1, 3, 3)), nn.Linear(4, CLASSES)
        self.register_buffer("table", torch.randn(1, 1, 1, 1, 1, CLASSES))

    def forward(self, x):
        y = self.deep(self.flat(x).relu().unsqueeze(2)).mean((2, 3, 4))
        return self.head(y) + self.table.flatten()


@FUSE
def test_a_network_of_images_may_hold_tensors_of_volumes(fuse, seed):
    model, x = rse_fast.convert(Volumes().eval()), images()
    before = fingerprint(model)
    got = Ensemble(model, 4, fuse=fuse, dtype="float32").predict(x, seed)
    logits = sequential(model, x, 4, seed)
    assert (got.probs - logits.double().softmax(-1).mean(0)).abs().max() <= rounding(model, logits)
    assert_unchanged(model, before)


def test_rows_that_are_no_images_name_the_layer(seed):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mixer = nn.Conv2d(3, 4, 3), nn.Conv1d(4, 4, 1)

        def forward(self, x):
            y = self.conv(x).mean((2, 3))  # [N, 4]
            rows = y.mean(0).repeat(5, 1)[..., None]  # of all images together
            return y + self.mixer(rows).mean((0, 2))

    model = rse_fast.convert(Pixels().eval())
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"noisy layer 'mixer' got .* rows.*convert\(exclude='mixer'\)"):
        warnings.simplefilter("ignore")
        Ensemble(model, 3).predict(images(), seed)
    model = rse_fast.convert(Pixels().eval(), exclude="mixer")
    assert Ensemble(model, 3).predict(images(), seed).probs.shape == (4, 4)


# ------------------------------------------------------------------------------------------------------------- what is likely a mistake
def _warnings(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


def _batch_statistics():
    norm = nn.BatchNorm2d(6, track_running_stats=False)
    return rse_fast.convert(nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), *NETS["plain"]()[-1:]))


class Statistics(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.how(x)


def _with(how):
    return lambda: rse_fast.convert(nn.Sequential(nn.Conv2d(3, 6, 3), Statistics(how), nn.ReLU(), *NETS["plain"]()[-1:]))


MISTAKES = {
    "softmax": (lambda: nn.Sequential(*NETS["plain"](), nn.Softmax(1)), 0, 1, "probabilities"),
    "batch statistics": (_batch_statistics, 0, 1, "BatchNorm without running statistics"),
    "functional batch_norm": (_with(lambda x: nn.functional.batch_norm(x, None, None, training=True)), 0, 1, "other images in the batch"),
    "mean of the batch": (_with(lambda x: x - x.mean((0, 2, 3), keepdim=True)), 0, 1, "other images in the batch"),
    "bytes": (NETS["plain"], 0, 255, r"images reach from .* to 25\d"),
    "normalised": (NETS["plain"], -2.1, 2.6, "images reach from -2"),
}


@FUSE
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("how", ["predict", "forward", "stream"])
def test_likely_mistakes_are_told_once(mistake, how, fuse):
    build, low, high, message = MISTAKES[mistake]
    ensemble, x = Ensemble(build().eval(), 3, fuse=fuse, dtype="float32"), low + (high - low) * images()
    calls = {"predict": lambda: ensemble.predict(x), "forward": lambda: ensemble(x), "stream": lambda: list(ensemble.stream([x, x]))}
    first = _warnings(calls[how])
    assert len(first) == 1 and re.search(message, first[0])
    ensemble.refresh()
    assert not _warnings(lambda: (ensemble.predict(x), ensemble(x.clone().requires_grad_()).sum().backward()))


SHARES = {
    "batch_norm": lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "mean": lambda x: x - x.mean(0),
    "a share of the mean": lambda x: x + 0.1 * x.mean(0),
    "largest value": lambda x: x / x.abs().max(),
}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype, fuse", [*itertools.product(["float32", "bfloat16", "float16"], [True, False]), ("int8", True)])
def test_images_that_depend_on_others_are_told_behind_other_layers(share, dtype, fuse):
    """Rounding is the same in two batches of one size, so that no limit of its size hides a small share."""
    for how, expected in ((SHARES[share], 1), (lambda x: x / x.norm(dim=1, keepdim=True), 0)):
        norm = nn.BatchNorm2d(6)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), Statistics(how), nn.ReLU(), nn.Conv2d(6, 6, 3), norm, nn.ReLU(), *NETS["plain"]()[-1:])
        options = {"calibration": [images()]} if dtype == "int8" else {}
        ensemble = Ensemble(rse_fast.convert(model.eval()), 3, fuse=fuse, dtype=dtype, **options)
        found = _warnings(lambda: ensemble.predict(images()))  # noqa: B023
        assert len(found) == expected and all("other images in the batch" in text for text in found)


@FUSE
def test_nothing_is_told_of_what_is_right(fuse):
    for name in ("plain", "residual", "noisy head", "late noise", "shared", "norm first"):
        model = NETS[name]()
        assert not _warnings(lambda: Ensemble(model, 3, fuse=fuse).predict(images()))  # noqa: B023
    log_softmax = nn.Sequential(*NETS["plain"](), nn.LogSoftmax(1))
    assert not _warnings(lambda: Ensemble(log_softmax, 3, fuse=fuse).predict(1.4 * images() - 0.2))
    deep = rse_fast.convert(nn.Sequential(nn.BatchNorm2d(3), *small_plain()), exclude="1").eval()
    assert not _warnings(lambda: Ensemble(deep, 3, fuse=fuse).predict(255 * images()))
