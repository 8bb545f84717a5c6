"""What an exported ensemble costs: python -m rse_fast.bench.exported; a minute or two on a CPU, most of it the compiler's.

The ensemble of the demo's network against the programs that `rse_fast.export` writes of it, in turns, on the same images. Each result is
checked against `Ensemble.predict` before anything is timed.
"""

import os
import tempfile
from datetime import date
from pathlib import Path

import torch
from torch._inductor import aoti_load_package

import rse_fast
from rse_fast import models
from rse_fast.bench.measure import interleaved
from rse_fast.bench.results import environment

IMAGES, DRAWS, SEED = 16, 10, 7


def main() -> None:
    torch.manual_seed(0)
    model, x = rse_fast.convert(models.SmallNet()).eval(), torch.rand(IMAGES, 3, 32, 32)
    ensemble, seed = rse_fast.Ensemble(model, DRAWS, dtype="float32"), torch.tensor(SEED)
    with tempfile.TemporaryDirectory() as folder:
        plain, compiled = (str(Path(folder, name)) for name in ("plain.pt2", "compiled.pt2"))
        rse_fast.export(ensemble, x[:1], plain)
        rse_fast.export(ensemble, x[:1], compiled, compiled=True)
        loaded, package = torch.export.load(plain).module(), aoti_load_package(compiled)
        wanted = ensemble.predict(x, SEED)
        with torch.no_grad():
            for program in (loaded, package):
                found = program(x, seed)
                torch.testing.assert_close(found["probs"], wanted.probs, rtol=0, atol=1e-4)
            times = interleaved(
                {
                    "`Ensemble.predict`": lambda: ensemble.predict(x, SEED),
                    "AOTInductor package (`compiled=True`)": lambda: package(x, seed),
                    "`.pt2` program as loaded": lambda: loaded(x, seed),
                },
                1.0,
                seconds=10,
            )
    print(f"{environment()['cpu']}, torch {torch.__version__}, {date.today()}; load {os.getloadavg()[0]:.1f}")
    print(f"small network, {IMAGES} images of 32x32, {DRAWS} draws, float32\n")
    print("| what runs | ms a batch (p20 to p80) | times predict |\n|---|---|---|")
    first = None
    for name, rates in times.items():
        slow, median, fast = (1e3 / rate for rate in rates)
        first = first or median
        print(f"| {name} | {median:.1f} ({fast:.1f} to {slow:.1f}) | {median / first:.2f} |")


if __name__ == "__main__":
    main()
