"""Suite "host": what the host takes to launch noise, where a device would wait for it.

A launch of the Triton kernel is timed in a process of its own, behind a driver that runs nothing; a noisy layer on a batch so small that
only the host's part is left, on a CPU the arithmetic of 256 values as well.
"""

import copy
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import torch

import rse_fast
from rse_fast.address import NoiseAddress
from rse_fast.models import SmallNet

from . import peers
from .measure import Row, default_device, percentiles, ratio, selected, target

LAUNCH = "launch of 2x64x32x32 bfloat16, nothing runs"
LAYER = "convolution 3x3 of 2x8x4x4"
PREDICT = "predict, one draw of one 8x8 image, narrow SmallNet"


def still_driver(launched):
    """Stands in for Triton's driver of an sm_90 device. Kernels are compiled, and ``launched`` gets what would be handed to the device:
    (grid, stream, name, hash and device of the kernel, launch options, arguments). Hooks are called as Triton's launcher calls them. For a
    process that does nothing else with Triton."""
    from triton.backends.compiler import GPUTarget

    class Launcher:
        def __init__(self, source, metadata):
            pass

        def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            if enter is not None:
                enter(metadata)
            launched(((x, y, z), stream, function, packed, arguments))
            if leave is not None:
                leave(metadata)

    utils = SimpleNamespace(
        load_binary=lambda name, binary, shared, device: (None, (name, hash(binary), device), 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )
    return SimpleNamespace(
        utils=utils,
        launcher_cls=Launcher,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )


def microseconds(implementations: dict, calls: int = 5, rounds: int = 400) -> dict[str, tuple[float, float, float]]:
    """(p20, p50, p80) of the processor time that one call takes on one thread, in turns, where `measure.interleaved` has the device's time.

    What other processes take of a core is not counted. Few calls at a time, so that all meet caches in the same state.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = {name: [] for name in implementations}
    for run in implementations.values():
        for _ in range(100):
            run()
    for _ in range(rounds):
        for name, run in implementations.items():
            start = time.thread_time()
            for _ in range(calls):
                run()
            times[name].append((time.thread_time() - start) / calls * 1e6)
    torch.set_num_threads(threads)
    return {name: percentiles(values) for name, values in times.items()}


def launches() -> dict[str, tuple[float, float, float]]:
    """Of the launcher, and of Triton's own way to launch the same."""
    from triton.runtime import driver

    driver.set_active(still_driver(lambda launch: None))
    from rse_fast.kernels.triton import add_noise, config

    x = torch.zeros(2, 64, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    y, sigma, at = torch.empty_like(x), torch.tensor(0.1), NoiseAddress(torch.tensor(7), 0, len(x))
    kernel, programs, others = add_noise._plan(True, x.dtype, x.shape, y.shape, 2, False, (False, False), *[False] * 4, config.BARE)
    tensors = (x, y, None, sigma, None, None, at.seed, None)
    return microseconds(
        {
            "rse_fast": lambda: add_noise.add_noise(x, y, True, sigma, at),
            "Triton's own launch": lambda: kernel[(programs,)](*tensors, 0, 0, 0, **others),
        }
    )


def launch() -> tuple[list[Row], list[dict]]:
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "rse_fast.bench.host"], capture_output=True, text=True)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["failed"])[-1]
        return [Row("host", LAUNCH, "rse_fast", "host time", "us", error=error)], []
    found = json.loads(done.stdout)
    rows = [Row("host", LAUNCH, name, "host time", "us", *times) for name, times in found.items() if selected(name)]
    share = _ratio(found, "Triton's own launch")
    return rows, [target("host", LAUNCH, "over Triton's own launch", share, round(12 / 42, 3), "x", at_most=True)]


def layer() -> tuple[list[Row], list[dict]]:
    device = default_device()
    plain = torch.nn.Conv2d(8, 8, 3, padding=1).to(device, memory_format=torch.channels_last)
    noisy = rse_fast.convert(torch.nn.Sequential(copy.deepcopy(plain)), 0.2, 0.1)
    layers = {"rse_fast": noisy, "eager noise layer": peers.eager_rse(torch.nn.Sequential(plain), 0.2, 0.1), "no noise (limit)": plain}
    layers = {name: one for name, one in layers.items() if selected(name)}
    x = torch.rand(2, 8, 4, 4, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    g = torch.rand_like(x)
    forward = {name: lambda one=one: one(x) for name, one in layers.items()}
    both = {name: lambda one=one: torch.autograd.grad(one(x), (x, *one.parameters()), g) for name, one in layers.items()}
    found = {"forward": microseconds(forward), "forward and backward": microseconds(both)}
    rows = [Row("host", LAYER, name, metric, "us", *times) for metric, each in found.items() for name, times in each.items()]
    return rows, [
        target("host", LAYER, f"{metric} over the eager noise layer's", _ratio(each, "eager noise layer"), most, "x", at_most=True)
        for (metric, each), most in zip(found.items(), (1.2, 1.15), strict=True)
    ]


def prediction() -> tuple[list[Row], list[dict]]:
    """On images so small that hardly any arithmetic is left; the network alone is its fused snapshot without noise."""
    device = default_device()
    model = SmallNet(width=8).to(device).eval()
    x = torch.rand(1, 3, 8, 8, device=device)
    ensemble = rse_fast.Ensemble(rse_fast.convert(copy.deepcopy(model), 0.2, 0.1), draws=1, dtype="float32")
    plain = peers.deterministic(model, torch.float32)

    def network():
        with torch.no_grad():
            plain(x)

    runs = {"rse_fast": lambda: ensemble.predict(x), "the network alone (limit)": network}
    runs = {name: run for name, run in runs.items() if selected(name)}
    return [Row("host", PREDICT, name, "host time", "us", *times) for name, times in microseconds(runs, rounds=100).items()], []


def _ratio(found, peer):
    return ratio(*(found[name][1] if name in found else None for name in ("rse_fast", peer)))


def cases() -> dict:
    return {LAUNCH: launch, LAYER: layer, PREDICT: prediction}


if __name__ == "__main__":
    print(json.dumps(launches()))
