"""Bounds of a class's share of votes, from some of them; looking several times costs confidence (see `rse_fast.smoothing`)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

SMALLEST_LOOK = 50  # draws at the first look of an early stop


def clopper_pearson(successes: Any, trials: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound of a probability, each wrong with probability at most alpha (Clopper & Pearson 1934). successes: array."""
    from scipy.special import betaincinv

    k = np.asarray(successes, dtype=np.float64)
    lower = np.where(k > 0, betaincinv(np.maximum(k, 1), trials - k + 1, alpha), 0.0)
    upper = np.where(k < trials, betaincinv(k + 1, np.maximum(trials - k, 1), 1 - alpha), 1.0)
    return lower, upper


def looks(n: int, early_stop: bool) -> list[int]:
    """The numbers of draws at which `estimate` looks, in order: n alone, or n, n/2, n/4, ... down to `SMALLEST_LOOK`."""
    numbers = [n]
    while early_stop and numbers[0] >= 2 * SMALLEST_LOOK:
        numbers.insert(0, math.ceil(numbers[0] / 2))
    return numbers


def largest_bound(n: int, alpha: float, early_stop: bool) -> float:
    """The lower bound that n votes out of n give: no image can do better."""
    return (alpha / len(looks(n, early_stop))) ** (1 / n)


def estimate(
    successes: Callable[[np.ndarray, int, int], np.ndarray], images: int, n: int, alpha: float, goals: Sequence[float] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Lower bounds float64 [images] of the images' probabilities, each right with probability 1 - alpha; int64 [images] draws taken.

    successes: (images int64 [A], start, stop) -> successes int64 [A] among their draws start .. stop - 1.
    goals: probabilities. An image stops when each goal is decided: reached by the lower bound, or above an upper bound (of the same level),
        or out of reach of the draws that remain. Without goals, all n draws are taken and there is one look.
    """
    numbers, thresholds = looks(n, len(goals) > 0), np.asarray(goals, dtype=np.float64)
    level = alpha / len(numbers)
    count, taken, best = np.zeros(images, np.int64), np.zeros(images, np.int64), np.zeros(images)
    active, start = np.arange(images), 0
    for stop in numbers:
        if not len(active):
            break
        count[active] += successes(active, start, stop)
        taken[active] = stop
        lower, upper = clopper_pearson(count[active], stop, level)
        best[active] = np.maximum(best[active], lower)
        within_reach, _ = clopper_pearson(count[active] + n - stop, n, level)
        never = np.minimum(upper, np.maximum(within_reach, best[active]))[:, None] < thresholds
        active, start = active[~((best[active][:, None] >= thresholds) | never).all(1)], stop
    return best, taken
