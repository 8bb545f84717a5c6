"""Ensemble.predict and .forward: equal to passes one by one, whatever the packing; their statistics, seeds, gradients and errors."""

import copy
import importlib.util
import itertools
import threading

import numpy as np
import pytest
import torch
from small_nets import CLASSES, NETS, lively, rounding, sequential
from torch import nn

import rse_fast
from rse_fast import Ensemble
from rse_fast.models import VGG16, ResNeXt29

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:rse-fast. the model runs unfused:RuntimeWarning"),
]


@pytest.fixture
def seed(rng):
    return int(rng.integers(2**64, dtype=np.uint64))


def images(rows=5):
    return torch.rand(rows, 3, 10, 10)


def statistics(logits):
    """probs, votes, entropy and mutual information of logits [draws, N, K], in numpy."""
    z = logits.detach().double().numpy()
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(0)
    votes = np.stack([np.bincount(row, minlength=z.shape[-1]) for row in z.argmax(-1).T])
    entropy = -(mean * np.log(mean)).sum(-1)
    return mean, votes, entropy, entropy + (p * np.log(p)).sum(-1).mean(0)


def assert_is(prediction, logits, tolerance):
    """``prediction`` is that of ``logits`` [draws, N, K], each of which may be off by ``tolerance``."""
    probs, votes, entropy, information = statistics(logits)
    draws, _, classes = logits.shape
    assert prediction.probs.dtype == torch.float32 and prediction.votes.dtype == prediction.labels.dtype == torch.int64
    # d softmax = p (dz - p . dz), at most twice the largest p (1 - p) = 1/4; and the result is rounded to float32
    eps = np.finfo(np.float32).eps
    assert np.abs(prediction.probs.numpy() - probs).max() <= tolerance / 2 + eps
    # d entropy = -sum p (log p + entropy) dz, and sum p |log p| is the entropy itself
    slack = 2 * np.log(classes) * tolerance + 4 * eps
    assert np.abs(prediction.entropy.numpy() - entropy).max() <= slack
    assert np.abs(prediction.mutual_information.numpy() - information).max() <= 2 * slack
    top = logits.topk(2, -1).values
    unsure = (top[..., 0] - top[..., 1] <= 2 * tolerance).sum(0).numpy()  # draws whose vote rounding may change
    assert (np.abs(prediction.votes.numpy() - votes).sum(-1) <= 2 * unsure).all()
    order = np.sort(probs, -1)
    sure = order[:, -1] - order[:, -2] > tolerance + 2 * eps
    assert (prediction.labels.numpy() == probs.argmax(-1))[sure].all()
    assert torch.equal(prediction.votes.sum(-1), torch.full_like(prediction.labels, draws))
    assert torch.equal(prediction.draws_used, torch.full_like(prediction.labels, draws))


# ------------------------------------------------------------------------------------------------ packed = sequential, any packing
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_packed_equals_one_pass_a_draw(name, fuse, seed):
    model, x, draws = NETS[name](), images(), 6
    with torch.no_grad():
        logits, other = sequential(model, x, draws, seed), sequential(model, x, draws, seed ^ 1)
    tolerance = rounding(model, logits)
    assert (other.softmax(-1).mean(0) - logits.softmax(-1).mean(0)).abs().max() > 100 * tolerance  # what a wrong seed would make
    for rows in (None, 1, 7, 13):
        ensemble = Ensemble(model, draws, max_rows=rows, dtype="float32", fuse=fuse)
        assert_is(ensemble.predict(x, seed), logits, tolerance)


@pytest.mark.parametrize("draws", [1, 2, 9])
@pytest.mark.parametrize("rows", [1, 2])
def test_few_draws_and_few_images(draws, rows, seed):
    model, x = NETS["residual"](), images(rows)
    with torch.no_grad():
        logits = sequential(model, x, draws, seed, image_offset=3)
    prediction = Ensemble(model, draws, dtype="float32").predict(x, seed, image_offset=3)
    assert_is(prediction, logits, rounding(model, logits))
    if draws == 1:
        # Both entropies are then of one softmax; they differ by the rounding of its float32 logarithm.
        assert (prediction.mutual_information <= 8 * np.log(CLASSES) * np.finfo(np.float32).eps).all()


@pytest.mark.parametrize("dtype", ["float32", "auto", torch.bfloat16, "float16"])
@pytest.mark.parametrize("fuse", [True, False])
def test_any_chunk_size_and_batch_split_gives_the_same(dtype, fuse, seed):
    model, x, draws = NETS["plain"](), images(5), 4
    ensemble = Ensemble(model, draws, dtype=dtype, fuse=fuse)
    with torch.no_grad():
        logits = sequential(model, x, draws, seed)
    narrow = torch.float32 if dtype == "float32" else torch.bfloat16  # the coarsest that auto and float16 may mean
    tolerance = rounding(model, logits, narrow)
    first = 2**32 - len(x)  # the last images there are
    whole = ensemble.predict(x, seed, first)
    top = whole.probs.topk(2, -1).values
    sure = top[:, 0] - top[:, 1] > tolerance
    for rows in (1, 3, 8, 1000):
        ensemble.max_rows = rows
        for cut in (0, 2):
            parts = [ensemble.predict(x[:cut], seed, first), ensemble.predict(x[cut:], seed, first + cut)]
            probs, labels = torch.cat([p.probs for p in parts]), torch.cat([p.labels for p in parts])
            assert (probs - whole.probs).abs().max() <= tolerance / 2
            assert torch.equal(labels[sure], whole.labels[sure])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fuse", [True, False])
def test_low_precision_is_near_float32(dtype, fuse, seed):
    model, x = NETS["residual"](), images()
    with torch.no_grad():
        logits = sequential(model, x, 5, seed)
    prediction = Ensemble(model, 5, dtype=dtype, fuse=fuse).predict(x, seed)
    assert_is(prediction, logits, 2 * rounding(model, logits, getattr(torch, dtype)))  # weights are rounded as well
    assert (prediction.probs - torch.from_numpy(statistics(logits)[0])).abs().max() > np.finfo(np.float32).eps


def test_fewer_draws_are_a_prefix_of_more(seed):
    model, x = NETS["residual"](), images()
    with torch.no_grad():
        tolerance = rounding(model, sequential(model, x, 1, seed))
    predictions = {draws: Ensemble(model, draws, dtype="float32", max_rows=8).predict(x, seed) for draws in (1, 2, 3, 7, 20)}
    for (few, by_few), (many, by_many) in itertools.pairwise(predictions.items()):
        votes = by_many.votes - by_few.votes
        assert (votes >= 0).all() and (votes.sum(-1) == many - few).all()
        sums = by_many.probs.double() * many - by_few.probs.double() * few  # of the draws that came to it
        assert (sums >= -many * tolerance).all() and (sums.sum(-1) - (many - few)).abs().max() <= many * tolerance


@pytest.mark.parametrize(("cls", "size"), [(VGG16, 32), (ResNeXt29, 8)])
def test_networks_of_the_paper(cls, size, seed):
    model = lively(rse_fast.convert(cls()), x=torch.rand(8, 3, size, size))
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        logits = sequential(model, x, 3, seed)
    ensemble = Ensemble(model, 3, dtype="float32", max_rows=4)
    assert_is(ensemble.predict(x, seed), logits, rounding(model, logits))
    assert ensemble.prepared(x).runner.packs_input is False


@pytest.mark.parametrize("fuse", [True, False])
def test_inputs_in_any_layout_and_float_dtype(fuse, seed):
    model, x = NETS["plain"](), images(4)
    ensemble = Ensemble(model, 3, dtype="float32", fuse=fuse)
    expected = ensemble.predict(x, seed)
    tolerance = rounding(model, expected.probs.log())
    wide = torch.rand(4, 3, 10, 20)
    wide[..., ::2] = x
    for other in (x.to(memory_format=torch.channels_last), wide[..., ::2], x.double(), x.clone().requires_grad_(), x.flip(0).flip(0)):
        found = ensemble.predict(other, seed)
        assert (found.probs - expected.probs).abs().max() <= tolerance and not found.probs.requires_grad


class InPlace(nn.Module):
    """Works on its input in place, as far as that may reach."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.sub_(0.5).mul_(2))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", ["plain", "bypass"])
def test_the_callers_images_are_left_alone(name, fuse, seed):
    inner = NETS[name]()
    model, x = InPlace(inner), images(3).to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        logits = sequential(inner, (x - 0.5) * 2, 4, seed)
    for rows in (None, 1):
        prediction = Ensemble(model, 4, max_rows=rows, dtype="float32", fuse=fuse).predict(x, seed)
        assert torch.equal(x, before)
        assert_is(prediction, logits, rounding(inner, logits))


class MakesFloat32(nn.Module):
    """What many a forward does: it leaves the dtype it was given on the way."""

    def __init__(self, model):
        super().__init__()
        self.model, self.mean = model, torch.full((3, 1, 1), 0.5)

    def forward(self, x):
        return self.model(x.float() * 2 - self.mean).float()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", ["plain", "noisy head", "not traceable", "branches"])
def test_forwards_that_make_float32_on_the_way_run_in_low_precision(name, fuse, seed):
    inner, x = NETS[name](), images()
    with torch.no_grad():
        logits = sequential(inner, x * 2 - 0.5, 4, seed)
    prediction = Ensemble(MakesFloat32(inner), 4, dtype="bfloat16", fuse=fuse).predict(x, seed)
    assert_is(prediction, logits, 2 * rounding(inner, logits, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_live_models_run_in_their_own_dtype(dtype, seed):
    model, x = NETS["plain"]().to(dtype), images()
    with torch.no_grad():
        logits = sequential(model, x.to(dtype), 4, seed)
    prediction = Ensemble(model, 4, dtype="float32", fuse=False).predict(x, seed)
    assert_is(prediction, logits.double(), rounding(model, logits, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32))
    assert next(model.parameters()).dtype == dtype


# -------------------------------------------------------------------------------------------------------------------- lazy packing
def count_rows(model, name):
    """How many rows of real data a module has been given, as a list of one number."""
    seen = []
    model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(len(args[0])) if args[0].device.type == "cpu" else None)
    return seen


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    ("name", "prefix", "packs_input"),
    [
        ("plain prefix", "0", False),
        ("branches", "prefix", False),
        ("late noise", "3", False),
        ("norm first", "0", False),
        ("bypass", "prefix", True),
    ],
)
def test_what_precedes_the_noise_runs_once_an_image(name, prefix, packs_input, fuse, seed):
    model, x, draws = NETS[name](), images(6), 4
    seen = count_rows(model, prefix)
    ensemble = Ensemble(model, draws, dtype="float32", fuse=fuse, max_rows=8)
    ensemble.predict(x, seed)
    seen.clear()  # of the probe batch that the fused model is checked on
    prediction = ensemble.predict(x, seed)
    assert ensemble.prepared(x).runner.packs_input is packs_input
    assert seen == [2 * draws if packs_input else 2] * 3
    with torch.no_grad():
        logits = sequential(model, x, draws, seed)
    assert_is(prediction, logits, rounding(model, logits))


# --------------------------------------------------------------------------------------------------------------------------- seeds
def test_no_seed_means_fresh_noise_and_says_which():
    model, x = NETS["plain"](), images()
    ensemble = Ensemble(model, 4, dtype="float32")
    first, second = ensemble.predict(x), ensemble.predict(x)
    assert first.seed != second.seed and 0 <= first.seed < 2**64
    assert not torch.equal(first.probs, second.probs)
    assert not torch.equal(ensemble(x), ensemble(x))
    again = ensemble.predict(x, seed=first.seed)
    assert again.seed == first.seed
    for name in ("labels", "probs", "entropy", "mutual_information", "votes", "draws_used"):
        assert torch.equal(getattr(again, name), getattr(first, name)), name


def test_seeds_are_taken_modulo_two_to_the_64(seed):
    model, x = NETS["plain"](), images()
    ensemble = Ensemble(model, 4, seed=seed - 2**64)
    prediction = ensemble.predict(x)
    assert prediction.seed == seed and torch.equal(prediction.probs, ensemble.predict(x).probs)
    assert torch.equal(prediction.probs, Ensemble(model, 4).predict(x, np.uint64(seed)).probs)
    assert not torch.equal(prediction.probs, ensemble.predict(x, seed ^ 2**63).probs)  # another seed for one call
    assert torch.equal(ensemble(x), ensemble(x))


def test_images_are_told_apart_by_their_index(seed):
    x = images(1).expand(3, -1, -1, -1)
    ensemble = Ensemble(NETS["plain"](), 4, seed=seed, dtype="float32")
    probs = ensemble.predict(x).probs
    assert (probs[0] != probs[1]).any() and (probs[1] != probs[2]).any()
    assert (probs[1:] - ensemble.predict(x[1:], image_offset=1).probs).abs().max() <= 1e-5 < (probs[0] - probs[1]).abs().max()


@pytest.mark.parametrize("fuse", [True, False])
def test_torchs_generator_is_neither_read_nor_changed(fuse, seed):
    model, x = NETS["plain"](), images()
    ensemble = Ensemble(model, 4, fuse=fuse)
    results = []
    for s in (1, 1, 2):
        torch.manual_seed(s)
        before = torch.get_rng_state()
        results.append(ensemble.predict(x, seed).probs)
        ensemble.predict(x)
        ensemble(x)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    torch.manual_seed(1)
    first = ensemble.predict(x).seed
    torch.manual_seed(1)
    assert ensemble.predict(x).seed != first


# ------------------------------------------------------------------------------------------------------------ forward, gradients
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("rows", [None, 3])
def test_forward_is_the_log_of_the_mean_softmax(fuse, rows, seed):
    model, x = NETS["residual"](), images()
    ensemble = Ensemble(model, 7, seed=seed, max_rows=rows, dtype="float32", fuse=fuse)
    logp, prediction = ensemble(x), ensemble.predict(x)
    assert logp.dtype == torch.float32 and logp.shape == (5, CLASSES)
    with torch.no_grad():
        tolerance = rounding(model, sequential(model, x, 7, seed))
    # The log of a mean moves no more than its logits, times two; and float32 holds it to a relative eps.
    expected = prediction.probs.double().log()
    assert (logp - expected).abs().max() <= 2 * tolerance + 4 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("rows", [None, 5, 1])
def test_gradient_is_that_of_the_whole_ensemble(fuse, rows, seed):
    model, x, draws = NETS["smooth"](), images(3).requires_grad_(), 6
    weights = torch.randn(3, CLASSES)

    def gradient(logp):
        return torch.autograd.grad((logp * weights.to(logp.dtype)).sum(), x)[0]

    def loop(model, x):
        return sequential(model, x, draws, seed).log_softmax(-1).logsumexp(0) - np.log(draws)

    exact = gradient(loop(copy.deepcopy(model).double(), x.double()))
    eager = gradient(loop(model, x))
    ensemble = Ensemble(model, draws, seed=seed, max_rows=rows, dtype="float32", fuse=fuse)
    got = gradient(ensemble(x))
    # There and back is twice the depth, relative to the largest gradient. float64 has noise of its own rounding: 1e-6 of it.
    with torch.no_grad():
        scale = sequential(model, x, 1, seed).abs().max()
    tolerance = 2 * (rounding(model, scale) / scale + 1e-6) * exact.abs().max()
    assert (eager - exact).abs().max() <= tolerance
    assert (got - exact).abs().max() <= tolerance
    assert (got - gradient(Ensemble(model, draws, seed=seed ^ 1, dtype="float32")(x))).abs().max() > 100 * tolerance
    assert got.dtype == x.dtype and exact.abs().max() > 0


def test_gradients_reach_the_parameters_of_a_live_model(seed):
    model, x = NETS["smooth"](), images(3)
    Ensemble(model, 3, seed=seed, fuse=False, dtype="float32")(x)[:, 0].sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (sequential(model, x, 3, seed).log_softmax(-1).logsumexp(0) - np.log(3))[:, 0].sum().backward()
    terms = x[0, 0].numel() * 9  # positions and images and draws that a weight's gradient runs over
    for name, p in model.named_parameters():
        largest = max(p.grad.abs().max(), got[name].abs().max())
        assert (got[name] - p.grad).abs().max() <= terms * torch.finfo(torch.float32).eps * max(largest, 1), name


def test_a_snapshot_taken_without_gradients_serves_gradients(seed):
    ensemble, x = Ensemble(NETS["smooth"](), 3, seed=seed), images(2)
    with torch.inference_mode():
        expected = ensemble.predict(x).probs
    x.requires_grad_()
    logp = ensemble(x)
    logp[:, 0].sum().backward()
    assert x.grad.abs().max() > 0
    assert (logp.exp() - expected).abs().max() <= rounding(ensemble.model, logp, torch.bfloat16)


def test_an_autocast_around_the_ensemble_changes_nothing(seed):
    model, x = NETS["plain"](), images()
    for fuse in (True, False):
        ensemble = Ensemble(model, 3, seed=seed, dtype="float32", fuse=fuse)
        expected = ensemble.predict(x).probs
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ensemble.predict(x).probs, expected)


# ------------------------------------------------------------------------------------------------------------------------- empty
@pytest.mark.parametrize("fuse", [True, False])
def test_empty_batches_give_empty_results(fuse, seed):
    ensemble = Ensemble(NETS["plain"](), 4, fuse=fuse)
    for _ in range(2):  # before and after the model is known
        found = ensemble.predict(images(0), seed)
        shapes = {name: tuple(t.shape) for name, t in vars(found).items() if isinstance(t, torch.Tensor)}
        assert shapes == {
            "labels": (0,), "probs": (0, CLASSES), "entropy": (0,), "mutual_information": (0,), "votes": (0, CLASSES), "draws_used": (0,),
        }  # fmt: skip
        assert found.labels.dtype == found.votes.dtype == torch.int64 and found.probs.dtype == torch.float32 and found.seed == seed
        assert ensemble(images(0)).shape == (0, CLASSES)
        ensemble.predict(images(2))


# ---------------------------------------------------------------------------------------------------------------------- bad input
class Returns(nn.Module):
    """Runs a noisy layer and returns something else than logits."""

    def __init__(self, change, noisy=True):
        super().__init__()
        self.conv = rse_fast.nn.NoisyConv2d(3, 4, 3)
        self.change, self.noisy = change, noisy

    def forward(self, x):
        return self.change(self.conv(x) if self.noisy else x.mean((2, 3)))


ARGUMENTS = {
    "model": (dict(model="VGG16"), TypeError, "model.*str"),
    "plain model": (dict(model=nn.Sequential(nn.Conv2d(3, 4, 3))), ValueError, "model.*none.*convert"),
    "draws 0": (dict(draws=0), ValueError, "draws.*0"),
    "draws negative": (dict(draws=-3), ValueError, "draws.*-3"),
    "draws bool": (dict(draws=True), TypeError, "draws.*bool"),
    "draws float": (dict(draws=3.0), TypeError, "draws.*float"),
    "draws None": (dict(draws=None), TypeError, "draws.*NoneType"),
    "max_rows 0": (dict(max_rows=0), ValueError, "max_rows.*0"),
    "max_rows text": (dict(max_rows="80"), TypeError, "max_rows.*str"),
    "seed float": (dict(seed=1.5), TypeError, "seed.*float"),
    "seed bool": (dict(seed=False), TypeError, "seed.*bool"),
    "dtype unknown": (dict(dtype="float8"), ValueError, "dtype.*float8"),
    "dtype float64": (dict(dtype=torch.float64), ValueError, "dtype.*float64"),
    "dtype list": (dict(dtype=["auto"]), ValueError, "dtype.*auto"),
    "backend": (dict(backend="mkl"), ValueError, "backend.*mkl"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments_are_named(name):
    arguments, error, message = ARGUMENTS[name]
    with pytest.raises(error, match=message):
        Ensemble(**{"model": Returns(nn.Flatten()), **arguments})


INPUTS = {
    "list of lists": (lambda e: e.predict([[0.0, 1.0]]), TypeError, "x must be a tensor.*list"),
    "bytes": (lambda e: e.predict(torch.zeros(2, 3, 10, 10, dtype=torch.uint8)), TypeError, "x must be a floating-point.*uint8"),
    "integers": (lambda e: e(torch.zeros(2, 3, 10, 10, dtype=torch.int64)), TypeError, "x must be a floating-point.*int64"),
    "nested": (lambda e: e(torch.nested.nested_tensor([torch.ones(3)])), TypeError, "x must be a dense tensor, got a nested one"),
    "vector": (lambda e: e.predict(torch.zeros(3)), ValueError, r"x must be a batch.*\(3,\)"),
    "seed": (lambda e: e.predict(images(2), seed="7"), TypeError, "seed.*str"),
    "image_offset float": (lambda e: e.predict(images(2), image_offset=1.0), TypeError, "image_offset.*float"),
    "image_offset bool": (lambda e: e.predict(images(2), image_offset=True), TypeError, "image_offset.*bool"),
    "image_offset negative": (lambda e: e.predict(images(2), image_offset=-1), ValueError, "image_offset.*-1"),
    "image_offset too large": (lambda e: e.predict(images(2), image_offset=2**32 - 1), ValueError, "image_offset.*2\\^32"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_bad_inputs_are_named(name):
    call, error, message = INPUTS[name]
    with pytest.raises(error, match=message):
        call(Ensemble(NETS["plain"](), 3))


MODELS = {
    "a sequence": (Returns(lambda y: y.flatten(2)), r"logits \[N, K\].* for N = 6 rows, got shape \(6, 4, 64\)"),
    "one number a row": (Returns(lambda y: y.mean((1, 2, 3))), "two classes or more, got a number for each row"),
    "one row": (Returns(lambda y: y.mean((0, 2, 3))[None]), r"logits \[N, K\].* for N = 6 rows, got shape \(1, 4\)"),
    "one logit": (Returns(lambda y: y.mean((1, 2, 3))[:, None]), "two classes or more, got one logit"),
    "no logit": (Returns(lambda y: y.mean((2, 3))[:, :0]), r"logits \[N, K\].* for N = 6 rows, got shape \(6, 0\)"),
    "a dict": (Returns(lambda y: {"a": y, "b": y}), "logits.*got dict"),
    "no noise called": (Returns(lambda y: y, noisy=False), "call a noisy layer"),
    "rows merged": (
        nn.Sequential(nn.Flatten(0, 1), nn.Unflatten(1, (1, 10)), rse_fast.nn.GaussianNoise(0.1), nn.Flatten()),
        r"logits \[N, K\].* for N = 6 rows, got shape \(18, 100\)",
    ),
}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_give_no_logits_are_told(name, fuse):
    model, message = MODELS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        Ensemble(model, 3, fuse=fuse, dtype="float32").predict(images(2))


class TakesRowsForImages(nn.Module):
    """Behind the first noise it shapes by the number of images that came in, which a packed batch is a multiple of."""

    def __init__(self):
        super().__init__()
        self.conv, self.then, self.head = nn.Conv2d(3, 8, 3), nn.Conv1d(8, 16, 3), nn.Linear(16, CLASSES)

    def forward(self, x):
        h = self.conv(x).relu().reshape(x.shape[0], 8, -1)
        return self.head(self.then(h).relu().mean(-1))


class Views(nn.Module):
    """x.view(N, -1) of a map, which is possible where it is contiguous."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(96, CLASSES)

    def forward(self, x):
        return self.head(nn.functional.max_pool2d(self.conv(x).relu(), 2).view(-1, 96))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(("net", "packs_input"), [(TakesRowsForImages, True), (Views, False)])
def test_forwards_that_count_their_rows(net, packs_input, fuse, seed):
    model, x = lively(rse_fast.convert(net())), images()
    with torch.no_grad():
        logits = sequential(model, x, 6, seed)
    ensemble = Ensemble(model, 6, dtype="float32", fuse=fuse, max_rows=12)
    assert_is(ensemble.predict(x, seed), logits, rounding(model, logits))
    assert ensemble.prepared(x).runner.packs_input is packs_input
    asks = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(ensemble(asks)[0, 0], asks)
    assert found[0].any() and not found[1:].any()  # of one image, whatever lies beside it


@pytest.mark.parametrize("fuse", [True, False])
def test_an_ensemble_of_a_part_leaves_the_whole_as_it_was(fuse, seed):
    model, x = NETS["plain"](), images()
    ensemble = Ensemble(model, 4, seed=seed, fuse=fuse, dtype="float32")
    before = ensemble.predict(x).probs
    last = [layer for layer in rse_fast.nn.noise_layers(model).values()][-1]
    Ensemble(nn.Sequential(last), 2)
    assert last.stream == 0
    ensemble.refresh()
    assert torch.equal(ensemble.predict(x).probs, before)


def test_a_parameter_that_was_replaced_is_noticed_wherever_the_new_one_lies(seed):
    model, x = NETS["plain"](), images(2)
    layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    ensemble = Ensemble(model, 2, seed=seed, dtype="float32")
    seen = []
    for _ in range(20):
        for _ in range(2):  # the second may come to lie where the one before the first did
            layer.weight = nn.Parameter(torch.randn_like(layer.weight))
        seen.append(ensemble.predict(x).probs)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("early_exit", [None, "exact"])
@pytest.mark.parametrize("image_offset", [-1, 2**32 - 1])
def test_indices_beyond_32_bits_are_refused(image_offset, early_exit):
    ensemble = Ensemble(NETS["plain"](), 3, early_exit=early_exit)
    with pytest.raises(ValueError, match=rf"image_offset must be in \[0, 2\^32 - 2\], got {image_offset}"):
        ensemble.predict(images(2), image_offset=image_offset)
    with pytest.raises(ValueError, match="draws must be at least 1 and at most 2\\^32"):
        Ensemble(NETS["plain"](), 2**32 + 1)


def test_the_gradient_of_no_images_is_there():
    x = images(0).requires_grad_()
    Ensemble(NETS["plain"](), 3)(x).sum().backward()
    assert x.grad.shape == x.shape


def test_what_cannot_be_copied_says_what_to_do():
    model = NETS["plain"]()
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match="model cannot be copied.*fuse=False"):
        Ensemble(model, 2).predict(images(1))
    assert Ensemble(model, 2, fuse=False).predict(images(1)).labels.shape == (1,)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("of_images", DEVICES)
@pytest.mark.parametrize("of_model", DEVICES)
def test_results_are_on_the_device_of_the_images(of_model, of_images, seed):
    ensemble = Ensemble(NETS["plain"]().to(of_model), 4, seed=seed)
    x = images().to(of_images)
    results = [ensemble.predict(x), *ensemble.stream([x, x])]
    if importlib.util.find_spec("scipy"):
        results.append(rse_fast.certify(ensemble, x, n0=5, n=30))
    tensors = [value for result in results for value in vars(result).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 18 and {t.device.type for t in tensors} == {of_images}
