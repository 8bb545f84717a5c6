"""How kernels are launched: tile sizes and warps by a small table, and the optional search for better ones.

Nothing here changes a value of the noise, which does not depend on tiles, grids or warps.
"""

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch._subclasses.functional_tensor import FunctionalTensor
from triton.runtime import driver

AUTOTUNE_VARIABLE = "RSE_FAST_AUTOTUNE"
CACHE_VARIABLE = "RSE_FAST_CACHE"


class Config(NamedTuple):
    """threads: of a program. quads: of a thread and tile. steps: at most this many tiles a program."""

    threads: int
    quads: int
    steps: int


# 16 elements a thread keep the registers few. Bare noise waits for memory, which many short programs serve best; with more fused in
# front of it 16-bit noise is bound by issue slots as well, and a loop over tiles pays for the prologue (H100: bench/results).
BARE, FUSED = Config(threads=128, quads=4, steps=1), Config(threads=128, quads=4, steps=8)


def default(itemsize: int, fused: bool) -> Config:
    """For values of so many bytes, with or without an affine map, activation or pool in front of the noise."""
    return FUSED if fused and itemsize == 2 else BARE


CANDIDATES = [Config(t, q, s) for t in (64, 128, 256) for q in (2, 4, 8) for s in (1, 4, 8)]

# Samples of fewer elements are addressed by 32-bit offsets from their row.
ENOUGH_32_BITS = 2**31

# A program more on every processor pays more than a longer loop: only beyond this many programs do loops grow.
ENOUGH_PROGRAMS = 4096


def divisor(n: int, cap: int) -> int:
    """The largest power of two, at most `cap`, that divides n > 0."""
    return min(n & -n, cap)


def loop_steps(tiles: int, programs: int, most: int) -> int:
    """How many of `tiles` equal tiles one program takes: a divisor of `tiles`, so that all programs do the same work."""
    steps = 1
    while steps * 2 <= most and tiles % (steps * 2) == 0 and programs // (steps * 2) >= ENOUGH_PROGRAMS:
        steps *= 2
    return steps


@functools.cache
def fast_math() -> bool:
    """Whether kernels take CUDA's approximate functions, which neither HIP nor the interpreter has."""
    return torch.version.hip is None and not triton.knobs.runtime.interpret


def word(value: int) -> int:
    """A 32-bit word as the signed integer of its bits: one launch signature for all values."""
    return value - 2**32 if value >= 2**31 else value


_launches = {}  # by what `launch` was given: how to launch again


def launch(plan, tensors: tuple, words: tuple, *key) -> None:
    """Launches the kernel of ``plan(*key)`` on the device of ``tensors[0]``, on that device's current stream.

    plan: a function of hashable values that returns (kernel, programs, others); the kernel's parameters are tensors, words, then others in
    any order, and it is not specialised on words. key says which tensors are None, and settles the dtypes of the others.

    Triton finds what it compiled by a search through all arguments, which takes several times the host's time of the launch itself. Here a
    launch is known again by plan and key, and by what else Triton reads of a tensor: its device, and whether its address is a multiple
    of 16. Then the compiled kernel gets addresses in place of tensors. While someone watches launches by a hook, Triton launches.
    """
    if isinstance(tensors[0], FunctionalTensor):  # a compiler traces: it takes the kernel in
        kernel, programs, others = plan(*key)
        torch.library.wrap_triton(kernel)[(programs,)](*tensors, *words, **others)
        return
    addresses, bits = [], 0
    for tensor in tensors:
        if tensor is None:
            addresses.append(None)
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            bits |= address
    device = tensors[0].get_device()  # -1 in the interpreter, and where nothing is launched
    if device >= 0 and device != driver.active.get_current_device():
        with torch.cuda.device(device):
            return launch(plan, tensors, words, *key)
    aligned = bits % 16 == 0 or tuple([address is None or address % 16 == 0 for address in addresses])
    known = plan, device, aligned, *key
    found, watched = _launches.get(known), _watched()
    if found is not None and not watched and not found[0]:
        _, run, programs, constant, others = found
        run(programs, 1, 1, driver.active.get_current_stream(device), *constant, *addresses, *words, *others)
        return
    kernel, programs, others = plan(*key)
    compiled = kernel[(programs,)](*tensors, *words, **others)
    # On AMD, Triton reads the size of storages as well; an interpreted kernel leaves nothing.
    if torch.version.hip is None and compiled is not None and not watched:
        if len(_launches) >= 4096:  # shapes without end: begin anew
            _launches.clear()
        constant = compiled.function, compiled.packed_metadata, None, None, None  # no metadata for hooks, and no hooks
        behind = tuple(others[name] for name in kernel.arg_names[len(tensors) + len(words) :])
        _launches[known] = kernel.pre_run_hooks, compiled.run, programs, constant, behind


def _watched() -> bool:
    """Whether launches, or the compilation before them, call a hook. Triton keeps an empty chain where there is none."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
        or getattr(runtime, "add_stages_inspection_hook", None)  # from triton 3.6 on
    )


def warps(threads: int) -> int:
    """Warps of a program of `threads` threads; AMD's data-centre GPUs have 64 to a warp."""
    return max(1, threads // (32 if torch.version.hip is None else 64))


def stages(most: int) -> int:
    """Steps of a loop under way at once, `most` at most; AMD's 64 KiB of shared memory a program hold two."""
    return most if torch.version.hip is None else min(most, 2)


def register_limit(registers: int) -> dict:
    """The launch option that caps a thread's registers; only CUDA has it."""
    return {"maxnreg": registers} if fast_math() else {}


# ------------------------------------------------------------------------------------------------------------------ autotuning
_found = {}  # (file, key): what the file said, so that a launch does not read it again


def tuning(x: torch.Tensor) -> bool:
    """Whether launches on the device of ``x`` are to be `tuned`: with RSE_FAST_AUTOTUNE=1."""
    return os.environ.get(AUTOTUNE_VARIABLE) == "1" and x.is_cuda


def tuned(x: torch.Tensor, default, candidates: list, run, *key):
    """The fastest of `default` and `candidates` for `run(candidate)` on the device of ``x``, measured once and kept on disk.

    `key` names kernel, dtype and shape class; default and candidates are of one class. `run` launches the kernel and may do so any
    number of times. Nothing is measured while a CUDA graph is captured.
    """
    key = f"{torch.cuda.get_device_name(x.device)} | triton {triton.__version__} | {' '.join(map(str, key))}"
    with torch.cuda.device(x.device):
        measure = None if torch.cuda.is_current_stream_capturing() else triton.testing.do_bench
        return searched(key, default, candidates, run, measure)


def searched(key: str, default, candidates: list, run, measure):
    """What the file says for `key`; else the candidate of least ``measure(lambda: run(candidate), warmup, rep)``, written to the file.

    A candidate that asks for more than the device has is passed over. With `measure` None an unknown key gives `default`.
    """
    place = cache_file(), key
    if place in _found:
        return _found[place]
    try:
        _found[place] = type(default)(**_read_cache()[key])
        return _found[place]
    except (KeyError, TypeError):  # not there, or written by a version whose launches were described otherwise
        if measure is None:
            return default
    times = {}
    for candidate in dict.fromkeys([default, *candidates]):
        try:
            times[candidate] = measure(lambda c=candidate: run(c), warmup=5, rep=20)
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue
    _found[place] = best = min(times, key=times.get, default=default)
    _write_cache({**_read_cache(), key: best._asdict()})
    return best


def cache_file() -> Path:
    """RSE_FAST_CACHE/autotune.json; by default under the user's cache directory."""
    base = os.environ.get(CACHE_VARIABLE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rse-fast"
    return Path(base) / "autotune.json"


def _read_cache() -> dict:
    try:
        return json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}


def _write_cache(known: dict) -> None:
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(known, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)  # whole or not at all, whoever else writes
