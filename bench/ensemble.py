"""Suite "ensemble": images/s of n noisy passes of VGG16 at 32x32 against the eager loop and the deterministic network."""

import copy

import torch

import rse_fast
from bench import peers
from bench.measure import Row, interleaved, target
from rse_fast.models import VGG16

SIGMAS = (0.2, 0.1)


def check(ensemble, model, x) -> None:
    """Raises unless the packed ensemble is the mean of sequential passes with the same noise."""
    want = 0
    with torch.no_grad():
        for d in range(ensemble.draws):
            with rse_fast.nn.Scope(torch.tensor(3), len(x), 1, 0, d):
                want = want + model.eval()(x).softmax(-1) / ensemble.draws
    got = ensemble.predict(x, seed=3).probs
    # bfloat16 logits are off by about eps of their own size at every layer; float32 far less
    logits_error = 16 * torch.finfo(torch.bfloat16).eps
    if not (got - want).abs().max() <= logits_error:
        raise AssertionError(f"the ensemble is wrong by {(got - want).abs().max():.3g}: not timed")


def measure(plain, noisy, batch, draws) -> tuple[list[Row], list[dict]]:
    """One case: rows for every implementation, and the targets it is held to."""
    x = torch.rand(batch, 3, 32, 32)
    eager = peers.eager_rse(plain, *SIGMAS)
    ours, ours32 = rse_fast.Ensemble(noisy, draws), rse_fast.Ensemble(noisy, draws, dtype="float32")
    check(ours, noisy, x)
    check(ours32, noisy, x)
    limits = {d: (peers.deterministic(plain, d), x.to(d, memory_format=torch.channels_last)) for d in (torch.bfloat16, torch.float32)}

    def eager_bfloat16():
        with torch.autocast("cpu", torch.bfloat16):
            return peers.loop(eager, x, draws)

    implementations = {
        "rse_fast (dtype auto)": lambda: ours.predict(x),
        "rse_fast float32": lambda: ours32.predict(x),
        "eager loop float32": lambda: peers.loop(eager, x, draws),
        "eager loop bfloat16 autocast": eager_bfloat16,
        "eager packed float32": lambda: peers.packed(eager, x, draws),
        "no noise, packed bfloat16 (limit)": lambda: peers.packed(*limits[torch.bfloat16], draws),
        "no noise, packed float32 (limit)": lambda: peers.packed(*limits[torch.float32], draws),
    }
    case = f"VGG16 32x32 B={batch} n={draws}"
    rates = interleaved(implementations, batch, seconds=4, rounds=15)
    rows = [Row("ensemble", case, name, "images", "images/s", *r) for name, r in rates.items()]
    ratio = rates["rse_fast (dtype auto)"][1] / rates["eager loop float32"][1]
    return rows, [target("ensemble", case, "against the eager loop", ratio, 2, "x")]


def run() -> tuple[list[Row], list[dict]]:
    torch.manual_seed(0)
    plain = VGG16().eval()
    noisy = rse_fast.convert(copy.deepcopy(plain), *SIGMAS)
    cases = [measure(plain, noisy, batch, draws) for batch, draws in ((16, 10), (1, 10))]
    return [row for rows, _ in cases for row in rows], [t for _, targets in cases for t in targets]
