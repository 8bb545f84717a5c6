"""Logits that are infinite or not numbers: value and gradient of infinite ones are limits, and NaN is no class's vote."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from small_nets import NETS
from torch import nn
from torch.nn.functional import cross_entropy

import rse_fast
from rse_fast import Ensemble
from rse_fast.ensemble import convolution
from rse_fast.ensemble.softmax import LogSumOfDraws, log_softmax, votes

pytestmark = pytest.mark.usefixtures("one_thread")
LARGE = 1e9  # stands for infinity in the float64 reference, which keeps 1e-7 beside it


def reference(logits, upstream):
    """Value and gradient of the log-sum over draws in float64, infinite logits being +-LARGE."""
    z = logits.double().clamp(-LARGE, LARGE).requires_grad_()
    value = z.log_softmax(-1).logsumexp(0)
    return value.detach(), torch.autograd.grad(value, z, upstream.double())[0]


def infinite_at(shape, rng, share, value):
    z = 4 * torch.randn(shape)
    return z.masked_fill(torch.rand(shape) < share, value)


def some_of_each(draws, images, classes, rng):
    z = infinite_at((draws, images, classes), rng, 0.3, -math.inf)
    z[:, 0, 1] = -math.inf  # in every draw
    z[:, 1] = 2.5  # finite and equal
    z[0, 2, 0] = -math.inf  # in one draw
    z[1:, 2] = torch.randn(classes)
    z[:, 3] = infinite_at((draws, classes), rng, 0.3, math.inf)
    z[:, 4] = math.inf
    z[0, 5] = -math.inf  # all classes of one draw
    z[:, 6, 0], z[:, 6, 1] = math.inf, math.inf  # equally large in every draw: the others vanish everywhere, each at its own level
    z[:, 6, 2:] = torch.randn(draws, classes - 2)
    return z


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinite_logits_are_limits(dtype, rng):
    draws, images, classes = 7, 9, 5
    z, upstream = some_of_each(draws, images, classes, rng).to(dtype), torch.randn(images, classes)
    value, gradient = reference(z, upstream)
    for cuts in ([7], [3, 4], [1] * 7, [6, 1]):
        own = z.clone().requires_grad_()
        first, *others = own.float().split(cuts)
        total = LogSumOfDraws(first)
        for part in others:
            total.add(part)
        got = total.value()
        got_gradient = torch.autograd.grad(got, own, upstream)[0]
        assert torch.equal(got == -math.inf, value < -LARGE / 2)
        seen = value >= -LARGE / 2
        # Sums of 35 terms of float32, and one rounding of the gradient to the dtype of the logits.
        limit = 35 * torch.finfo(torch.float32).eps * (1 + value[seen].abs().max())
        assert (got[seen].double() - value[seen]).abs().max() <= limit
        limit = torch.finfo(dtype).eps + 35 * torch.finfo(torch.float32).eps + 1e-6
        assert (got_gradient.double() - gradient).abs().max() <= limit * upstream.abs().sum().item()


def test_transforms_and_second_derivatives_see_the_limit(rng):
    z = some_of_each(3, 9, 5, rng).double()

    def own(z):
        return LogSumOfDraws(z).value().clamp_min(-20)

    def plain(z):
        return z.log_softmax(-1).logsumexp(0).clamp_min(-20)

    finite = torch.randn(3, 9, 5).double()
    assert torch.autograd.gradgradcheck(own, finite[:, :2].requires_grad_())
    jacobian, expected = torch.func.jacrev(own)(z), torch.func.jacrev(plain)(z.clamp(-LARGE, LARGE))
    assert (jacobian - expected).abs().max() <= 1e-6
    tangent = torch.randn_like(finite)
    assert (torch.func.jvp(own, (finite,), (tangent,))[1] - torch.func.jvp(plain, (finite,), (tangent,))[1]).abs().max() <= 1e-9


def test_nan_stays_nan_and_has_no_vote(rng):
    z = some_of_each(4, 9, 5, rng)
    z[2, 3, 1] = z[0, 0, 0] = math.nan
    p = log_softmax(z).exp()
    broken = torch.zeros(4, 9, dtype=torch.bool)
    broken[2, 3] = broken[0, 0] = True
    assert torch.equal(p.isnan(), broken[..., None].expand_as(p))
    assert (p.sum(-1)[~broken] - 1).abs().max() < 1e-5
    assert torch.equal(votes(z).sum(-1), (~broken).long())
    assert torch.equal(LogSumOfDraws(z).value().isnan().all(-1), broken.any(0))


# ------------------------------------------------------------------------------------------------------------------------ ensembles
class Head(nn.Module):
    """A small network whose logits pass through ``change``."""

    def __init__(self, change):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        self.change = change

    def forward(self, x):
        return self.change(self.net(x))


def masked(value):
    return lambda z: z + torch.tensor([0.0, 0.0, 0.0, value], dtype=z.dtype)


def build(change, seed, gain=1.0):
    torch.manual_seed(seed)
    model = Head(change)
    model.net[-1].weight.data.mul_(gain)
    return rse_fast.convert(model.eval(), 0.3, 0.2)


def attack_gradient(model, x, y, **options):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(cross_entropy(Ensemble(model, seed=5, **options)(x), y), x)[0]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("draws, max_rows", [(1, None), (4, None), (4, 2), (13, 3)])
def test_masked_classes_leave_the_gradient_as_it_is(fuse, draws, max_rows, rng):
    number, x, y = int(rng.integers(2**31)), torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2])
    found, expected = (
        attack_gradient(build(masked(value), number), x, y, draws=draws, max_rows=max_rows, fuse=fuse, dtype="float32")
        for value in (-math.inf, -1e4)
    )
    assert expected.norm() > 0 and (found - expected).norm() <= 1e-5 * expected.norm()


def keep_two(z):
    return torch.where(z >= z.topk(2, -1).values[:, -1:], z, -math.inf)


@pytest.mark.filterwarnings("ignore:rse-fast. the model runs unfused:RuntimeWarning")
def test_masks_that_differ_from_draw_to_draw(rng):
    """The two largest logits stay, which two depends on the noise."""
    number, x = int(rng.integers(2**31)), torch.rand(3, 3, 8, 8)
    y = build(keep_two, number)(x).argmax(-1)
    found = attack_gradient(build(keep_two, number, 20), x, y, draws=6, max_rows=5, dtype="float32")
    large = lambda z: torch.where(z >= z.topk(2, -1).values[:, -1:], z, torch.full_like(z, -200.0))  # noqa: E731
    expected = attack_gradient(build(large, number, 20), x, y, draws=6, dtype="float32")
    assert found.isfinite().all() and (found - expected).norm() <= 1e-4 * expected.norm()


class Rare(nn.Module):
    """Class 1 in every draw; where the noise is low, class 0 is NaN."""

    def __init__(self, below=-0.16):
        super().__init__()
        self.conv, self.below = nn.Conv2d(1, 1, 1, bias=False), below
        self.conv.weight.data.fill_(1.0)

    def forward(self, x):
        v = self.conv(x).mean((1, 2, 3))
        return torch.stack([(v - self.below).sqrt() * 0, torch.full_like(v, 5.0), torch.zeros_like(v)], 1)


def quiet():
    return warnings.catch_warnings()


@pytest.mark.parametrize("early_exit", [None, "exact", 0.999])
@pytest.mark.parametrize("fuse", [True, False])
def test_one_nan_draw_makes_the_label_unknown(early_exit, fuse, rng):
    model, x = rse_fast.convert(Rare().eval()), torch.zeros(40, 1, 2, 2)
    ensemble = Ensemble(model, 20, seed=int(rng.integers(2**63)), fuse=fuse, dtype="float32")
    with pytest.warns(RuntimeWarning, match=r"NaN for \d+ of 40 images"):
        full = ensemble.predict(x)
    failed = full.votes.sum(-1) < 20
    assert 0 < failed.sum() < 40 and torch.equal(full.labels, torch.where(failed, -1, 1))
    assert torch.equal(full.votes[:, 1], full.votes.sum(-1)) and torch.equal(full.probs.isnan().all(-1), failed)
    ensemble.early_exit = early_exit
    with quiet():
        warnings.simplefilter("ignore")
        parts = [ensemble.predict(x), *ensemble.stream(iter(x.split([7, 20, 13])))]
    early, streamed = parts[0], torch.cat([p.labels for p in parts[1:]])
    assert set(streamed.tolist()) <= {1, -1}
    for part in parts:
        assert torch.equal(part.labels == -1, part.probs.isnan().any(-1)) and not part.votes[:, [0, 2]].any()
        assert torch.equal(part.labels == -1, part.votes.sum(-1) < part.draws_used)
    assert early_exit or torch.equal(early.labels, full.labels)
    # Whatever is stopped early had no NaN until then.
    assert (early.labels[~failed] == 1).all() and (early.draws_used[early.labels == -1] == 20).all()


def test_nan_may_be_an_error(rng):
    model = rse_fast.convert(Rare(math.inf).eval())
    with quiet(), pytest.raises(RuntimeWarning, match="NaN for 2 of 2 images"):
        warnings.simplefilter("error", RuntimeWarning)
        Ensemble(model, 3).predict(torch.zeros(2, 1, 2, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_broken_pixel_breaks_its_image_alone(value, rng):
    model, x = build(masked(0.0), int(rng.integers(2**31))), torch.rand(3, 3, 8, 8)
    x[1, 2, 3, 3] = value
    with pytest.warns(RuntimeWarning, match="NaN for 1 of 3 images"):
        got = Ensemble(model, 5).predict(x)
    assert (got.labels == -1).tolist() == [False, True, False]
    assert got.votes.sum(-1).tolist() == [5, 0, 5] and got.entropy.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["plain", "residual", "bypass", "shared"])
@pytest.mark.parametrize("dtype, algorithm", [("float32", "winograd"), *itertools.product(["float32", "bfloat16"], ["auto", "direct"])])
def test_nan_passes_every_layer_of_a_snapshot(name, dtype, algorithm, rng):
    """The vendor's convolution with a ReLU behind it would make 0 of NaN."""
    x = torch.from_numpy(rng.random((3, 3, 10, 10), np.float32))
    x[1, :, 4, 4] = math.nan
    with pytest.warns(RuntimeWarning, match="NaN for 1 of 3 images"):
        got = Ensemble(NETS[name](), 3, dtype=dtype, algorithm=algorithm).predict(x)
    assert (got.labels == -1).tolist() == [False, True, False]


def test_certify_counts_nan_against_every_class(rng):
    always, sometimes = (rse_fast.convert(Rare(below).eval(), 0.2) for below in (math.inf, -0.1))
    x = torch.zeros(4, 1, 2, 2)
    broken = rse_fast.certify(Ensemble(always, 5), x, n0=20, n=200)
    assert (broken.labels == -1).all() and not broken.radius.any() and not broken.votes.any() and (broken.selected == -1).all()
    some = rse_fast.certify(Ensemble(sometimes, 5), x, n0=20, n=500)
    assert (some.labels == 1).all() and (some.votes[:, 1] < 500).all() and not some.votes[:, [0, 2]].any()
    lower, _ = rse_fast.confidence.clopper_pearson(np.asarray(some.votes[:, 1]), 500, 1e-3)
    assert np.allclose(some.p_lower, lower)


class Standardised(nn.Module):
    """Takes each image's own mean and deviation away: 0 / 0 for an image of one colour, in front of the first bytes or behind them."""

    def __init__(self, first):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), first
        self.rest = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))

    def forward(self, x):
        flat = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
        return self.rest(self.stem(flat)) if self.first else self.rest(self.stem(x) + 0 * flat.mean((1, 2, 3), keepdim=True))


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@pytest.mark.parametrize("early_exit", [None, "exact"])
@pytest.mark.parametrize("first", [True, False])
def test_int8_knows_nan(first, early_exit, algorithm, rng):
    """Bytes have no NaN, and the largest byte for an infinite pixel."""
    if algorithm == "winograd" and not convolution.byte_forms():
        pytest.skip("a processor without AVX-512 VNNI")
    torch.manual_seed(int(rng.integers(2**31)))
    model = rse_fast.convert(Standardised(first).eval(), 0.5, 0.5)
    x = torch.rand(6, 3, 8, 8)
    ensemble = Ensemble(model, 20, dtype="int8", calibration=torch.rand(16, 3, 8, 8), early_exit=early_exit, algorithm=algorithm)
    assert ensemble.quantization.quantized
    x[1, 0, 2, 3], x[2, 1, 0, 0], x[4] = math.nan, math.inf, 0.25
    with pytest.warns(RuntimeWarning, match="NaN for 3 of 6 images"):
        got = ensemble.predict(x)
    assert (got.labels == -1).tolist() == [False, True, True, False, True, False]
    assert torch.equal(got.votes.sum(-1), torch.where(got.labels == -1, 0, got.draws_used))


class MaskedNet(nn.Module):
    """``how`` acts on what the convolution gives; the last of the 4 classes is ``mask``."""

    def __init__(self, how, mask):
        super().__init__()
        self.conv, self.head, self.how, self.mask = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), how, mask

    def forward(self, x):
        x = self.head(self.how(self.conv(x)).mean((2, 3)))
        return torch.cat([x[:, :3], torch.full_like(x[:, 3:], self.mask)], 1)


@pytest.mark.parametrize("mask", [-math.inf, -1e4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_masked_class_does_not_hide_that_a_snapshot_is_another_model(mask, dtype, rng):
    torch.manual_seed(int(rng.integers(2**31)))
    model = rse_fast.convert(MaskedNet(torch.relu, mask).eval())
    model.conv.forward = lambda x: nn.functional.conv2d(x, 2 * model.conv.weight)  # noiseless, and no graph sees it
    with pytest.warns(RuntimeWarning, match="fused, it gives other results"), pytest.raises(ValueError, match="a pass without any"):
        Ensemble(model, 3, dtype=dtype).predict(torch.rand(2, 3, 8, 8))
