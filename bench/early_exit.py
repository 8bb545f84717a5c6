"""Suite "early_exit": what stopping early brings on a trained network, and whether its labels are those of all draws."""

import itertools

import torch

import rse_fast
from rse_fast.models import SmallNet

from . import trained
from .measure import Refused, Row, compare, ratio, target

CONFIDENCE = 0.999
LONG = 200  # packed batches of a stream whose occupancy is judged: the last dozen, of a few hard images, are far from full


def ten_draws(name: str, model, x, y) -> tuple[list[Row], list[dict]]:
    """Exact early exit at B=16, n=10: the labels are those of all draws by construction, and checked here all the same."""
    x, y, case = x[:256], y[:256], f"{name} B=16 n=10"  # some 20 packed batches: most of the stream is neither its start nor its end
    everything = rse_fast.Ensemble(model, 10, seed=1)
    exact = rse_fast.Ensemble(model, 10, seed=1, early_exit="exact")
    want = everything.predict(x).labels

    def check(implementation, labels, _):
        if not torch.equal(labels, want):
            raise Refused(f"{int((labels != want).sum())} of {len(want)} labels differ from those of all draws")

    builders = {
        "rse_fast, early_exit='exact', predict": lambda: lambda: in_batches(exact, x),
        "rse_fast, early_exit='exact', stream": lambda: lambda: torch.cat([out.labels for out in exact.stream(x.split(16))]),
        "rse_fast, all draws": lambda: lambda: in_batches(everything, x),
    }
    rows, rates = compare("early_exit", case, "images", "images/s", len(x), builders, check, seconds=5, least=3)
    used = exact.predict(x).draws_used.float().mean().item()
    rows += [
        Row("early_exit", case, "rse_fast, early_exit='exact'", "mean draws used", "draws", used, used, used),
        Row("early_exit", case, "rse_fast, all draws", "accuracy", "", *[(want == y).float().mean().item()] * 3),
    ]
    best = max((rate for implementation, rate in rates.items() if "exact" in implementation and rate is not None), default=None)
    wanted = [target("early_exit", case, "exact early exit against all draws", ratio(best, rates["rse_fast, all draws"]), 1.4, "x")]
    if name.startswith("VGG16"):
        wanted.append(target("early_exit", case, "rate with exact early exit on a trained network", best, 160, "images/s"))
    return rows, wanted


def in_batches(ensemble, x, size: int = 16) -> torch.Tensor:
    return torch.cat([ensemble.predict(part, image_offset=i * size).labels for i, part in enumerate(x.split(size))])


def hundred_draws(name: str, model, x) -> tuple[list[Row], list[dict]]:
    """n=100 with a confidence against n=100 without, on a few images."""
    x, case = x[:24], f"{name} n=100"
    builders = {
        f"rse_fast, early_exit={CONFIDENCE}": lambda: _labels(rse_fast.Ensemble(model, 100, early_exit=CONFIDENCE), x),
        "rse_fast, all draws": lambda: _labels(rse_fast.Ensemble(model, 100), x),
    }
    rows, rates = compare("early_exit", case, "images", "images/s", len(x), builders, seconds=5, least=3)
    times = ratio(*rates.values())
    return rows, [target("early_exit", case, f"early_exit={CONFIDENCE} against all draws", times, 5, "x")]


def _labels(ensemble, x):
    return lambda: ensemble.predict(x).labels


def agreement(name: str, model, x, y) -> tuple[list[Row], list[dict]]:
    """Share of labels that early exit at n=100 has in common with all 100 draws, on the whole test set. Nothing is timed."""
    case = f"{name} n=100, labels of {len(x)} images"
    everything = rse_fast.Ensemble(model, 100, seed=1).predict(x)
    ensemble = rse_fast.Ensemble(model, 100, seed=1, early_exit=CONFIDENCE)
    used = ensemble.predict(x).draws_used.float()
    times = -(-LONG * ensemble.rows(x) // int(used.sum()))  # the images again and again, with other noise
    stream = ensemble.stream(itertools.chain.from_iterable(x.split(64) for _ in range(times)))
    early = torch.cat([out.labels for out in stream])[: len(x)]
    equal = (everything.labels == early).float().mean().item()
    ours, saved = f"rse_fast, early_exit={CONFIDENCE}", 100 / used.mean().item()
    rows = [
        Row("early_exit", case, ours, "labels equal to those of all draws", "", equal, equal, equal),
        Row("early_exit", case, ours, "draws used", "draws", *[used.quantile(q).item() for q in (0.2, 0.5, 0.8)]),
        Row("early_exit", case, ours, "draws saved, all draws over those used", "x", saved, saved, saved),
        Row("early_exit", case, ours, "occupancy of the stream", "", *[stream.occupancy] * 3),
        Row("early_exit", case, ours, "accuracy", "", *[(early == y).float().mean().item()] * 3),
        Row("early_exit", case, "rse_fast, all draws", "accuracy", "", *[(everything.labels == y).float().mean().item()] * 3),
    ]
    return rows, [
        target("early_exit", case, "labels equal to those of all draws", equal, 0.999, ""),
        target("early_exit", case, "occupancy of the stream", stream.occupancy, 0.95, ""),
    ]


def many_draws(far: int = 100_000, most: int = 3000, hard: int = 40, seeds: int = 5) -> tuple[list[Row], list[dict]]:
    """Labels at a confidence against those of so many draws that chance is gone, on the ``hard`` images whose two best classes are closest.

    Nothing is timed. A narrow network, trained for seconds: what counts here is many draws of undecided images, not its accuracy.
    """
    model, x, _ = trained.digits(SmallNet, 8, 40, width=8)
    best, second = rse_fast.Ensemble(model, 100, seed=0).predict(x).probs.topk(2).values.unbind(-1)
    x = x[(best - second).argsort()[:hard]]
    case = f"narrow SmallNet on digits, {hard} hardest images against {far} draws"
    reference = rse_fast.Ensemble(model, far, seed=1, max_rows=4000).predict(x)
    rows, wanted = [], []
    for confidence in (0.9, 0.99, 0.999):
        ensemble = rse_fast.Ensemble(model, most, early_exit=confidence, max_rows=500)
        early = [ensemble.predict(x, seed=2 + i) for i in range(seeds)]
        used = torch.stack([out.draws_used for out in early]).float()
        decided = used < most  # the others took all draws, and nothing is claimed for them
        equal = torch.stack([out.labels == reference.labels for out in early])[decided].float().mean().item()
        name = f"rse_fast, early_exit={confidence}"
        rows += [
            Row("early_exit", case, name, f"decided within {most} draws", "", *[decided.float().mean().item()] * 3),
            Row("early_exit", case, name, f"decided labels equal to those of {far} draws", "", equal, equal, equal),
            Row("early_exit", case, name, "draws used", "draws", *[used.quantile(q).item() for q in (0.2, 0.5, 0.8)]),
        ]
        wanted.append(target("early_exit", case, f"early_exit={confidence}, decided labels equal to the limit's", equal, confidence, ""))
    return rows, wanted


def cases() -> dict:
    name = "VGG16 on digits"
    return {
        f"{name} B=16 n=10": lambda: ten_draws(name, *trained.digits()),
        f"{name} n=100": lambda: hundred_draws(name, *trained.digits()[:2]),
        f"{name} n=100, labels": lambda: agreement(name, *trained.digits()),
        "narrow SmallNet on digits, 100000 draws": many_draws,
    }
