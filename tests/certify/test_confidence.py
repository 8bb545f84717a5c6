"""Bounds of a probability: by their definition, at high precision, their coverage, and early stop by a confidence sequence."""

import math

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats

from rse_fast import confidence
from rse_fast.confidence import (
    clopper_pearson,
    estimate,
    image_uniforms,
    largest_bound,
    randomised_clopper_pearson,
    reaching,
    schedule,
    within,
)


def most(trials, probability):
    """What a binomial count exceeds once in ten million runs."""
    return scipy.stats.binom.isf(1e-7, trials, probability)


# ----------------------------------------------------------------------------------------------------------------- fixed number of draws
def test_bounds_are_those_of_their_definition(rng):
    for n in (1, 2, 17, 1000):
        k = np.unique(rng.integers(0, n + 1, 6).tolist() + [0, n])
        alpha = float(rng.uniform(1e-4, 0.2))
        lower, upper = clopper_pearson(k, n, alpha)
        # Clopper & Pearson: the lower bound is the p with P(X >= k) = alpha, the upper one that with P(X <= k) = alpha.
        inner = k > 0
        assert np.allclose(scipy.stats.binom.sf(k[inner] - 1, n, lower[inner]), alpha, rtol=1e-8) and lower[0] == 0
        inner = k < n
        assert np.allclose(scipy.stats.binom.cdf(k[inner], n, upper[inner]), alpha, rtol=1e-8) and upper[-1] == 1


def randomised_tail(k, n, u, p):
    """P(X > k) + u P(X = k) for X binomial (n, p): one exact term, and the series of those above it, in 40 digits."""
    with mpmath.workdps(40):
        p, u = mpmath.mpf(float(p)), mpmath.mpf(float(u))
        term = mpmath.exp(
            mpmath.loggamma(n + 1) - mpmath.loggamma(k + 1) - mpmath.loggamma(n - k + 1) + k * mpmath.log(p) + (n - k) * mpmath.log1p(-p)
        )
        total, i = u * term, k
        while i < n and term > total * mpmath.mpf(10) ** -25:
            term *= (n - i) * p / ((i + 1) * (1 - p))
            total, i = total + term, i + 1
        return total


@pytest.mark.parametrize("n", (1, 9, 1000, 10**6))
@pytest.mark.parametrize("alpha", (0.1, 1e-3, 1e-6))
def test_the_randomised_bound_is_that_of_its_definition(n, alpha, rng):
    for k in {1, n // 2, n - 1, int(rng.integers(1, n + 1))} - {0, n}:
        u = float(rng.uniform())
        bound = float(randomised_clopper_pearson(k, n, alpha, u))
        # A relative error of 1e-9 in the level is one of 1e-11 in the bound, or less.
        assert abs(randomised_tail(k, n, u, bound) / alpha - 1) < 1e-9, (k, u)
    for u in (0.999, 0.5):  # all successes: u p^n = alpha, where that has a solution below the bound of 2 n successes
        expected = (alpha / max(u, math.sqrt(alpha))) ** (1 / n)
        assert float(randomised_clopper_pearson(n, n, alpha, u)) == pytest.approx(expected, rel=1e-12)
    assert float(randomised_clopper_pearson(n, n, alpha, alpha / 2)) == pytest.approx(alpha ** (1 / (2 * n)), rel=1e-12)
    assert largest_bound(n, alpha, False, True) == pytest.approx(alpha ** (1 / (2 * n)), rel=1e-15)
    # No success: 1 - (1 - u)(1 - p)^n = alpha, where u < alpha.
    u = alpha / 3
    assert float(randomised_clopper_pearson(0, n, alpha, u)) == pytest.approx(-math.expm1(math.log((1 - alpha) / (1 - u)) / n), rel=1e-6)
    assert randomised_clopper_pearson(0, n, alpha, 2 * alpha) == 0


def test_the_randomised_bound_lies_between_those_of_k_and_one_more(rng):
    n, alpha = int(rng.integers(2, 3000)), float(10 ** rng.uniform(-6, -1))
    k, u = rng.integers(0, n, 500), rng.uniform(1e-6, 1 - 1e-6, 500)
    bound = randomised_clopper_pearson(k, n, alpha, u)
    plain, one_more = clopper_pearson(k, n, alpha)[0], clopper_pearson(k + 1, n, alpha)[0]
    assert (bound >= plain).all() and (bound <= one_more).all() and (bound > plain)[k > 0].all()
    assert np.allclose(randomised_clopper_pearson(k, n, alpha, np.ones(500)), plain, rtol=1e-12, atol=0)


def test_the_randomised_bound_is_wrong_as_often_as_stated(rng):
    """Its error is alpha, the plain bound's is that of a discrete count, which is smaller."""
    runs, n, alpha = 3000, 60, 0.02
    for p in (0.5, 0.84, 0.95):
        assert p < alpha ** (1 / (2 * n))  # above, all successes would never be enough
        k = rng.binomial(n, p, runs)
        wrong = (randomised_clopper_pearson(k, n, alpha, rng.uniform(size=runs)) > p).sum()
        assert scipy.stats.binom.isf(1 - 1e-8, runs, alpha) <= wrong <= scipy.stats.binom.isf(1e-8, runs, alpha)
        plain = scipy.stats.binom.pmf(np.arange(n + 1), n, p)[clopper_pearson(np.arange(n + 1), n, alpha)[0] > p].sum()
        assert plain < 0.95 * alpha


def test_image_uniforms_depend_on_seed_and_index_alone(rng):
    seed, index = int(rng.integers(2**63)), np.arange(3000)
    u = image_uniforms(seed, index)
    assert u[[5, 2999]].tolist() == image_uniforms(seed, [5, 2999]).tolist() and len(set(u.tolist())) == 3000
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-7
    other = image_uniforms(seed + 1, index)
    assert abs(np.corrcoef(u, other)[0, 1]) < 6 / math.sqrt(3000) and image_uniforms(2**64 - 1, [2**32 - 1])[0] < 1


def test_largest_bounds_are_the_known_ones():
    # radius / sigma at alpha = 0.001 when all draws agree
    for n, ratio in ((10, 0.003), (100, 1.50), (1000, 2.46), (100_000, 3.81)):
        assert abs(scipy.stats.norm.ppf(largest_bound(n, 1e-3, False)) - ratio) < 0.006
        assert clopper_pearson(n, n, 1e-3)[0] == pytest.approx(largest_bound(n, 1e-3, False), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------------------ early stop
def simulate(p, images, n, alpha, enough, rng, randomised=False):
    p = np.broadcast_to(p, images)
    uniform = rng.uniform(size=images) if randomised else None
    return estimate(lambda active, start, stop: rng.binomial(stop - start, p[active]), images, n, alpha, enough, uniform)


def test_looks_grow_and_their_levels_sum_to_alpha(rng):
    for n in (1, 49, 63, 1000, 10**6):
        for early in (False, True):
            looks = schedule(n, 1e-3, early)
            draws, levels = zip(*looks, strict=True)
            assert draws[-1] == n and math.fsum(levels) == pytest.approx(1e-3, rel=1e-12) and min(levels) > 0
            assert all(b / a <= 1.26 and b > a for a, b in zip(draws, draws[1:], strict=False)) and (draws[0] <= 63 or not early)
            # The theorem's width: a level at least alpha / (5 + looks that remain)^2 at each look.
            assert all(level >= 1e-3 / (6 + j) ** 2 for j, level in enumerate(reversed(levels)))


@pytest.mark.parametrize("n, images, randomised", [(60, 3000, False), (2000, 1000, False), (120, 500, True)])
def test_bounds_hold_with_the_stated_probability_whenever_it_stops(n, images, randomised, rng):
    """Also for the worst rule: to stop at the first look whose bound is wrong, which is what the best bound of all looks shows."""
    alpha = 0.05
    never = lambda proven, expected, hoped: np.zeros(len(proven), bool)  # noqa: E731
    for p in (0.5, 0.84, 0.97):
        rules = (None, never, reaching([p]), lambda proven, expected, hoped, p=p: proven > p)
        for rule in rules:
            bound, draws = simulate(p, images, n, alpha, rule, rng, randomised)
            assert (bound > p).sum() <= most(images, alpha), (p, (bound > p).sum())
            assert set(draws.tolist()) <= {m for m, _ in schedule(n, alpha, rule is not None)}


def test_the_simulation_would_find_looks_without_spending(rng, monkeypatch):
    """The same looks, each at the full alpha: wrong more often than alpha."""
    images, alpha, n, p = 1000, 0.05, 2000, 0.84
    honest = schedule(n, alpha, True)
    monkeypatch.setattr(confidence, "schedule", lambda n, alpha, early: [(m, alpha) for m, _ in honest])
    bound, _ = simulate(p, images, n, alpha, reaching([p + 0.02]), rng)
    assert (bound > p).sum() > most(images, alpha)


def test_early_stop_decides_and_saves(rng):
    n, alpha, goal = 10_000, 1e-3, 0.84
    for p, share in ((1.0, 0.01), (0.999, 0.02), (0.1, 0.01), (0.5, 0.02), (0.9, 0.1)):
        bound, draws = simulate(p, 300, n, alpha, reaching([goal]), rng)
        assert ((bound >= goal) == (p > goal)).mean() > 0.99
        assert draws.mean() < share * n, (p, draws.mean())
    bound, draws = simulate(0.9999, 300, n, alpha, reaching([0.99999]), rng)  # out of reach, which shows before the end
    assert (draws < n).mean() > 0.5 and (bound < 0.99999).all()
    # An image between two goals must decide both.
    bound, draws = simulate(0.9, 300, n, alpha, reaching([0.6, 0.97]), rng)
    assert ((bound >= 0.6) & (bound < 0.97)).all()


def test_giving_up_costs_few_certificates(rng):
    """Of images that all n draws would certify on an even chance, at most a few in a hundred are given up."""
    n, alpha, goal, images = 10_000, 1e-3, 0.84, 500
    p = scipy.special.betaincinv(goal * n + 1, (1 - goal) * n, 0.999)
    never = lambda proven, expected, hoped: proven >= goal  # noqa: E731
    patient, _ = simulate(p, images, n, alpha, never, rng)
    given_up, draws = simulate(p, images, n, alpha, reaching([goal]), rng)
    kept, all_of_them = (given_up >= goal).mean(), (patient >= goal).mean()
    assert 0.05 < all_of_them < 0.95
    assert kept >= all_of_them - 0.06 - 6 * math.sqrt(0.5 / images)
    assert draws.mean() < n


def test_a_tolerance_stops_where_more_draws_would_not_help(rng):
    n, alpha, tolerance = 100_000, 1e-3, 0.05

    def radius(p):
        return scipy.special.ndtri(np.maximum(p, 0.5))

    for p, share in ((0.6, 0.15), (0.9, 0.15), (0.99, 0.4), (0.3, 0.01)):
        bound, draws = simulate(p, 100, n, alpha, within(tolerance), rng)
        whole, _ = simulate(p, 100, n, alpha, None, rng)
        decline = radius(whole) - radius(bound)
        assert draws.mean() < share * n and decline.mean() <= 1.3 * tolerance, (p, draws.mean(), decline.mean())
