"""Checkpoints: folders that appear whole or not at all, and are believed only if every byte is what was written.

``step-00000120/`` holds weights as safetensors, the rest of the state as ``state.pt`` (read with weights_only=True), and
``manifest.json`` with the size and SHA-256 of each. It is written under another name, flushed to disk and renamed.
"""

import hashlib
import io
import json
import os
import re
import secrets
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from rse_fast.data import sync_folder, write_through

_FORMAT = "rse-fast checkpoint 1"
_MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or of another run."""


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state as contiguous CPU tensors that share no memory, as safetensors wants them."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}


def save(folder: Path, step: int, run: str, parts: dict[str, dict[str, Tensor]], state: dict, keep: int) -> Path:
    """Writes ``step-STEP`` into ``folder``, with ``NAME.safetensors`` for each of ``parts``, then removes all but the newest ``keep``, and
    those of later steps, which a run that goes on from an earlier one has left behind.

    run: identifies the run; `load` asks for it. An OSError (a full disk) leaves the older checkpoints as they were.
    """
    from safetensors.torch import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    for leftover in set(folder.glob(".step-*")).difference(find(folder)):  # of a process that was killed
        shutil.rmtree(leftover)
    target = folder / f"step-{step:08}"
    temporary = folder / f".{target.name}.{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        for name, tensors in parts.items():
            content = to_bytes(tensors)
            write_through(temporary / f"{name}.safetensors", lambda file, content=content: file.write(content))
        content = io.BytesIO()  # torch.save itself makes a RuntimeError of a full disk
        torch.save(state, content)
        write_through(temporary / "state.pt", lambda file: file.write(content.getbuffer()))
        files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(temporary.iterdir())}
        manifest = {"format": _FORMAT, "run": run, "step": step, "files": files}
        write_through(temporary / _MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        sync_folder(temporary)
        if target.exists():  # of the same step, before its validation or an interrupt: `find` knows it until the new one is in its place
            os.rename(target, folder / f".{target.name}.old")
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder)
    found = find(folder)
    later, own = [path for path in found if _step(path) > step], [path for path in found if _step(path) <= step]
    for old in {*folder.glob(".step-*"), *later, *own[keep:]}:
        shutil.rmtree(old)
    return target


def find(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, the newest first; not whether they are whole.

    One that `save` had moved aside for another of its step, ``.step-STEP.old``, counts where it was killed before that was in place.
    """
    found = {}
    for entry in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():  # a name that begins with a dot comes last
        if re.fullmatch(r"step-\d{8,}|\.step-\d{8,}\.old", entry.name):
            found.setdefault(_step(entry), entry)
    return [found[step] for step in sorted(found, reverse=True)]


def _step(path):
    return int(re.search(r"\d+", path.name)[0])


def newest(folder: Path, run: str, step: int | None = None) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """(parts, state) of the newest checkpoint, or of that of ``step``.

    A damaged one is never skipped in silence: the CheckpointError says what is wrong with it and which older one is whole.
    """
    found = [path for path in find(folder) if step is None or _step(path) == step]
    if not found:
        raise CheckpointError(f"no checkpoint{'' if step is None else f' of step {step}'} in {str(folder)!r}")
    try:
        return load(found[0], run)
    except CheckpointError as error:
        for older in find(folder):
            if _step(older) < _step(found[0]) and _problem(older, run) is None:
                raise CheckpointError(f"{error}; the one of step {_step(older)} before it is whole") from error
        raise CheckpointError(f"{error}; there is no whole one before it") from error


def load(path: Path, run: str) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """(parts, state) as `save` got them. CheckpointError unless everything is there, unchanged, and of this ``run``."""
    from safetensors.torch import load_file

    if problem := _problem(path, run):
        raise CheckpointError(f"the checkpoint {str(path)!r} is refused: {problem}")
    parts = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return parts, torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def _problem(path, run):
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            return f"its format is {manifest['format']!r}, not {_FORMAT!r}"
        if manifest["run"] != run:
            return "it belongs to a run with another configuration"
        if {file.name for file in path.iterdir()} != {*manifest["files"], _MANIFEST}:
            return f"it should hold {sorted(manifest['files'])}, and holds {sorted(file.name for file in path.iterdir())}"
        for name, facts in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes instead of {facts['bytes']}"
            if _sha256(path / name) != facts["sha256"]:
                return f"{name} is damaged (its SHA-256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {_MANIFEST} cannot be read ({error!r})"
    return None


def _sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
