"""Results as files: tidy rows with the machine, versions, commit and date in each; merged from run to run, compared between runs."""

import datetime
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

import rse_fast
from rse_fast.kernels import cpu

from .measure import COSTS, Row, default_device, installed, role

KEY = ("suite", "case", "implementation", "metric")
MACHINE = ("device", "driver", "cpu")
COLUMNS = (*KEY, "unit", "p20", "p50", "p80", *MACHINE, "versions", "commit", "date", "error")


def environment() -> dict[str, str]:
    """What the figures depend on, one short text each: device, driver, cpu, versions, commit, date."""
    library = cpu.load()
    on_gpu = default_device().type == "cuda"
    versions = {"python": platform.python_version(), **{n: installed(n) for n in ("torch", "rse-fast", *(["triton"] if on_gpu else []))}}
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] if on_gpu else "",
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {library.unit or 'no C++ library'}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "commit": commit(Path(rse_fast.__file__).parent),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit(package: Path) -> str:
    """The commit of the rse_fast that is measured; "+changes" where its sources, or the kernels', differ from it. Of a copy without git,
    what RSE_FAST_COMMIT says."""
    if not _output("git", "-C", str(package), "ls-files", "__init__.py"):
        return os.environ.get("RSE_FAST_COMMIT", "not a checkout")
    found = _output("git", "-C", str(package), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(package), "status", "--porcelain", "--untracked-files=no", "--", ".", "../kernels", "../bench/*.py")
    return found + ("+changes" if changed else "")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def machine(row: dict) -> str:
    """The machine that a row was measured on, in words."""
    return row["cpu"] if row["device"] == "cpu" else f"{row['device']} (driver {row['driver']}), {row['cpu']}"


def load(path: Path) -> dict:
    """{"rows": [...], "targets": [...]} of a results file; both empty where there is none. Raises ValueError if it is something else."""
    if not path.exists():
        return {"rows": [], "targets": []}
    try:
        found = json.loads(path.read_text())
        if not all(set(COLUMNS) <= set(row) for row in found["rows"]) or not isinstance(found["targets"], list):
            raise KeyError("columns")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a results file of rse-fast bench, got something else ({error})") from None
    return found


def merge(old: dict, rows: list[Row], targets: list[dict], environment: dict[str, str]) -> dict:
    """``old`` with what was measured now in place of what it had of the same cases. Raises ValueError if it is of another machine."""
    for row in old["rows"]:
        if any(row[name] != environment[name] for name in MACHINE):
            here = machine(environment)
            raise ValueError(f"results of another machine are not merged: the file's are of {machine(row)}, these of {here}")
    about = {name: environment[name] for name in (*MACHINE, "commit", "date")}
    new = {"rows": [{**asdict(row), **environment} for row in rows], "targets": [{**t, **about} for t in targets]}
    again = {(item["suite"], item["case"]) for items in new.values() for item in items}
    return {key: [item for item in old[key] if (item["suite"], item["case"]) not in again] + new[key] for key in new}


def save(path: Path, found: dict) -> None:
    """Writes ``path``, JSON with one row a line, whole or not at all."""
    lines = {key: ",\n".join(f"  {json.dumps(item)}" for item in found[key]) for key in ("rows", "targets")}
    write_whole(path, '{{"rows": [\n{rows}\n],\n"targets": [\n{targets}\n]}}\n'.format(**lines))


def write_whole(path: Path, text: str) -> None:
    """Writes to a temporary file, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def slowdowns(old: dict, new: dict) -> list[dict]:
    """For each figure of rse-fast in both: old and new median, and how many times worse the new one is; worst first.

    Raises ValueError where the two are of different machines, or have no figure of rse-fast in common.
    """
    before = {tuple(row[name] for name in KEY): row for row in old["rows"] if role(row["implementation"]) == "rse_fast"}
    found = []
    for row in new["rows"]:
        was = before.get(tuple(row[name] for name in KEY))
        if was is None or was["p50"] is None or row["p50"] is None:
            continue
        if any(was[name] != row[name] for name in MACHINE):
            raise ValueError(f"only results of one machine can be compared, got {machine(was)} and {machine(row)}")
        worse = row["p50"] / was["p50"] if row["unit"] in COSTS else was["p50"] / row["p50"]
        found.append({**{name: row[name] for name in (*KEY, "unit")}, "old": was["p50"], "new": row["p50"], "worse": worse})
    if not found:
        raise ValueError("the two results have no figure of rse-fast in common")
    return sorted(found, key=lambda item: -item["worse"])
