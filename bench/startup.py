"""Suite "startup": seconds until a process has imported a package, until the first prediction, and until the CPU library is built."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rse_fast.kernels import cpu
from rse_fast.kernels.cpu import build

from .measure import Row, percentiles, selected, target

# implementation: what a fresh process does; the task is to get a noise layer or an ensemble, the limit is torch alone
IMPORTS = {
    "rse_fast": "import torch, rse_fast",
    "pytorch-rse": "import torch, pytorch_rse",
    "baal": "import torch, baal.modelwrapper",
    "foolbox": "import torch, foolbox",
    "adversarial-robustness-toolbox": "import torch, art.estimators.certification.randomized_smoothing",
    "torch alone (limit)": "import torch",
}
_BEHIND_TORCH = "import torch, time; t = time.perf_counter(); import rse_fast; print(time.perf_counter() - t)"
_MODEL = (
    "import torch, time; from rse_fast.models import VGG16; x = torch.rand(1, 3, 32, 32); m = VGG16().eval(); m(x); t = time.perf_counter()"
)
_EAGER = "from rse_fast.bench.peers import eager_rse, loop; e = eager_rse(m, 0.2, 0.1)"
FIRST = {  # each prints the seconds from a loaded model, which has run once, to its first prediction
    "rse_fast": f"{_MODEL}; import rse_fast; rse_fast.Ensemble(rse_fast.convert(m), 10).predict(x); print(time.perf_counter() - t)",
    "eager loop": f"{_MODEL}; {_EAGER}; loop(e, x, 10); print(time.perf_counter() - t)",
    "torch.compile loop": f"{_MODEL}; {_EAGER}; loop(torch.compile(e), x, 10); print(time.perf_counter() - t)",
}


def _run(code: str) -> str:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # modules are found compiled, as pip leaves them
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, env=environment).stdout


def _rows(case: str, metric: str, programs: dict[str, str], seconds, rounds: int) -> list[Row]:
    """One row a program, run in turns; the first round warms the file cache and is not counted."""
    times, errors = {name: [] for name in programs if selected(name)}, {}
    for i in range(rounds + 1):
        for name in [name for name in times if name not in errors]:
            try:
                taken = seconds(programs[name])
            except subprocess.CalledProcessError as error:
                errors[name] = (error.stderr.strip().splitlines() or ["failed"])[-1]
                continue
            if i:
                times[name].append(taken)
    return [
        Row("startup", case, name, metric, "s", *(percentiles(times[name]) if name not in errors else ()), error=errors.get(name, ""))
        for name in times
    ]


def imports() -> tuple[list[Row], list[dict]]:
    def seconds(code):
        start = time.perf_counter()
        _run(code)
        return time.perf_counter() - start

    rows = _rows("import", "process start to imported", IMPORTS, seconds, rounds=2)
    # Told by a clock within the process: two starts of a process differ by more than what is asked for.
    behind_torch = _rows("import", "imported behind torch", {"rse_fast": _BEHIND_TORCH}, lambda code: float(_run(code)), rounds=5)
    extra = next((row.p50 * 1e3 for row in behind_torch if row.p50 is not None), None)
    return rows + behind_torch, [target("startup", "import", "on top of torch's import", extra, 50, "ms", at_most=True)]


def first_prediction() -> tuple[list[Row], list[dict]]:
    rows = _rows("first prediction, VGG16 B=1 n=10", "loaded model to first prediction", FIRST, lambda code: float(_run(code)), rounds=1)
    return rows, []


def library() -> tuple[list[Row], list[dict]]:
    case, name = "build of the CPU library", "rse_fast, all units"
    metric = "sources to library"
    if importlib.util.find_spec("ninja") is None or not (Path(cpu.__file__).parent / "add_noise.cpp").exists():
        return [Row("startup", case, name, metric, "s", error="needs the sources (a checkout), ninja and a C++17 compiler")], []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        try:
            build.build(Path(folder))
        except build.BuildError as error:
            return [Row("startup", case, name, metric, "s", error=str(error).partition("\n")[0])], []
        taken = time.perf_counter() - start
    return [Row("startup", case, name, metric, "s", taken, taken, taken)], []  # once: it takes longer than all else


def cases() -> dict:
    return {"import": imports, "first prediction, VGG16 B=1 n=10": first_prediction, "build of the CPU library": library}
