"""Timing side by side: tidy rows, one a (suite, case, implementation, metric), and the targets they are held to."""

import contextlib
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# Units of which less is better; of all others more is.
COSTS = {"s", "ms", "us", "MB"}


@dataclass(frozen=True)
class Row:
    """One measured figure: percentiles of the metric itself, in ``unit``; None with an ``error`` where nothing was measured.

    An implementation's name tells its role: what begins with "rse_fast" is this project, what ends in "(limit)" does less work than the
    task asks for (no noise, a bare copy) and bounds what can be reached, everything else is a peer.
    """

    suite: str
    case: str
    implementation: str
    metric: str
    unit: str
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    error: str = ""

    @property
    def role(self) -> str:
        return role(self.implementation)


def role(implementation: str) -> str:
    if implementation.startswith("rse_fast"):
        return "rse_fast"
    return "limit" if implementation.endswith("(limit)") else "peer"


def target(
    suite: str, case: str, what: str, value: float | None, wanted: float, unit: str, *, at_most: bool = False, needs: str = ""
) -> dict:
    """One line of the table of targets: what was measured, the least (``at_most``: the most) that is wanted, and whether that holds.

    A ``value`` of None was not measured; ``needs`` says what it takes.
    """
    holds = None if value is None else bool(value <= wanted if at_most else value >= wanted)
    return {
        "suite": suite, "case": case, "what": what, "value": value, "target": wanted, "unit": unit,
        "at_most": at_most, "holds": holds, "needs": needs,
    }  # fmt: skip


def ratio(a: float | None, b: float | None) -> float | None:
    """``a / b``; None where one of them was not measured."""
    return None if a is None or b is None else a / b


def best_peer(rates: dict[str, float | None]) -> float | None:
    """The highest rate of an implementation that is neither rse-fast's nor a limit; None where none was measured."""
    return max((rate for name, rate in rates.items() if role(name) == "peer" and rate is not None), default=None)


class Refused(AssertionError):
    """An implementation's result differs from the reference, so it is not timed."""


def compare(
    suite: str, case: str, metric: str, unit: str, work: float, builders: dict[str, Callable], check: Callable | None = None, **budget
) -> tuple[list[Row], dict[str, float | None]]:
    """Rows of all implementations of one case, and their medians by name.

    builders: name -> function that makes the zero-argument callable to be timed. ``check(name, result, second result)`` raises `Refused` on
    what is not the reference's. An implementation that cannot be built, fails or is refused gets a row with its error, and is not timed.
    ``work / seconds`` is the metric; the budget is that of `interleaved`.
    """
    ready, errors = {}, {}
    for name in (name for name in builders if selected(name)):
        try:
            run = builders[name]()
            results = run(), run()  # the warm-up as well: compilation, caches, thread pools
            if check is not None:
                check(name, *results)
            ready[name] = run
        except Exception as error:  # whatever a peer raises on this machine
            errors[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    rates = interleaved(ready, work, warmup=0, **budget) if ready else {}
    rows = [Row(suite, case, name, metric, unit, *rates.get(name, ()), error=errors.get(name, "")) for name in builders if selected(name)]
    return rows, {name: rates[name][1] if name in rates else None for name in builders}


_only, _device = "", ""  # see `choice`


@contextlib.contextmanager
def choice(only: str = "", device: str = "") -> Iterator[None]:
    """What is measured within: `compare` runs the implementations whose names begin with ``only`` (``rse-fast bench --compare-ref`` has no
    use for the peers), and `default_device` is ``device``, "cpu" or "cuda"; "": all of them, and this machine's."""
    global _only, _device
    before = _only, _device
    _only, _device = only, device
    try:
        yield
    finally:
        _only, _device = before


def selected(name: str) -> bool:
    return name.startswith(_only)


def interleaved(
    implementations: dict[str, Callable], work: float, seconds: float = 1.5, rounds: int = 40, least: int = 5, warmup: int = 2
) -> dict[str, tuple[float, float, float]]:
    """(p20, p50, p80) of ``work / time`` for each callable, timed in turns so that all meet the same state of the machine.

    The order rotates from round to round. Stops after ``rounds`` rounds, or when ``seconds`` per implementation are spent and ``least``
    rounds are done. On a GPU the time is that between two events around the call.
    """
    for run in implementations.values():  # warm-up: compilation, caches, thread pools
        for _ in range(warmup):
            run()
    names, times = list(implementations), {name: [] for name in implementations}
    begin = time.perf_counter()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds_of(implementations[name]))
        if i + 1 >= least and time.perf_counter() - begin > seconds * len(names):
            break
    return {name: percentiles([work / t for t in values]) for name, values in times.items()}


def percentiles(values) -> tuple[float, float, float]:
    """(p20, p50, p80)."""
    return tuple(float(np.percentile(np.array(values), q)) for q in (20, 50, 80))


def seconds_of(run: Callable) -> float:
    """Seconds that one call takes, until the GPU is done where torch has used one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_memory(run: Callable) -> float:
    """Most megabytes (1e6 bytes) that torch's allocator held for one call beyond what it held before; the second call is watched."""
    run()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in events), initial=0)) / 1e6


class Inputs:
    """``next`` goes round inputs that together are larger than twice the device's last cache, so that none is still there.

    ``cached=True``: one input, which stays in the cache where it fits. ``current`` is the one that `next` gave last.
    """

    def __init__(self, make: Callable[[], torch.Tensor], cached: bool = False, most: int = 64) -> None:
        self.current = make()
        count = 1 + int(2 * cache_bytes(self.current.device) // (self.current.numel() * self.current.element_size()))
        self._cycle = itertools.cycle([self.current] if cached else [self.current, *(make() for _ in range(min(most, count) - 1))])

    def __next__(self) -> torch.Tensor:
        self.current = next(self._cycle)
        return self.current


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache of a CPU or GPU; 64 MB where it cannot be read."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [0]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
    return max(sizes) or 64 * 2**20


def default_device() -> torch.device:
    """Where suites measure: a GPU if there is one."""
    return torch.device(_device or ("cuda" if torch.cuda.is_available() else "cpu"))


def installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
