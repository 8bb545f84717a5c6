"""The units of the CPU library: each can be forced, and computes the noise (test_cpu_build.py: what their objects hold)."""

import json
import re

import numpy as np
import torch

from rse_fast import functional, reference

NOISE = """
import json, torch
from rse_fast import functional
from rse_fast.kernels import cpu

noise, address = [], {"seed": -7, "stream": 2**32 - 1, "images": 2, "draws": 2, "image_offset": 3, "draw_offset": 9}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for x in (torch.zeros(2, 5, 37), torch.zeros(2, 8, 3, 40), torch.zeros(2, 8, 3, 40).to(memory_format=torch.channels_last)):
        y = functional.add_noise(x.to(dtype), 1.0, **address, backend="cpu")
        noise.append(y.contiguous().float().flatten().tolist())
print(json.dumps([cpu.load().unit, noise]))
"""


def test_a_unit_forced_by_the_environment_computes_the_noise(unit, run_python):
    done = run_python("-c", NOISE, RSE_FAST_CPU_UNIT=unit)
    assert done.returncode == 0, done.stderr
    used, noise = json.loads(done.stdout)
    assert used == unit
    here = {}
    exec(NOISE.replace("print", "str"), here)  # this process has the unit selected by hand: the same bits
    assert noise == here["noise"]
    for values, shape in zip(noise[:3], ((5, 37), (8, 120), (8, 120)), strict=True):
        eps = reference.gaussian(-7, 2**32 - 1, 2, 2, *shape, image_offset=3, draw_offset=9).transpose(0, 2, 1)
        assert np.abs(np.array(values) - eps.ravel()).max() <= 1e-6


def test_units_differ_by_roundings_only(library):
    x = torch.zeros(4, 64, 200)
    results = {}
    try:
        for name in library.units:
            assert library.handle.rse_select_unit(name.encode()) == 0
            results[name] = functional.add_noise(x, 1.0, seed=8, backend="cpu")
    finally:
        library.handle.rse_select_unit(library.unit.encode())
    for name, y in results.items():
        assert (y - results["baseline"]).abs().max() <= 2e-6, name
    if {"avx2", "avx512"} <= set(library.units):  # and they are not one unit under several names
        assert not torch.equal(results["avx2"], results["baseline"]) and not torch.equal(results["avx2"], results["avx512"])


def test_an_unknown_unit_is_an_error_and_nothing_changes(library, run_python):
    assert library.handle.rse_select_unit(b"avx1024") == -1
    assert library.handle.rse_active_unit().decode() == library.unit
    done = run_python("-c", NOISE, RSE_FAST_CPU_UNIT="avx1024")
    assert done.returncode != 0 and re.search(r"ValueError: RSE_FAST_CPU_UNIT='avx1024' .*baseline", done.stderr)
