"""Certification: early stop, radii against a closed form and against the procedure of Cohen et al."""

import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from small_nets import NETS, sequential
from torch import nn

import rse_fast
from rse_fast import Ensemble, functional
from rse_fast.confidence import clopper_pearson, image_uniforms, randomised_clopper_pearson, schedule
from rse_fast.nn import GaussianNoise, number_layers
from rse_fast.smoothing import _votes, grid_step, on_grid

pytestmark = pytest.mark.usefixtures("one_thread")
SIGMA = 0.25


def most(trials, probability):
    """What a binomial count exceeds once in a million runs."""
    return scipy.stats.binom.isf(1e-6, trials, probability)


# ------------------------------------------------------------------------------------------------------------- closed form
class Linear(nn.Module):
    """Two classes, ``w x + b`` against 0 for x [N, d]; with inner noise ``tau`` on the score."""

    def __init__(self, d, sigma, tau=0.0):
        super().__init__()
        self.input, self.linear, self.score = GaussianNoise(sigma), nn.Linear(d, 1), GaussianNoise(tau)
        self.tau = tau

    def forward(self, x):
        score = self.score(self.linear(self.input(x)))
        return torch.cat([-score, score], 1)

    def truth(self, x):
        """Of images x: the label, its share of the votes, and the distance to the boundary of the smoothed classifier."""
        w = self.linear.weight.double()[0]
        score = x.double() @ w + self.linear.bias.double()
        spread = torch.sqrt((self.input.sigma.double() * w.norm()) ** 2 + self.tau**2)
        return (score > 0).long(), torch.special.ndtr(score.abs() / spread), score.abs() / w.norm()


@pytest.mark.parametrize("tau", (0.0, 0.4), ids=("no inner noise", "inner noise"))
@pytest.mark.parametrize("radii", (None, [0.1, 0.3]), ids=("fixed", "early stop"))
def test_a_linear_classifier_is_certified_within_its_exact_radius(tau, radii, rng):
    model = Linear(12, SIGMA, tau)
    with torch.no_grad():
        model.linear.weight.copy_(torch.randn(1, 12))
        model.linear.bias.copy_(-model.linear.weight.sum(1) / 2)
        x = torch.rand(200, 12)
        label, share, exact = model.truth(x)
    n, alpha = 400, 0.05
    out = rse_fast.certify(Ensemble(model, max_rows=8192), x, n0=30, n=n, alpha=alpha, radii=radii)
    assert out.votes.sum(1).tolist() == out.draws.tolist() and (out.draws <= n).all()
    known = out.labels >= 0
    wrong = (known & ((out.labels != label) | (out.p_lower > share))).sum()  # then the radius is too large as well: see below
    assert wrong <= most(200, alpha)
    assert ((out.radius > exact) & (out.p_lower <= share) & known & (out.labels == label)).sum() == 0
    if radii is None and not tau:  # and no weaker than five standard deviations of a share and of its bound
        share = share.clamp(1e-3, 1 - 1e-3)
        weakest = share - 2 * 5 * (share * (1 - share) / n).sqrt() - 5 / n
        assert (out.p_lower >= weakest)[out.labels == label].all()


# ------------------------------------------------------------------------------------- the procedure of Cohen et al. on the same votes
def cohen(selection, estimation, sigma, alpha):
    """CERTIFY of Cohen, Rosenfeld, Kolter (ICML 2019), from its description: guess the class from n0 votes, bound its probability from
    n fresh ones, and return it with radius sigma * Phi^-1(bound) if the bound exceeds 1/2."""
    top = int(np.argmax(selection))
    count, n = int(estimation[top]), int(sum(estimation))
    bound = scipy.stats.beta.ppf(alpha, count, n - count + 1) if count else 0.0
    return (-1, 0.0) if bound < 0.5 else (top, sigma * scipy.stats.norm.ppf(bound))


@pytest.mark.parametrize("fuse", (True, False))
def test_votes_are_the_ensembles_and_the_result_is_that_of_cohen_et_al(fuse, rng):
    model = NETS["residual"]()
    ensemble = Ensemble(model, draws=150, dtype="float32", fuse=fuse)
    x, seed = torch.rand(5, 3, 10, 10), int(rng.integers(2**63))
    out = rse_fast.certify(ensemble, x, n0=40, n=110, alpha=0.01, seed=seed, image_offset=3)
    logits = sequential(model, x, 150, seed, image_offset=3)  # draw by draw, with the layer's own noise
    tops = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
    selection, estimation = tops[:40].sum(0), tops[40:].sum(0)
    # Where the two highest logits are closer than rounding, a vote may go either way.
    assert (out.votes - estimation).abs().sum(1).max() <= 4
    assert (ensemble.predict(x, seed=seed, image_offset=3).votes - selection - out.votes).abs().sum(1).max() <= 4
    sigma = out.sigma
    assert sigma == pytest.approx(float(model[0].sigma), rel=0) and out.seed == seed
    for i in range(5):
        label, radius = cohen(selection[i].tolist(), out.votes[i].tolist(), sigma, 0.01)
        assert out.labels[i] == label and radius - out.radius[i] <= math.sqrt(300) * grid_step(sigma) + 1e-12
        assert out.radius[i] <= radius


# ------------------------------------------------------------------------------------------------------------------ draws and seeds
def test_selection_and_estimation_use_disjoint_draws_and_parts_make_the_whole(rng):
    model = NETS["plain"]()
    x, seed = torch.rand(4, 3, 10, 10), 5
    ensemble = Ensemble(model, dtype="float32", max_rows=37)
    whole = rse_fast.certify(ensemble, x, n0=20, n=50, seed=seed)
    for i in range(4):
        part = rse_fast.certify(ensemble, x[i : i + 1], n0=20, n=50, seed=seed, image_offset=i)
        assert torch.equal(part.votes[0], whole.votes[i]) and part.radius[0] == whole.radius[i]
    shifted = rse_fast.certify(ensemble, x, n0=10, n=60, seed=seed)  # draws 10 .. 69: those of 10 .. 19 on top
    between = shifted.votes - whole.votes
    assert (between >= 0).all() and (between.sum(1) == 10).all()
    assert not torch.equal(rse_fast.certify(ensemble, x, n0=20, n=50).votes, whole.votes)  # fresh entropy


def test_early_stop_takes_the_first_draws_of_the_full_run(rng):
    ensemble = Ensemble(NETS["plain"](), dtype="float32")
    x = torch.rand(6, 3, 10, 10)
    out = rse_fast.certify(ensemble, x, n=400, seed=9, radii=0.1)
    for count in set(out.draws.tolist()):
        whole = rse_fast.certify(ensemble, x, n=count, seed=9)
        assert torch.equal(out.votes[out.draws == count], whole.votes[out.draws == count])


def test_a_tolerance_saves_draws_and_costs_no_more_than_it_says(rng):
    model = Linear(12, SIGMA)
    x = torch.rand(40, 12)
    ensemble, seed = Ensemble(model, max_rows=8192), int(rng.integers(2**63))
    whole, none = (rse_fast.certify(ensemble, x, n=3000, seed=seed, tolerance=t) for t in (None, 0.0))
    some = rse_fast.certify(ensemble, x, n=3000, seed=seed, tolerance=0.2 * SIGMA)
    sure = whole.p_lower > 0.6  # others go on in the hope of a radius
    assert (whole.draws == 3000).all() and (none.draws >= some.draws).all() and sure.sum() > 10
    assert (some.draws[sure] <= 0.65 * 3000).all() and (some.draws >= 50).all()  # the look at 1920 decides even where all votes agree
    # What it says: if the rest of the draws were as those so far, they would enlarge the radius by the tolerance at most.
    count, taken = some.votes.gather(1, some.selected[:, None])[:, 0].numpy(), some.draws.numpy()
    forecast, _ = clopper_pearson(count + (3000 - taken) * count / taken, 3000, schedule(3000, 1e-3, True)[-1][1])
    stopped = (taken < 3000) & (some.p_lower.numpy() >= 0.5)
    assert stopped.sum() > 10 and (scipy.stats.norm.ppf(forecast) - scipy.stats.norm.ppf(some.p_lower.numpy()) <= 0.2 + 1e-6)[stopped].all()


def test_the_randomised_bound_comes_from_the_votes_and_the_seed(rng):
    ensemble, seed = Ensemble(NETS["plain"](), dtype="float32"), int(rng.integers(2**63))
    x = torch.rand(6, 3, 10, 10)
    plain, larger = (
        rse_fast.certify(ensemble, x, n0=20, n=80, seed=seed, bound=bound, image_offset=7) for bound in ("clopper-pearson", "randomised")
    )
    assert torch.equal(plain.votes, larger.votes) and (plain.bound, larger.bound) == ("clopper-pearson", "randomised")
    count = larger.votes.gather(1, larger.selected[:, None])[:, 0].numpy()
    expected = randomised_clopper_pearson(count, 80, 1e-3, image_uniforms(seed, np.arange(7, 13)))
    assert larger.p_lower.tolist() == expected.tolist() and (larger.p_lower > plain.p_lower).all()
    part = rse_fast.certify(ensemble, x[2:4], n0=20, n=80, seed=seed, bound="randomised", image_offset=9)
    assert torch.equal(part.radius, larger.radius[2:4])


def test_the_input_noise_is_a_fixed_grid_away_from_the_image(rng):
    """The law of (what the network sees) - (the rounded image) must not depend on the image: the very same numbers for every image."""
    seen = []

    class Look(nn.Module):
        def __init__(self):
            super().__init__()
            self.noise = GaussianNoise(0.3)

        def forward(self, x):
            seen.append(self.noise(x).double())
            return x[:, :2].flatten(1)[:, :2] * 0 + seen[-1].flatten(1)[:, :2].float()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not to be certified: it reads the image beside the noise
        model = Look()
        number_layers(model)
        ensemble, step = Ensemble(model, fuse=False, dtype="float32"), grid_step(float(model.noise.sigma))
        images = torch.cat([torch.rand(2, 3, 4, 4), torch.full((1, 3, 4, 4), 1e-9), torch.randn(1, 3, 4, 4) * 100])
        noises = []
        for image in images:
            seen.clear()
            _votes(ensemble, model.noise, image[None], torch.tensor([0]), 0, 5, 3)
            noisy = torch.cat([s for s in seen if len(s) > 1 and s.device.type == "cpu"])
            clean = (image.double() / step + 0.5).floor() * step
            noises.append((noisy[-5:] - clean) / step)  # behind what prepares the model
    expected = functional.add_noise(torch.zeros(1, 3, 4, 4), model.noise.sigma, seed=3, images=1, draws=5).double() / step
    for noise in noises[:3]:  # below 16 steps of 2^-24 a float32 holds the exact sum
        assert torch.equal(noise, (expected + 0.5).floor())
    assert (noises[3] - expected.round()).abs().max() <= 500 * 2.0**-24 / step  # the one rounding of the sum


def test_low_precision_is_part_of_the_network(rng):
    model = Linear(8, SIGMA)
    x = torch.rand(50, 8)
    with torch.no_grad():
        label, share, exact = model.truth(x)
    out = rse_fast.certify(Ensemble(model, dtype="bfloat16", max_rows=8192), x, n=300, alpha=0.01)
    known = out.labels >= 0
    # A bfloat16 classifier is another one: its boundary is off by the rounding of 8 products and a bias, relative to |w|.
    slack = (8 + 1) * 2.0**-8 * (1 + 4 * SIGMA) * (model.linear.weight.abs().sum() + 1) / model.linear.weight.norm()
    assert (out.radius[known] <= exact[known] + slack).float().mean() > 0.9


@pytest.mark.parametrize("sigma", [0.12, 0.2, 0.25])
def test_no_multiple_of_the_step_is_likelier_than_its_neighbours(sigma, rng):
    """Or the last bits of the sum would tell an image from another one a step beside it (Voracek & Hein 2023)."""
    step = grid_step(sigma)
    noise = functional.add_noise(torch.zeros(1, 3, 600, 600), sigma, seed=int(rng.integers(2**63)))
    last_bits = torch.bincount(on_grid(noise, step).long().flatten() % 4, minlength=4)
    assert scipy.stats.chisquare(last_bits.numpy()).pvalue > 1e-6
    halves_to_even = torch.bincount((noise.double() / step).round().long().flatten() % 2, minlength=2)
    assert scipy.stats.chisquare(halves_to_even.numpy()).pvalue < 1e-6  # what it guards against is seen


# ------------------------------------------------------------------------------------------------------------------- what is refused
def test_hopeless_numbers_warn():
    ensemble = Ensemble(Linear(3, SIGMA))
    x = torch.rand(1, 3)
    with pytest.warns(RuntimeWarning, match="n=9 draws can never decide at alpha=0.001") as caught:
        assert rse_fast.certify(ensemble, x, n=9).labels.tolist() == [-1]
    assert caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match=r"radii \[0.9\] can never be certified with n=100 draws"):
        rse_fast.certify(ensemble, x, n=100, radii=[0.1, 0.9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rse_fast.certify(ensemble, x, n=10)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"ensemble": nn.Linear(3, 2)}, TypeError, "ensemble must be an rse_fast.Ensemble, got Linear"),
        ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, TypeError, "x must be a floating-point tensor"),
        ({"x": torch.tensor([[0.0, math.nan, 1.0]])}, ValueError, "x must be finite"),
        ({"n0": 0}, ValueError, "n0 must be at least 1, got 0"),
        ({"n": 1.5}, TypeError, "n must be an integer"),
        ({"n": 2**32}, ValueError, "n0 \\+ n must be at most 2\\^32"),
        ({"alpha": 1.0}, ValueError, r"alpha must be in \(0, 1\), got 1.0"),
        ({"alpha": math.nan}, ValueError, "alpha must be in"),
        ({"radii": [0.1, -1]}, ValueError, "radii must be finite and not negative"),
        ({"tolerance": -0.1}, ValueError, "tolerance must be finite and not negative"),
        ({"tolerance": "x"}, TypeError, "tolerance must be None or a number"),
        ({"tolerance": 0.1, "radii": 0.1}, ValueError, "tolerance and radii are two rules of stopping"),
        ({"bound": "wilson"}, ValueError, "bound must be one of 'clopper-pearson', 'randomised', got 'wilson'"),
        ({"image_offset": -1}, ValueError, "image_offset must be in"),
        ({"seed": "x"}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        rse_fast.certify(**{"ensemble": Ensemble(Linear(3, SIGMA)), "x": torch.rand(1, 3), **arguments})


def test_no_images(rng):
    out = rse_fast.certify(Ensemble(Linear(3, SIGMA)), torch.rand(0, 3))
    assert out.labels.shape == out.radius.shape == out.p_lower.shape == (0,) and out.votes.shape == (0, 2)


def test_function_and_module_have_one_name(run_python):
    code = """
import sys, rse_fast, importlib
assert callable(rse_fast.certify) and "scipy" not in sys.modules
module = importlib.import_module("rse_fast.smoothing")
assert module.certify is rse_fast.certify and callable(rse_fast.certify)
print("fine")
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "fine", done.stderr
