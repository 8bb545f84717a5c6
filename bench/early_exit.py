"""Suite "early_exit": what stopping early brings on a trained network, and whether its labels are those of all draws."""

import os
from pathlib import Path

import torch
from torch import nn

import rse_fast
from rse_fast.models import VGG16

from .measure import Refused, Row, compare, device, ratio, target
from .networks import SIGMAS

CONFIDENCE = 0.999


def trained(steps: int = 120) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(noisy VGG16, test images [N, 3, 32, 32], test labels [N]): noisy SGD on scikit-learn's handwritten digits scaled up to 32x32.

    Kept in the cache folder (RSE_FAST_CACHE, by default ``~/.cache/rse-fast``): on a small CPU the training takes minutes.
    """
    from sklearn.datasets import load_digits

    digits, where = load_digits(), device()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    x = nn.functional.interpolate(x, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous().to(where)
    y = torch.from_numpy(digits.target).to(where)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(where)
    train, test = order[:1400], order[1400:]
    torch.manual_seed(0)
    model = rse_fast.convert(VGG16(), *SIGMAS).to(where)
    folder = Path(os.environ.get("RSE_FAST_CACHE") or Path.home() / ".cache" / "rse-fast")
    file = folder / f"bench-vgg16-digits-{steps}-{torch.__version__}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True, map_location=where))
        return model.eval(), x[test], y[test]
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (64,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file.with_suffix(".tmp"))
    file.with_suffix(".tmp").rename(file)
    return model.eval(), x[test], y[test]


def ten_draws() -> tuple[list[Row], list[dict]]:
    """Exact early exit at B=16, n=10: the labels are those of all draws by construction, and checked here all the same."""
    model, x, y = trained()
    x, y, case = x[:64], y[:64], "VGG16 on digits B=16 n=10"
    everything = rse_fast.Ensemble(model, 10, seed=1)
    exact = rse_fast.Ensemble(model, 10, seed=1, early_exit="exact")
    want = everything.predict(x).labels

    def check(name, labels, _):
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
    best = max((rates[name] for name in builders if "exact" in name and rates[name] is not None), default=None)
    return rows, [target("early_exit", case, "rate with exact early exit on a trained network", best, 160, "images/s")]


def in_batches(ensemble, x, size: int = 16) -> torch.Tensor:
    return torch.cat([ensemble.predict(part, image0=i * size).labels for i, part in enumerate(x.split(size))])


def hundred_draws() -> tuple[list[Row], list[dict]]:
    """n=100 with a confidence against n=100 without, on a few images."""
    model, x, _ = trained()
    x, case = x[:24], "VGG16 on digits n=100"
    builders = {
        f"rse_fast, early_exit={CONFIDENCE}": lambda: _labels(rse_fast.Ensemble(model, 100, early_exit=CONFIDENCE), x),
        "rse_fast, all draws": lambda: _labels(rse_fast.Ensemble(model, 100), x),
    }
    rows, rates = compare("early_exit", case, "images", "images/s", len(x), builders, seconds=5, least=3)
    times = ratio(*rates.values())
    return rows, [target("early_exit", case, f"early_exit={CONFIDENCE} against all draws", times, 5, "x")]


def _labels(ensemble, x):
    return lambda: ensemble.predict(x).labels


def agreement() -> tuple[list[Row], list[dict]]:
    """Share of labels that early exit at n=100 has in common with all 100 draws, on the whole test set. Nothing is timed."""
    model, x, y = trained()
    case = f"VGG16 on digits n=100, labels of {len(x)} images"
    everything = rse_fast.Ensemble(model, 100, seed=1).predict(x)
    early = rse_fast.Ensemble(model, 100, seed=1, early_exit=CONFIDENCE).predict(x)
    equal = (everything.labels == early.labels).float().mean().item()
    used, name = early.draws_used.float(), f"rse_fast, early_exit={CONFIDENCE}"
    used = [used.quantile(q).item() for q in (0.2, 0.5, 0.8)]
    rows = [
        Row("early_exit", case, name, "labels equal to those of all draws", "", equal, equal, equal),
        Row("early_exit", case, name, "draws used", "draws", *used),
        Row("early_exit", case, name, "accuracy", "", *[(early.labels == y).float().mean().item()] * 3),
        Row("early_exit", case, "rse_fast, all draws", "accuracy", "", *[(everything.labels == y).float().mean().item()] * 3),
    ]
    return rows, [target("early_exit", case, "labels equal to those of all draws", equal, 0.999, "")]


def cases() -> dict:
    return {"VGG16 on digits B=16 n=10": ten_draws, "VGG16 on digits n=100": hundred_draws, "VGG16 on digits n=100, labels": agreement}
