"""``--compare-ref``: another commit and this checkout measured in turns, in one run, by this checkout's benchmarks."""

import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from . import results
from .measure import role

ORDER = ("old", "new", "new", "old")  # so that a machine that drifts favours neither


def measure(ref: str, suites: list[str] | None, pattern: str) -> tuple[dict, dict]:
    """(results of ``ref``, results of this checkout): medians over the turns, rse-fast's own figures only.

    Raises ValueError if this is no checkout, ``ref`` names no commit, or a side measures nothing.
    """
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder, _worktree(root, ref, Path(folder) / "old") as old:
        turns: dict[str, list[dict]] = {"old": [], "new": []}
        for i, side in enumerate(ORDER):
            place, package = (old, "rse_fast.bench") if side == "old" else (root, "bench")
            out = Path(folder) / f"{i}.json"
            arguments = ["--suite", *suites] if suites else []
            command = [sys.executable, "-m", package, *arguments, "--case", pattern, "--only", "rse_fast", "--out", str(out)]
            done = subprocess.run(command, cwd=place, env={**os.environ, "PYTHONPATH": str(place)}, stdout=sys.stderr)
            turns[side].append(results.load(out))
            commits = {row["commit"].removesuffix("+changes") for row in turns[side][-1]["rows"]}
            if done.returncode != 0 or commits != {_head(place)}:  # measured nothing, or the library of another place
                raise ValueError(f"--compare-ref: {ref if side == 'old' else 'this checkout'} could not be measured")
        return tuple(_median(turns[side]) for side in ("old", "new"))


def _head(folder: Path) -> str:
    return subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def _worktree(root: Path, ref: str, folder: Path):
    """A throw-away worktree of ``ref`` with its own CPU library, in which `rse_fast` and what setup.py maps into it can be imported."""
    git = ("git", "-C", str(root), "worktree")
    added = subprocess.run([*git, "add", "--detach", str(folder), ref], capture_output=True, text=True)
    if added.returncode != 0:
        raise ValueError(f"--compare-ref must name a commit of this checkout, got {ref!r}: {added.stderr.strip()}")
    try:
        build = folder / "kernels" / "cpu" / "build.py"
        built = subprocess.run([sys.executable, str(build), "--out", str(build.parent)], capture_output=True, text=True)
        if built.returncode != 0:
            raise ValueError(f"--compare-ref: the CPU library of {ref} could not be built: {built.stderr.strip()}")
        _link(folder / "rse_fast", kernels=folder / "kernels", bench=root / "bench")
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True)


def _link(package: Path, **folders: Path) -> None:
    for name, folder in folders.items():
        (package / name).symlink_to(folder, target_is_directory=True)


def _median(turns: list[dict]) -> dict:
    """The rows of rse-fast with the median of their medians."""
    found: dict[tuple, list[dict]] = {}
    for row in (row for turn in turns for row in turn["rows"]):
        if role(row["implementation"]) == "rse_fast" and row["p50"] is not None:
            found.setdefault(tuple(row[name] for name in results.KEY), []).append(row)
    return {"rows": [{**rows[0], "p50": statistics.median(row["p50"] for row in rows)} for rows in found.values()], "targets": []}
