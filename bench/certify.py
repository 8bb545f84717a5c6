"""Suite "certify": certified images/s at n votes against the sampling loop of randomized smoothing and adversarial-robustness-toolbox."""

import copy
import functools
import math

import torch

import rse_fast
from rse_fast.ensemble.runner import has_bfloat16

from . import networks, peers
from .ensemble import CHUNK, DIRECT
from .measure import Refused, Row, compare, default_device, ratio, target
from .networks import SIGMAS

N0, ALPHA = 100, 1e-3
# (network, image side, images, n)
CASES = {
    "cpu": (("SmallNet", 16, 4, 1000), ("SmallNet", 16, 1, 10_000)),
    "cuda": (("SmallNet", 32, 16, 10_000), ("VGG16", 32, 16, 1000), ("VGG16", 32, 16, 10_000), ("ResNet-50", 224, 2, 1000)),
}


def measure(kind: str, side: int, count: int, n: int) -> tuple[list[Row], list[dict]]:
    device = default_device()
    plain = networks.plain(kind, device)
    noisy = rse_fast.convert(copy.deepcopy(plain), *SIGMAS)
    base = peers.eager_rse(plain, 0, SIGMAS[1])  # smoothing brings the noise at the input
    x = networks.images(count, side, device)
    classes = plain(x[:1]).shape[1]
    loop = peers.smoothing_loop(base, SIGMAS[0], classes)
    want = [loop(image, N0, n, ALPHA) for image in x]

    def ours(algorithm="auto"):
        ensemble = rse_fast.Ensemble(noisy, algorithm=algorithm)

        def run():
            found = rse_fast.certify(ensemble, x, n0=N0, n=n, alpha=ALPHA)
            return list(zip(found.labels.tolist(), found.radius.tolist(), strict=True))

        return run

    def toolbox():
        smoothed = peers.art_smoothing(base, SIGMAS[0], classes, tuple(x.shape[1:]), N0, ALPHA)
        images = x.cpu().numpy()
        return lambda: list(zip(*(part.tolist() for part in smoothed.certify(images, n, batch_size=400)), strict=True))

    def packed():  # the plain network on as many rows, no noise and no votes
        dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
        model, rows = peers.deterministic(plain, dtype), x.repeat(n + N0, 1, 1, 1).to(dtype, memory_format=torch.channels_last)
        return torch.no_grad()(lambda: [model(part) for part in rows.split(CHUNK[device.type])])

    def check(name, found, _):
        if not name.endswith("(limit)"):
            check_certificates(found, want, n)

    builders = {
        "rse_fast": ours,
        "smoothing loop (Cohen et al.), 400 rows": lambda: lambda: [loop(image, N0, n, ALPHA) for image in x],
        "adversarial-robustness-toolbox, 400 rows": toolbox,
        "plain network, packed (limit)": packed,
    }
    if device.type == "cpu":
        builders[f"rse_fast, {DIRECT}"] = lambda: ours("direct")
    rows, rates = compare("certify", case_name(kind, side, n), "images", "images/s", count, builders, check, seconds=4, least=2)
    if device.type != "cpu":
        return rows, []
    gain = ratio(rates["rse_fast"], rates[f"rse_fast, {DIRECT}"])
    return rows, [target("certify", case_name(kind, side, n), f"against {DIRECT}", gain, 1.4, "x")]


def case_name(kind: str, side: int, n: int) -> str:
    return f"{kind} {side}x{side} n={n}"


def check_certificates(found: list, want: list, n: int) -> None:
    """Raises unless labels agree, and the lower bounds of the vote share differ by at most six standard errors of two counts of n."""
    for (label, radius), (other, wanted) in zip(found, want, strict=True):
        low, high = (torch.special.ndtr(torch.tensor(r / SIGMAS[0], dtype=torch.float64)).item() for r in (radius, wanted))
        allowed = 6 * math.sqrt(2 * max(high * (1 - high), 1 / n) / n)
        if abs(low - high) > allowed or (label != other and -1 not in (label, other)):
            raise Refused(f"it certifies class {label} with a vote share above {low:.4g}, the sampling loop class {other} above {high:.4g}")


def cases() -> dict:
    return {
        case_name(kind, side, n): functools.partial(measure, kind, side, count, n) for kind, side, count, n in CASES[default_device().type]
    }
