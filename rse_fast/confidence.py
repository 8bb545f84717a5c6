"""Lower bounds of a probability from independent successes and failures, at a fixed number of draws or at any time one likes to stop.

*Clopper-Pearson* (Biometrika 1934). For k successes among n draws it is the p with P_p(X >= k) = alpha, X binomial. X is discrete, so
the bound is wrong with a probability that is mostly well below alpha.

*Randomised Clopper-Pearson* (Stevens, Biometrika 1950; for randomised smoothing Voracek, NeurIPS 2024). With u uniform on [0, 1] and
independent of the draws it is the p with P_p(X > k) + u P_p(X = k) = alpha. P_p(X > k) + u P_p(X = k) is uniform when p is the truth, so
this bound is wrong with probability alpha exactly. Its left side is smaller than P_p(X >= k) where u < 1, so the bound is larger.

*A confidence sequence* for early stops. `schedule` looks at geometrically growing numbers of draws m_0 < ... < n. The bound at the look
that is j looks before the last one has the level alpha_j = c alpha / ((j + 5)(j + 6)), with c such that the levels sum to alpha.

    Theorem. P(L_j <= p at all looks) >= 1 - alpha, so the best of the bounds seen so far holds for any rule of stopping.
    Proof. Each L_j > p has probability alpha_j at most; they sum to alpha.

Its width at m draws is about sqrt(2 p (1 - p) (log(1 / alpha) + 2 log(5 + log_1.25(n / m))) / m), which is of the order
sqrt(log log n / m). No sequence that holds for all m can do better than that order (law of the iterated logarithm; Darling & Robbins,
PNAS 1967; "stitching" in Howard, Ramdas, McAuliffe & Sekhon, Annals of Statistics 2021). The beta-binomial mixture martingale (Robbins,
1970) was measured beside it in bench/results/certificates.md.

*When to stop.* The guarantee holds for any rule, so the rule may be a forecast of what all n draws would show.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

FIRST_LOOK = 50  # draws at the first look of a confidence sequence
GROWTH = 1.25  # of the draws, from one look to the next
Enough = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (bound, expected, hoped) -> which images need no more draws
GIVE_UP = 1e-3  # an image that n draws would prove is given up at a look only if one of two things happens, of this probability each


def clopper_pearson(successes: ArrayLike, trials: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound of a probability, each wrong with probability at most alpha (Clopper & Pearson 1934).

    Args:
        successes: numbers of successes, any shape.
        trials: draws, of which the successes are a part.
        alpha: in (0, 1).

    Returns:
        Two float64 arrays of the shape of successes.
    """
    from scipy.special import betaincinv

    k = np.asarray(successes, dtype=np.float64)
    lower = np.where(k > 0, betaincinv(np.maximum(k, 1), trials - k + 1, alpha), 0.0)
    upper = np.where(k < trials, betaincinv(k + 1, np.maximum(trials - k, 1), 1 - alpha), 1.0)
    return lower, upper


def randomised_clopper_pearson(successes: ArrayLike, trials: int, alpha: float, uniform: ArrayLike) -> np.ndarray:
    """Lower bound of a probability, wrong with probability alpha, never below Clopper and Pearson's (Voracek, NeurIPS 2024).

    Args:
        successes: numbers of successes, any shape.
        trials: draws, of which the successes are a part.
        alpha: in (0, 1).
        uniform: values in [0, 1] of the shape of successes, uniform and independent of the draws. 1 gives Clopper and Pearson's bound.

    Returns:
        float64 of the shape of successes. Where every draw is a success the equation may have no solution below 1, which would be a
        radius without end. There the bound is at most that of twice as many successes, which keeps the guarantee.
    """
    from scipy.special import betainc

    k, u = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(uniform, np.float64))
    u = np.where(k == trials, np.maximum(u, math.sqrt(alpha)), u)
    # P(X >= k) is betainc(k, trials - k + 1, p). Between u = 1 and u = 0 the root goes from the bound of k successes to that of k + 1.
    low, _ = clopper_pearson(k, trials, alpha)
    high = np.where(k < trials, clopper_pearson(np.minimum(k + 1, trials), trials, alpha)[0], 1.0)
    at_least, above = (np.maximum(k, 1), trials - k + 1), (k + 1, np.maximum(trials - k, 1))
    for _ in range(60):  # halves the bracket below the spacing of float64
        p = (low + high) / 2
        tail = u * np.where(k > 0, betainc(*at_least, p), 1.0) + (1 - u) * np.where(k < trials, betainc(*above, p), 0.0)
        low, high = np.where(tail <= alpha, p, low), np.where(tail <= alpha, high, p)
    return low


def image_uniforms(seed: int, images: ArrayLike) -> np.ndarray:
    """One number in [0, 1) for each image, float64, which depends on the seed and the image's index alone.

    It comes from numpy's Philox4x64; the noise of the draws comes from Philox4x32, so the two are independent.
    """
    return np.array([np.random.Generator(np.random.Philox(key=seed, counter=int(i))).random() for i in np.asarray(images).ravel()])


def schedule(n: int, alpha: float, early_stop: bool) -> list[tuple[int, float]]:
    """The looks of `estimate` in order, as (draws, level): n alone, or n, n / 1.25, n / 1.25^2, ... down to `FIRST_LOOK`.

    The levels sum to alpha. They fall with the looks that remain: most draws are spent at late looks, where a small level costs most.
    """
    draws = [n]
    while early_stop and draws[0] >= GROWTH * FIRST_LOOK:
        draws.insert(0, math.ceil(draws[0] / GROWTH))
    shares = [1 / ((j + 5) * (j + 6)) for j in reversed(range(len(draws)))]
    return [(m, alpha * share / sum(shares)) for m, share in zip(draws, shares, strict=True)]


def largest_bound(n: int, alpha: float, early_stop: bool, randomised: bool = False) -> float:
    """The lower bound that n successes out of n give at best."""
    return schedule(n, alpha, early_stop)[-1][1] ** (1 / (2 * n if randomised else n))


def reaching(goals: Sequence[float]) -> Enough:
    """A rule of stopping for `estimate`: each goal, a probability, is reached by the bound, or not even hoped for."""
    wanted = np.asarray(goals, np.float64)

    def enough(bound: np.ndarray, expected: np.ndarray, hoped: np.ndarray) -> np.ndarray:
        return np.all((bound[:, None] >= wanted) | (hoped[:, None] < wanted), axis=1)

    return enough


def within(tolerance: float) -> Enough:
    """A rule of stopping for `estimate`: all n draws are expected to enlarge the radius by no more than ``tolerance`` times sigma.

    An image whose bound is below 1/2, radius 0, goes on as long as there is hope.
    """
    from scipy.special import ndtri

    def enough(bound: np.ndarray, expected: np.ndarray, hoped: np.ndarray) -> np.ndarray:
        gain = ndtri(np.maximum(expected, 0.5)) - ndtri(np.maximum(bound, 0.5))
        return (gain <= tolerance) & ((bound >= 0.5) | (hoped < 0.5))

    return enough


def estimate(
    successes: Callable[[np.ndarray, int, int], np.ndarray],
    images: int,
    n: int,
    alpha: float,
    enough: Enough | None = None,
    uniform: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds the images' probabilities from below, each right with probability 1 - alpha.

    Args:
        successes: (images int64 [A], start, stop) -> successes int64 [A] among their draws start .. stop - 1.
        images: how many.
        n: draws of an image at most.
        alpha: in (0, 1).
        enough: (bound, expected, hoped; float64 [A] each) -> bool [A], which images need no more draws: `reaching`, `within`. The last
            two are forecasts of the bound that all n draws would give: if the rest are as the draws so far; and if each is a success as
            likely as an upper bound of level `GIVE_UP` says, and more of them are than is likely (same level). None takes all n draws,
            with one look.
        uniform: [images], for the randomised bound; None takes the plain one.

    Returns:
        Lower bounds float64 [images], and the draws taken, int64 [images].
    """
    from scipy.special import ndtri

    count, taken, best = np.zeros(images, np.int64), np.zeros(images, np.int64), np.zeros(images)
    active, start = np.arange(images), 0

    def lower(counts: np.ndarray, trials: int, level: float) -> np.ndarray:
        if uniform is None:
            return clopper_pearson(counts, trials, level)[0]
        return randomised_clopper_pearson(counts, trials, level, uniform[active])

    looks = schedule(n, alpha, enough is not None)
    for stop, level in looks:
        if not len(active):
            break
        count[active] += successes(active, start, stop)
        taken[active] = stop
        best[active] = np.maximum(best[active], lower(count[active], stop, level))
        start = stop
        if stop < n and enough is not None:
            rest, share = n - stop, count[active] / stop
            _, likely = clopper_pearson(count[active], stop, GIVE_UP)
            many = np.minimum(np.ceil(rest * likely - ndtri(GIVE_UP) * np.sqrt(rest * likely * (1 - likely))), rest)
            expected, hoped = (clopper_pearson(count[active] + coming, n, looks[-1][1])[0] for coming in (rest * share, many))
            active = active[~enough(best[active], np.maximum(expected, best[active]), np.maximum(hoped, best[active]))]
    return best, taken
