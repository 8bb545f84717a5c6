"""How far probabilities and uncertainties of a classifier can be trusted, on images that nobody attacked.

Figures of images are means over those for which the classifier gave numbers; how many gave NaN is always told, and these count as wrong
and as the least sure. All are a few lines of torch; the tests hold them against torchmetrics.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rse_fast.ensemble import Ensemble
from rse_fast.ensemble.temperature import rescale
from rse_fast.evaluate.target import Target

BINS = 15  # of the calibration error, as in Guo et al. (ICML 2017)
COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.5)  # shares of the images that are answered, in tables
_LEAST = 2.0**-149  # a float32 probability of 0 counts as the least number that is not: at most 103.3 nats an image
_FINITE = -1e4  # stands for the logarithm of a probability that is 0
_BATCH = 64


@dataclass(frozen=True)
class Answers:
    """What a classifier says of N images: log_probs float32 [N, K] at temperature 1, NaN where it gives NaN; of an ensemble also
    mutual_information float32 [N] and votes int64 [N, K]."""

    log_probs: Tensor
    mutual_information: Tensor | None = None
    votes: Tensor | None = None


def answers(target: Target, images: Tensor, seed: int) -> Answers:
    """What the deployed classifier says of uint8 images [N, C, H, W]."""
    classifier, parts = target.classifier("deployed", target.draws), []
    for start in range(0, len(images), _BATCH):
        x = images[start : start + _BATCH].to(target.device).float().div_(255)
        if isinstance(classifier, Ensemble):
            out = classifier.predict(x, seed=seed, image_offset=start)
            parts.append((out.probs.clamp_min(_LEAST).log().cpu(), out.mutual_information.cpu(), out.votes.cpu()))
        else:
            with torch.no_grad():
                parts.append((classifier(x).clamp_min(_FINITE).cpu(),))
    return Answers(*map(torch.cat, zip(*parts, strict=True)))


# ------------------------------------------------------------------------------------------------------------------------ the metrics
def negative_log_likelihood(log_probs: Tensor, labels: Tensor) -> float:
    """Mean of -log p of the label, in nats. log_probs [N, K], labels int64 [N]."""
    return float(-log_probs.double().gather(1, labels[:, None]).mean())


def brier(probs: Tensor, labels: Tensor) -> float:
    """Mean over images of the summed squares of p - one-hot label, in [0, 2] (Brier 1950). probs [N, K]."""
    return float((probs.double() - torch.nn.functional.one_hot(labels, probs.shape[1])).square().sum(-1).mean())


def reliability(probs: Tensor, labels: Tensor, bins: int = BINS) -> list[dict]:
    """For each bin of equal width that has images, by the largest probability: low, high, images, mean confidence, accuracy."""
    confidence, predicted = probs.double().max(-1)
    right = (predicted == labels).double()
    index = (confidence * bins).long().clamp(0, bins - 1)
    found = []
    for i in index.unique().tolist():
        own = index == i
        means = {"confidence": float(confidence[own].mean()), "accuracy": float(right[own].mean())}
        found.append({"low": i / bins, "high": (i + 1) / bins, "images": int(own.sum())} | means)
    return found


def calibration_error(diagram: list[dict]) -> float:
    """Expected calibration error: the mean over images of |confidence - accuracy| of their bin (Naeini et al., AAAI 2015)."""
    images = sum(entry["images"] for entry in diagram)
    return sum(entry["images"] * abs(entry["confidence"] - entry["accuracy"]) for entry in diagram) / images


def disagreement(votes: Tensor) -> float | None:
    """Probability that two of an image's draws have different classes on top, mean over images; None for one draw. votes [N, K]."""
    votes = votes.double()
    draws = votes.sum(-1)
    if not len(votes) or bool((draws < 2).any()):
        return None
    return float((1 - (votes * (votes - 1)).sum(-1) / (draws * (draws - 1))).mean())


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that a score from ``outside`` [M] is larger than one from ``inside`` [N], ties half: area under the ROC curve."""
    ordered = inside.double().sort().values
    below = torch.searchsorted(ordered, outside.double())
    not_above = torch.searchsorted(ordered, outside.double(), right=True)
    return float((below + not_above).double().mean() / 2 / len(inside))


def risk_coverage(confidence: Tensor, right: Tensor) -> Tensor:
    """Float64 [N]: the error rate among the k + 1 images that the classifier is surest of (El-Yaniv & Wiener, JMLR 2010).

    confidence [N], where NaN is the least; right bool [N]. Among images of equal confidence the order is by chance, so each of them has
    their mean error: no order of the images changes the curve.
    """
    confidence = confidence.double().nan_to_num(-torch.inf)
    levels, place = confidence.unique(return_inverse=True)
    errors = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, place, (~right).double())
    mean = errors / torch.bincount(place, minlength=len(levels))
    return mean[place].gather(0, confidence.argsort(descending=True)).cumsum(0) / torch.arange(1, len(right) + 1)


# ------------------------------------------------------------------------------------------------------------------------ the section
def measure(inside: Answers, labels: Tensor, temperature: float, outside: Answers | None = None) -> dict:
    """Everything that the report says, JSON-serialisable. outside: what the classifier says of images of another kind.

    images; undefined, how many of them gave NaN; accuracy; temperature; by_temperature: nll, brier, ece and diagram at 1 and at the
    temperature; disagreement; selective: images kept and their accuracy; risk: the curve; aurc, its mean; ood: images, undefined,
    and auroc by entropy and mutual_information. None where there is nothing to measure.

    Raises ValueError for no image, or another number of labels.
    """
    if not len(labels) or len(inside.log_probs) != len(labels):
        raise ValueError(f"labels must be one for each of one or more images, got {len(labels)} for {len(inside.log_probs)} images")
    labels = labels.cpu()
    defined = ~inside.log_probs.isnan().any(-1)
    log_probs, known = inside.log_probs[defined], labels[defined]
    right = torch.zeros(len(labels), dtype=torch.bool)
    right[defined] = log_probs.argmax(-1) == known
    found = {
        "images": len(labels), "undefined": int((~defined).sum()), "accuracy": float(right.double().mean()), "temperature": temperature,
        "by_temperature": [_at(log_probs, known, t) for t in dict.fromkeys((1.0, temperature))] if len(known) else [],
        "disagreement": None if inside.votes is None else disagreement(inside.votes[defined]),
    }  # fmt: skip
    risk = risk_coverage(rescale(inside.log_probs, temperature).amax(-1), right)
    kept = [max(1, round(coverage * len(labels))) for coverage in COVERAGES]
    found["selective"] = [{"coverage": c, "images": k, "accuracy": 1 - float(risk[k - 1])} for c, k in zip(COVERAGES, kept, strict=True)]
    found |= {"risk": risk.tolist(), "aurc": float(risk.mean()), "ood": outside and _told_apart(inside, outside, temperature)}
    return found


def _at(log_probs, labels, temperature):
    log_probs = rescale(log_probs, temperature)
    probs = log_probs.double().exp()
    diagram = reliability(probs, labels)
    figures = {"nll": negative_log_likelihood(log_probs, labels), "brier": brier(probs, labels), "ece": calibration_error(diagram)}
    return {"temperature": temperature} | figures | {"diagram": diagram}


def _told_apart(inside, outside, temperature):
    """Area under the ROC curve for images of another kind against those of the test set, by entropy and by mutual information."""
    good = [~answers.log_probs.isnan().any(-1) for answers in (inside, outside)]
    found = {"images": len(good[1]), "undefined": int((~good[1]).sum()), "entropy": None, "mutual_information": None}
    if not (bool(good[0].any()) and bool(good[1].any())):
        return found
    log_probs = [rescale(a.log_probs[ok], temperature).double() for a, ok in zip((inside, outside), good, strict=True)]
    found["entropy"] = auroc(*(-(p.exp() * p).sum(-1) for p in log_probs))
    if inside.mutual_information is not None:
        found["mutual_information"] = auroc(*(a.mutual_information[ok] for a, ok in zip((inside, outside), good, strict=True)))
    return found
