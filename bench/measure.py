"""Timing side by side, and tidy rows: one row a (suite, case, implementation, metric)."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from rse_fast.kernels import cpu


@dataclass(frozen=True)
class Row:
    """One measured figure. p20, p50 and p80 are of the metric itself, in ``unit``; higher is better."""

    suite: str
    case: str
    implementation: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float


def target(suite: str, case: str, what: str, value: float, wanted: float, unit: str) -> dict:
    """One line of the table of targets: what was measured, the least that is wanted, and whether that holds."""
    return {"suite": suite, "case": case, "what": what, "value": value, "target": wanted, "unit": unit, "holds": value >= wanted}


def interleaved(implementations: dict, work: float, seconds: float = 1.5, rounds: int = 40) -> dict[str, tuple[float, float, float]]:
    """(p20, p50, p80) of ``work / time`` for each callable, timed in turns so that all meet the same state of the machine.

    The order rotates from round to round. Stops after ``rounds`` rounds, or when ``seconds`` per implementation are spent and five
    rounds are done.
    """
    for run in implementations.values():  # warm-up: compilation, caches, thread pools
        run()
        run()
    names, times = list(implementations), {name: [] for name in implementations}
    begin = time.perf_counter()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            implementations[name]()
            times[name].append(time.perf_counter() - start)
        if i >= 4 and time.perf_counter() - begin > seconds * len(names):
            break
    return {name: tuple(float(np.percentile(work / np.array(t), q)) for q in (20, 50, 80)) for name, t in times.items()}


def environment() -> dict:
    """What the figures depend on: machine, versions, commit, date."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    library = cpu.load()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "unit": library.unit or f"none: {library.problem}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "rse-fast": importlib.metadata.version("rse-fast")},
        "commit": commit + ("+changes" if dirty else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def write(path: Path, rows: list[Row], targets: list[dict]) -> None:
    """Writes everything as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), "rows": [asdict(r) for r in rows], "targets": targets}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
