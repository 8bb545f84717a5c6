"""Accuracies with what is uncertain about them: the choice of images, and the noise of the scoring."""

import math
import statistics
from collections.abc import Sequence

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson_interval(accuracy: float, images: int) -> tuple[float, float]:
    """95 % interval (low, high) of a binomial proportion seen as ``accuracy`` on ``images`` images (Wilson 1927). All values in [0, 1]."""
    z2 = _Z95**2 / images
    centre = (accuracy + z2 / 2) / (1 + z2)
    half = _Z95 * math.sqrt(accuracy * (1 - accuracy) / images + z2 / (4 * images)) / (1 + z2)
    return max(0.0, min(accuracy, centre - half)), min(1.0, max(accuracy, centre + half))  # min, max: rounding at 0 and 1


def estimate(accuracies: Sequence[float], images: int) -> dict:
    """Mean and sd over repeats with other noise, and the interval that the finite number of images leaves."""
    mean = statistics.fmean(accuracies)
    low, high = wilson_interval(mean, images)
    sd = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    return {"mean": mean, "sd": sd, "low": low, "high": high, "images": images, "repeats": list(accuracies)}


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """(mean, 95 % margin) of ``first - second``, accuracies in [0, 1] of the same images in two cases.

    The margin is that of a mean of independent images (normal approximation); where all differences are equal, it is what one image
    more or less would make.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else 1.0
    return statistics.fmean(differences), max(_Z95 * spread / math.sqrt(len(differences)), 1 / len(differences))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict:
    """Whether two classifiers, each right or wrong on the same images, differ in accuracy: McNemar's exact test (1947).

    Of the images on which just one of them is right, each is as likely if the two are equally good. Returns first, second: how many images
    only the first, only the second had right; p: two-sided, the probability of a split at least as uneven.
    """
    from scipy.stats import binomtest

    only = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((first, second), (second, first))]
    return {"first": only[0], "second": only[1], "p": float(binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0}
