"""``rse-fast doctor``: what is installed, what is active, where seeds come from. It reports and changes nothing."""

import argparse
import json
import os
import platform
import warnings
from importlib import metadata
from pathlib import Path

import torch

from rse_fast import noise
from rse_fast.kernels.cpu import loader

SEEDS = {
    "ambient": "training and a plain model(x): every layer call takes its seed from torch's default generator of the device, so "
    "torch.manual_seed reproduces a run",
    "ensemble": "Ensemble(seed=None), the default: fresh operating-system entropy at every call; the prediction says which seed it used",
    "fixed": "Ensemble(seed=...): the same noise at every call, which makes the defence deterministic and so attackable; for audit and "
    "tests only",
}

VARIABLES = {
    loader.UNIT_VARIABLE: "forces the CPU library's unit: baseline, avx2, avx512 or avx512bf16",
    loader.LIBRARY_VARIABLE: "path of the CPU library to open instead of the installed one",
    "RSE_FAST_AUTOTUNE": "1 lets the Triton kernels try their launch shapes on the device and keep the fastest; the noise stays the same",
    "RSE_FAST_CACHE": "folder of what is kept between runs: decoded images, tuned launch shapes",
    "RSE_FAST_REQUIRE_LIBRARY": "read by the installation only: 1 makes a CPU library that cannot be built an error",
}
PREFIX = "RSE_FAST_"
# How torch's threads wait for each other: spinning, or asleep.
WAITING = {
    True: "passive: threads sleep while they wait, right where other processes use these cores",
    False: "active: threads spin while they wait, fastest on an idle machine; where other processes use these cores, set "
    "OMP_WAIT_POLICY=passive (a training step of a tiny network took 23 ms with it, 262 ms without)",
}
ALSO_SHOWN = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET")


def report() -> dict:
    """Everything that `rse-fast doctor` prints, as plain data ready for JSON. Never raises for lack of a GPU, triton or the library."""
    library = _library()
    devices = {"cpu": _cpu(), "cuda": _cuda()}
    return {
        "versions": _versions(),
        "devices": devices,
        "cpu_library": library,
        "backends": _backends(library, devices["cuda"]),
        "seeds": SEEDS,
        "environment": _environment(),
    }


def _versions() -> dict:
    found = {"rse-fast": None, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("rse-fast", "triton", "numpy"):  # from the metadata: nothing is imported for its version
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu() -> dict:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": model, "cores": os.cpu_count(), "cores_usable": usable, "torch_threads": torch.get_num_threads(),
            "waiting": WAITING[os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"]}  # fmt: skip


def _cuda() -> dict:
    """CUDA and ROCm devices (torch calls both cuda). A driver that does not work is a problem to report, not an error."""
    devices, problem = [], None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                for index in range(torch.cuda.device_count()):
                    properties = torch.cuda.get_device_properties(index)
                    devices.append(
                        {
                            "name": properties.name,
                            "capability": f"{properties.major}.{properties.minor}",
                            "memory_bytes": properties.total_memory,
                        }
                    )
        except (RuntimeError, AssertionError) as error:
            problem = str(error)
    if problem is None and not devices and caught:
        problem = str(caught[-1].message)
    runtime = torch.version.cuda or torch.version.hip
    return {"runtime": runtime, "devices": devices, "problem": problem}


def _library() -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the loader's warning says what the report says anyway
        try:
            found = loader.load()
        except ValueError as error:  # the environment names a unit that is not there
            return {"path": None, "unit": None, "units": [], "problem": str(error)}
    return {"path": str(found.path), "unit": found.unit, "units": list(found.units), "problem": found.problem}


def _backends(library: dict, cuda: dict) -> dict:
    """What `backend="auto"` takes on each device at hand; None where the environment asks for a unit that is not there, an error then."""
    broken = library["path"] is None
    active = {"cpu": {"backend": None if broken else noise.active_backend(torch.empty(0)), "unit": library["unit"]}}
    for index in range(len(cuda["devices"])):
        active[f"cuda:{index}"] = {"backend": noise.active_backend(torch.empty(0, device=f"cuda:{index}")), "unit": None}
    return active


def _environment() -> list[dict]:
    names = [*VARIABLES, *sorted(name for name in os.environ if name.startswith(PREFIX) and name not in VARIABLES), *ALSO_SHOWN]
    shown = []
    for name in names:
        if name in os.environ:
            meaning = VARIABLES.get(name, "not a variable that rse-fast knows" if name.startswith(PREFIX) else None)
            shown.append({"name": name, "value": os.environ[name], "meaning": meaning})
    return shown


def _text(found: dict) -> str:
    cpu, cuda, library = found["devices"]["cpu"], found["devices"]["cuda"], found["cpu_library"]
    rows = [("Versions", None)]
    rows += [(name, value or "not installed") for name, value in found["versions"].items()]
    rows += [("Devices", None)]
    rows += [("cpu", f"{cpu['model']}; {cpu['cores_usable']} of {cpu['cores']} cores, {cpu['torch_threads']} torch threads")]
    rows += [("threads", cpu["waiting"])]
    for index, device in enumerate(cuda["devices"]):
        rows += [(f"cuda:{index}", f"{device['name']}, capability {device['capability']}, {device['memory_bytes'] / 2**30:.1f} GiB")]
    if not cuda["devices"]:
        build = f"this torch was built for {cuda['runtime']}" if cuda["runtime"] else "this torch was built without it"
        rows += [("cuda", f"none ({cuda['problem'] or build})")]
    rows += [("CPU library", None), ("path", library["path"] or "not opened")]
    if library["problem"]:
        rows += [("problem", library["problem"])]
    else:
        rows += [("unit", library["unit"]), ("available", ", ".join(library["units"]))]
    rows += [("Active backend", None)]
    for name, choice in found["backends"].items():
        backend = choice["backend"] or "none: see the problem above"
        rows += [(name, f"{backend}, unit {choice['unit']}" if choice["unit"] else backend)]
    rows += [("Seeds", None), *found["seeds"].items(), ("Environment", None)]
    rows += [(e["name"], e["value"] + (f"  ({e['meaning']})" if e["meaning"] else "")) for e in found["environment"]]
    if not found["environment"]:
        rows += [("none set", "")]
    width = max(len(name) for name, value in rows if value is not None)
    return "\n".join(name if value is None else f"  {name:<{width}}  {value}".rstrip() for name, value in rows)


def main(argv: list[str] | None = None) -> int:
    """Prints the report; status 1 if the environment asks for something that is not there, or else 0."""
    parser = argparse.ArgumentParser(prog="rse-fast doctor", description="What is installed, what is active, where seeds come from.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    found = report()
    print(json.dumps(found, indent=2) if args.json else _text(found))
    asked = any(os.environ.get(name) for name in (loader.UNIT_VARIABLE, loader.LIBRARY_VARIABLE))
    return 1 if asked and found["cpu_library"]["problem"] else 0
