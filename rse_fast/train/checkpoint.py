"""Checkpoints: folders that appear whole or not at all, and are believed only if every byte is what was written.

``step-00000120/`` holds weights as safetensors, the rest of the state as ``state.pt`` (read with weights_only=True), and
``manifest.json`` with the size and SHA-256 of each. It is written under another name, flushed to disk and renamed. The best weights of a
run are one safetensors file, with their `digest` in its metadata.
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

from rse_fast.data import open_regular, read_json, sync_folder, write_atomically, write_through

_FORMAT = "rse-fast checkpoint 1"
_MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or of another run."""


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state as contiguous CPU tensors that share no memory, as safetensors wants them."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}


def digest(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    """SHA-256 of facts, and of names, types and values, in the order of the names."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def save_best(path: Path, tensors: dict[str, Tensor], score: float, epoch: int) -> None:
    """Writes the weights of a run's best epoch, and its score; the same bytes for the same of these."""
    from safetensors.torch import save as to_bytes

    facts = {"best_score": str(score), "best_epoch": str(epoch)}
    content = to_bytes(tensors, facts | {"sha256": digest(tensors, facts)})
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors writes them in random order
    content = content[:8] + json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size) + content[8 + size :]
    write_atomically(path, lambda file: file.write(content))


def load_best(path: Path, model: nn.Module) -> dict:
    """Gives the model what `save_best` wrote and returns best_score and best_epoch. CheckpointError for a file that is damaged, or of
    another model. One without a digest is damaged, too: a changed bit of the header can hide it."""
    from safetensors import safe_open

    try:
        expected = sum(value.nbytes for value in model.state_dict().values()) + 2**24  # with room for the names
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > expected:
                raise ValueError(f"it has {size} bytes, more than the weights of the model can have")
        with safe_open(path, "pt") as file:
            facts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts.pop("sha256", None) != digest(tensors, facts):
            raise ValueError("it is damaged (its SHA-256 differs, or is missing)")
        found = {"best_score": float(facts["best_score"]), "best_epoch": int(facts["best_epoch"])}
    except Exception as error:  # safetensors has errors of its own beside OSError
        reason = f"it does not say {error}" if isinstance(error, KeyError) else str(error)[:300]
        raise CheckpointError(f"cannot read the weights in {str(path)!r}: {reason}") from error
    give(model, tensors, path)
    return found


def give(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Loads tensors of ``source`` into the model. CheckpointError where they do not fit."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"the weights in {str(source)!r} do not fit the model: {reason}") from error


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
    later, own = [path for path in found if step_of(path) > step], [path for path in found if step_of(path) <= step]
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
            found.setdefault(step_of(entry), entry)
    return [found[step] for step in sorted(found, reverse=True)]


def step_of(path: Path) -> int:
    """The step of a checkpoint, which is part of its folder's name."""
    return int(re.search(r"\d+", path.name)[0])


def newest(folder: Path, run: str, step: int | None = None) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """(parts, state) of the newest checkpoint, or of that of ``step``.

    A damaged one is never skipped in silence: the CheckpointError says what is wrong with it and which older one is whole.
    """
    found = [path for path in find(folder) if step is None or step_of(path) == step]
    if not found:
        raise CheckpointError(f"no checkpoint{'' if step is None else f' of step {step}'} in {str(folder)!r}")
    try:
        return load(found[0], run)
    except CheckpointError as error:
        for older in find(folder):
            if step_of(older) < step_of(found[0]) and _problem(older, run) is None:
                raise CheckpointError(f"{error}; the one of step {step_of(older)} before it is whole") from error
        raise CheckpointError(f"{error}; there is no whole one before it") from error


def load(path: Path, run: str) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """(parts, state) as `save` got them. CheckpointError unless everything is there, unchanged, and of this ``run``."""
    from safetensors.torch import load_file

    if problem := _problem(path, run):
        raise CheckpointError(f"the checkpoint {str(path)!r} is refused: {problem[:500]}")
    try:
        parts = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        return parts, torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # what was written is no checkpoint; safetensors and pickle have errors of their own
        raise CheckpointError(f"the checkpoint {str(path)!r} is refused: {str(error)[:500] or type(error).__name__}") from error


def _problem(path, run):
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_json(path / _MANIFEST)
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
    with open_regular(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
