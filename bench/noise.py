"""Suite "noise": ``x + sigma * eps`` against eager torch, torch.compile, a copy and bare Philox; from cache-sized inputs to gigabytes."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

from rse_fast import functional, reference
from rse_fast.address import NoiseAddress
from rse_fast.kernels import cpu
from rse_fast.kernels.cpu import build

from . import peers
from .measure import Inputs, Refused, Row, compare, default_device, ratio, target

SIGMA = 0.1
SIZES = {"cpu": {"64K": 1, "4M": 64, "256M": 4096}, "cuda": {"4M": 64, "64M": 1024, "512M": 8192}}  # images [n, 64, 32, 32]
FULL = {"cpu": "4M", "cuda": "512M"}  # the size that is measured in every dtype and layout


ROW = 8  # calls that a GPU is timed over


def check_reference(device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Raises unless the op equals the float64 reference on a small input: what is timed is what is tested."""
    x = torch.randn(3, 8, 9, 7, device=device).to(dtype).contiguous(memory_format=layout)
    got = functional.add_noise(x, SIGMA, seed=5).double().cpu()
    want = reference.add_noise(x.double().cpu(), torch.tensor(SIGMA), *NoiseAddress(torch.tensor(5), 0, len(x)))
    step = want.abs().max() * torch.finfo(dtype).eps + (1e-6 if device.type == "cpu" else 1e-3)
    if not (got - want).abs().max() <= step:
        raise Refused(f"add_noise differs from the reference by {(got - want).abs().max():.3g}")


def check_moments(x: torch.Tensor, y: torch.Tensor) -> None:
    """Raises unless ``(y - x) / SIGMA`` has mean 0 and variance 1 within six standard errors, plus rounding to x's dtype."""
    if y.dtype != x.dtype or y.shape != x.shape:
        raise Refused(f"the result is {y.dtype} {list(y.shape)}, not {x.dtype} {list(x.shape)}")
    z = (y.float() - x.float()) / SIGMA
    variance, mean = torch.var_mean(z)
    n, rounding = z.numel(), (torch.finfo(x.dtype).eps / SIGMA) ** 2
    if not (abs(mean) <= 6 * n**-0.5 and abs(variance - 1) <= 6 * (2 / n) ** 0.5 + rounding):
        raise Refused(f"its noise over sigma has mean {mean:.3g} and variance {variance:.4g}")


@functools.cache
def philox_words() -> ctypes.CDLL:
    """`philox_words.cpp` compiled for the unit in use. Raises build.BuildError without a compiler or the kernel's sources."""
    unit, sources = cpu.load().unit, Path(cpu.__file__).parent
    if unit is None or not (sources / "add_noise.cpp").exists():
        raise build.BuildError("needs the sources of the CPU kernel (a checkout)")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "philox_words.so"
        source = str(Path(__file__).parent / "philox_words.cpp")
        compiler = build.find_compiler()
        flags = build.unit_flags("add_noise", unit, compiler, Path(folder))
        flags += (*build.COMMON, "-Wno-unused-function", build.OPENMP, f"-I{sources}")
        subprocess.run([*compiler, *flags, "-shared", source, "-o", str(out)], check=True, capture_output=True)
        return ctypes.CDLL(str(out))


def in_a_row(build):
    """ROW calls without a wait between them: the device works on one while the next is launched. Returns the last result."""
    run = build()
    return lambda: [run() for _ in range(ROW)][-1]


def measure(dtype: torch.dtype, layout: torch.memory_format, label: str) -> tuple[list[Row], list[dict]]:
    """One case: rows for every implementation, and the targets it is held to."""
    device = default_device()
    images = SIZES[device.type][label]
    shape, elements, flat = (images, 64, 32, 32), images * 2**16, layout is torch.channels_last
    case = f"{str(dtype)[6:]} {'channels_last' if flat else 'contiguous'} {label}"
    make = lambda: torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)  # noqa: E731
    # The smallest size stays in the cache: that is how a layer of a network meets it.
    inputs = Inputs(make, cached=label == "64K")
    out = torch.empty(shape, device=device, dtype=dtype, memory_format=layout)
    sigma, seed = torch.tensor(SIGMA, device=device), torch.tensor(7, device=device)

    def ours():
        check_reference(device, dtype, layout)
        return lambda: functional.add_noise(next(inputs), sigma, seed=seed)

    def kernel():  # alone, into memory that is already mapped
        if cpu.load().handle is None:
            raise RuntimeError(cpu.load().problem)
        at = NoiseAddress(seed, 0, images)

        def run():
            cpu.add_noise(next(inputs), out, flat, sigma, at, None, None, False)
            return out

        return run

    def words():
        library = philox_words()
        return lambda: library.philox_words(ctypes.c_int64(images), ctypes.c_int64(2**14), torch.get_num_threads())

    def compiled(**options):
        torch._dynamo.reset()
        run = torch.compile(lambda x: peers.eager_noise(x, SIGMA), **options)
        return lambda: run(next(inputs))

    builders = {
        "rse_fast": ours,
        "eager": lambda: lambda: peers.eager_noise(next(inputs), SIGMA),
        "eager, in place": lambda: lambda: out.normal_().mul_(SIGMA).add_(next(inputs)),
        "torch.compile": compiled,
        "pytorch-rse layer": lambda: peers.pytorch_rse_layer(SIGMA, inputs),
        "copy (limit)": lambda: lambda: out.copy_(next(inputs)),
    }
    if device.type == "cuda":  # its caching allocator has mapped the memory before, so there is no second figure without allocation
        builders["torch.compile max-autotune"] = lambda: compiled(mode="max-autotune-no-cudagraphs")
    else:
        builders |= {"rse_fast kernel, no allocation": kernel, "Philox words alone (limit)": words}

    def check(name, _, y):  # the second result, which is that of the current input
        if not name.endswith("(limit)"):
            check_moments(inputs.current, y)

    if device.type == "cuda":
        builders = {name: functools.partial(in_a_row, build) for name, build in builders.items()}
    work = elements / 1e9 * (ROW if device.type == "cuda" else 1)
    rows, rates = compare("noise", case, "normals", "G/s", work, builders, check, least=3)
    return rows, targets(device, dtype, case, label, rates)


def targets(device, dtype, case, label, rates) -> list[dict]:
    ours = rates["rse_fast"]
    if device.type == "cuda":
        share = ratio(ours, rates["copy (limit)"])
        return [target("noise", case, "of the copy's bandwidth", share, 0.9, "")] if dtype == torch.bfloat16 and label == "512M" else []
    if label != "4M":
        return []
    found = [
        target("noise", case, "rate, fresh memory for the result", ours, 2, "G/s"),
        target("noise", case, "rate, memory already mapped", rates["rse_fast kernel, no allocation"], 2, "G/s"),
    ]
    if dtype == torch.float32:
        found.append(target("noise", case, "against eager", ratio(ours, rates["eager"]), 6, "x"))
        found.append(target("noise", case, "against torch.compile", ratio(ours, rates["torch.compile"]), 30, "x"))
    return found


def cases() -> dict:
    found = {}
    for label in SIZES[default_device().type]:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                flat = layout is torch.channels_last
                if label != FULL[default_device().type] and flat != (dtype == torch.bfloat16):
                    continue  # elsewhere the two combinations that are used
                name = f"{str(dtype)[6:]} {'channels_last' if flat else 'contiguous'} {label}"
                found[name] = functools.partial(measure, dtype, layout, label)
    return found
