"""The temperature of a classifier: one number that makes its confidence agree with its accuracy (Guo et al., ICML 2017).

It acts on the mean softmax of an ensemble's draws, p to the power of 1/T, normalised again ("pool, then calibrate": Rahaman & Thiery,
NeurIPS 2021). So labels, votes, early exit and certificates are the same at every temperature.
"""

import numbers
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rse_fast import arguments

LOW, HIGH = 0.1, 10.0  # beyond, float32 probabilities of 2^-149 or less would be told apart from 0


def check(temperature: float) -> float:
    """``temperature`` as a float; ValueError or TypeError where it is none."""
    if not isinstance(temperature, numbers.Real) or isinstance(temperature, bool):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not LOW <= temperature <= HIGH:
        raise ValueError(f"temperature must be in [{LOW:g}, {HIGH:g}], got {temperature}")
    return float(temperature)


def rescale(log_probs: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [..., K] at a temperature."""
    return log_probs if temperature == 1 else (log_probs / temperature).log_softmax(-1)


def fit_temperature(classifier: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The temperature with the smallest mean negative log-likelihood of labels that the classifier was not trained on.

    Args:
        classifier: an `Ensemble`, or any function of images [B, ...] that returns log-probabilities [B, K]. One with an attribute
            ``temperature`` is taken to have it in its log-probabilities already.
        batches: pairs of images [B, ...] and labels int64 [B], of validation.

    Returns:
        A number in [0.1, 10] for ``Ensemble(..., temperature=)``. Above 1, the classifier was too confident. The loss is convex in 1/T, so
        there is one best.

    Raises:
        ValueError: there are no images, or none with finite log-probabilities; the classifier returns something else than [B, K];
            labels are no integers in [0, K), one an image.

    Warns:
        RuntimeWarning: the best temperature is outside the range, for example because every label is right; or images gave NaN and were
            left out.

    Examples:
        >>> ensemble.temperature = rse_fast.fit_temperature(ensemble, validation_loader)
    """
    pairs = []
    with torch.no_grad():
        for images, wanted in batches:
            found = classifier(images)
            _check_pair(found, wanted)
            pairs.append((found.double().cpu(), wanted.cpu()))
    if not sum(len(wanted) for _, wanted in pairs):
        raise ValueError("batches must hold images and their labels, got none")
    log_probs, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    defined = ~log_probs.isnan().any(-1)
    if not bool(defined.all()):
        if not bool(defined.any()):
            raise ValueError(f"classifier must give numbers, got NaN for all of {len(labels)} images")
        warnings.warn(f"rse-fast: {int((~defined).sum())} of {len(labels)} images gave NaN and are left out", RuntimeWarning, stacklevel=2)
    # A probability of 0 in float64 as well: so small that it stays 0 at every temperature.
    log_probs = log_probs[defined].clamp_min(-1e6)
    right = log_probs.gather(1, labels[defined, None])[:, 0]

    def slope(inverse: float) -> float:  # of the mean loss in 1/T: it rises
        return float(((log_probs * (log_probs * inverse).softmax(-1)).sum(-1) - right).mean())

    had = float(getattr(classifier, "temperature", 1.0))  # what its log-probabilities were made with
    least, most = had / HIGH, had / LOW
    if slope(least) >= 0 or slope(most) <= 0:
        nearest = HIGH if slope(least) >= 0 else LOW
        text = f"rse-fast: the best temperature is not within [{LOW:g}, {HIGH:g}]; {nearest:g} is taken"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return nearest
    for _ in range(60):
        middle = (least + most) / 2
        least, most = (least, middle) if slope(middle) > 0 else (middle, most)
    return had / most


def _check_pair(log_probs: object, labels: object) -> None:
    """Raises ValueError unless these are log-probabilities [B, K] and labels [B] of one batch."""
    if not isinstance(log_probs, Tensor) or log_probs.dim() != 2:
        raise ValueError(f"classifier must return log-probabilities [B, K], got {arguments.describe(log_probs)}")
    images, classes = log_probs.shape
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int32, torch.int64) or labels.shape != (images,):
        raise ValueError(f"batches must hold labels int64 [{images}] beside {images} images, got {arguments.describe(labels)}")
    if images and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"batches must hold labels in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")
