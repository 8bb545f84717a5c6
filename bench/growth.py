"""Suite "growth": time and peak memory against draws, batch, image side and depth; `scaling.py` fits what it measured."""

import functools

import rse_fast

from . import peers
from .measure import Row, compare, default_device, peak_memory, selected
from .networks import SIGMAS, Chain, images, settle

# What one case varies, over which values; the others stay at BASE.
BASE = {"draws": 10, "batch": 8, "side": 32, "depth": 6}
VALUES = {
    "cpu": {"draws": (1, 5, 10, 20, 40), "batch": (1, 4, 8, 16, 32), "side": (16, 32, 48), "depth": (2, 6, 12)},
    "cuda": {"draws": (1, 10, 50, 100, 400), "batch": (1, 8, 64, 256, 1024), "side": (16, 32, 64, 128), "depth": (2, 6, 12, 24)},
}


def measure(what: str, value: int) -> tuple[list[Row], list[dict]]:
    device, size = default_device(), {**BASE, what: value}
    x = images(size["batch"], size["side"], device)
    plain = settle(Chain(size["depth"]).to(device), images(4, size["side"], device))
    eager = peers.eager_rse(plain, *SIGMAS)
    ensemble = rse_fast.Ensemble(rse_fast.convert(plain, *SIGMAS), size["draws"])
    runs = {"rse_fast": lambda: ensemble.predict(x), "eager packed": lambda: peers.packed(eager, x, size["draws"])}
    case = f"{what}={value}"
    rows, _ = compare("growth", case, "rate", "calls/s", 1, {name: lambda run=run: run for name, run in runs.items()}, seconds=0.7, least=3)
    times = []
    for row in rows:
        figures = (1e3 / p if p else None for p in (row.p80, row.p50, row.p20))
        times.append(Row("growth", case, row.implementation, "time", "ms", *figures, row.error))
    memory = {name: peak_memory(run) for name, run in runs.items() if selected(name)}
    return times + [Row("growth", case, name, "peak memory", "MB", *[most] * 3) for name, most in memory.items()], []


def cases() -> dict:
    return {f"{what}={v}": functools.partial(measure, what, v) for what, values in VALUES[default_device().type].items() for v in values}
