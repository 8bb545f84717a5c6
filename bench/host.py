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

from . import peers
from .measure import Row, device, percentiles, selected

LAUNCH = "launch of 2x64x32x32 bfloat16, nothing runs"
LAYER = "convolution 3x3 of 2x8x4x4"


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
    """(p20, p50, p80) of the host's time of one call, in turns, where `measure.interleaved` has the device's; few calls at a time, so that
    most samples are not interrupted."""
    times = {name: [] for name in implementations}
    for run in implementations.values():
        for _ in range(100):
            run()
    for _ in range(rounds):
        for name, run in implementations.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
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
    return [Row("host", LAUNCH, name, "host time", "us", *times) for name, times in found.items() if selected(name)], []


def layer() -> tuple[list[Row], list[dict]]:
    where = device()
    plain = torch.nn.Conv2d(8, 8, 3, padding=1).to(where, memory_format=torch.channels_last)
    noisy = rse_fast.convert(torch.nn.Sequential(copy.deepcopy(plain)), 0.2, 0.1)
    layers = {"rse_fast": noisy, "eager noise layer": peers.eager_rse(torch.nn.Sequential(plain), 0.2, 0.1), "no noise (limit)": plain}
    layers = {name: one for name, one in layers.items() if selected(name)}
    x = torch.rand(2, 8, 4, 4, device=where).contiguous(memory_format=torch.channels_last).requires_grad_()
    g = torch.rand_like(x)
    forward = {name: lambda one=one: one(x) for name, one in layers.items()}
    both = {name: lambda one=one: torch.autograd.grad(one(x), (x, *one.parameters()), g) for name, one in layers.items()}
    return [
        Row("host", LAYER, name, metric, "us", *times)
        for metric, runs in (("forward", forward), ("forward and backward", both))
        for name, times in microseconds(runs).items()
    ], []


def cases() -> dict:
    return {LAUNCH: launch, LAYER: layer}


if __name__ == "__main__":
    print(json.dumps(launches()))
