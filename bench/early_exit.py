"""Suite "early_exit": what stopping early brings on a trained network, and whether its labels are those of all draws."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

import rse_fast
from rse_fast.data import write_atomically
from rse_fast.models import VGG16, SmallNet

from .measure import Refused, Row, compare, device, ratio, target
from .networks import SIGMAS

CONFIDENCE = 0.999


def trained(network: type[nn.Module] = VGG16, side: int = 32, steps: int = 120, **options) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(noisy network, test images [N, 3, side, side], test labels [N]): noisy SGD on scikit-learn's handwritten digits.

    side: what their 8x8 pixels are scaled up to. options: of the network. Kept in the cache folder (RSE_FAST_CACHE, by default
    ``~/.cache/rse-fast``): on a small CPU the training of VGG16 takes minutes.
    """
    from sklearn.datasets import load_digits

    digits, where = load_digits(), device()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    x = nn.functional.interpolate(x, size=(side, side), mode="bilinear").expand(-1, 3, -1, -1).contiguous().to(where)
    y = torch.from_numpy(digits.target).to(where)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(where)
    train, test = order[:1400], order[1400:]
    torch.manual_seed(0)
    model = rse_fast.convert(network(**options), *SIGMAS).to(where)
    folder = Path(os.environ.get("RSE_FAST_CACHE") or Path.home() / ".cache" / "rse-fast")
    kind = "-".join([network.__name__.lower(), *map(str, options.values()), f"digits{side}", str(steps), torch.__version__])
    file = folder / f"bench-{kind}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file, device=str(where)))
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
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(file, lambda out: out.write(save(weights)))
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


def limit(far: int = 100_000, most: int = 3000, hard: int = 40, seeds: int = 5) -> tuple[list[Row], list[dict]]:
    """Labels at a confidence against those of so many draws that chance is gone, on the ``hard`` images whose two best classes are closest.

    Nothing is timed. A narrow network, trained for seconds: what counts here is many draws of undecided images, not its accuracy.
    """
    model, x, _ = trained(SmallNet, 8, 40, width=8)
    best, second = rse_fast.Ensemble(model, 100, seed=0).predict(x).probs.topk(2).values.unbind(-1)
    x = x[(best - second).argsort()[:hard]]
    case = f"narrow SmallNet on digits, {hard} hardest images against {far} draws"
    reference = rse_fast.Ensemble(model, far, seed=1, chunk_rows=4000).predict(x)
    rows, wanted = [], []
    for confidence in (0.9, 0.99, 0.999):
        ensemble = rse_fast.Ensemble(model, most, early_exit=confidence, chunk_rows=500)
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
    return {
        "VGG16 on digits B=16 n=10": ten_draws,
        "VGG16 on digits n=100": hundred_draws,
        "VGG16 on digits n=100, labels": agreement,
        "narrow SmallNet on digits, 100000 draws": limit,
    }
