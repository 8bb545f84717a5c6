"""``pytest bench``: the benchmarks' cases on a CPU under pytest-benchmark, each held against the reference before it is timed."""

import copy

import pytest
import torch

import rse_fast
from rse_fast import functional

from . import ensemble, networks, noise, peers

pytestmark = pytest.mark.bench
CPU = torch.device("cpu")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    if torch.cuda.is_available():
        pytest.skip("times the CPU; on a GPU: rse-fast bench")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["rse_fast", "eager"])
def test_noise(benchmark, implementation, dtype, layout):
    x = torch.randn(16, 64, 32, 32).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    sigma, seed = torch.tensor(noise.SIGMA), torch.tensor(7)
    ours, eager = (lambda: functional.add_noise(x, sigma, seed=seed)), (lambda: peers.eager_noise(x, noise.SIGMA))
    run = {"rse_fast": ours, "eager": eager}[implementation]
    if implementation == "rse_fast":
        noise.check_reference(CPU, dtype, LAYOUTS[layout])
    noise.check_moments(x, run())
    benchmark.group = f"noise {dtype} {layout}"
    benchmark(run)


@pytest.fixture(scope="module")
def small():
    """(plain network, images, reference for 10 draws)."""
    plain = networks.plain("SmallNet", CPU)
    x = networks.images(4, 32, CPU)
    return plain, x, ensemble.Reference(plain, x, 10)


@pytest.mark.parametrize("implementation", ["rse_fast", "eager loop", "eager packed", "torch.vmap", "plain network, packed (limit)"])
def test_ensemble_of_ten(benchmark, small, implementation):
    plain, x, reference = small
    eager, bare = peers.eager_rse(plain, *networks.SIGMAS), peers.deterministic(plain, torch.float32)
    ours = rse_fast.Ensemble(rse_fast.convert(copy.deepcopy(plain), *networks.SIGMAS), 10, dtype="float32")
    run = {
        "rse_fast": lambda: ours.predict(x).probs,
        "eager loop": lambda: peers.loop(eager, x, 10),
        "eager packed": lambda: peers.packed(eager, x, 10),
        "torch.vmap": lambda: peers.vmap(eager, x, 10),
        "plain network, packed (limit)": lambda: peers.packed(bare, x.to(memory_format=torch.channels_last), 10),
    }[implementation]
    if implementation == "rse_fast":
        ensemble.check_exact(ours, ours.model, x, reference.rounding)
    reference.check(implementation, run(), run())
    benchmark.group = "ensemble of ten"
    benchmark(run)
