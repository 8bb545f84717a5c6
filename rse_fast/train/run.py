"""A run and its folder: what is logged and kept, how it stops, continues and ends.

The folder: ``config.json``; ``data.json`` (what was trained on); ``log.jsonl``; ``checkpoints/``; ``best.safetensors``, the weights of the
best epoch on the validation images; ``curves.png``; with a distillation, ``teacher/``, a run of its own.
"""

import dataclasses
import hashlib
import json
import signal
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from rse_fast import data, models
from rse_fast.ensemble import Ensemble
from rse_fast.train import checkpoint, defences
from rse_fast.train.captured import advice
from rse_fast.train.config import Config
from rse_fast.train.distributed import Ranks, connect
from rse_fast.train.log import Log, draw_curves, read
from rse_fast.train.trainer import Trainer

_TEST_DRAWS = 10
_TEST_STREAM = 4  # of the seeds of a run


def train(config: Config, out: str | Path, *, resume: bool = False, from_step: int | None = None) -> dict:
    """Trains in the folder ``out`` and returns the last row of its log: "event" is "end", or "stop" after SIGTERM or Ctrl-C.

    resume: continue the run in ``out`` from its newest checkpoint, or from that of ``from_step``; a run that was killed before its first
    checkpoint begins anew, one that is complete is left as it is. The configuration must be the run's own, except for what concerns the
    machine (`Config.fingerprint`); the data may have moved, but must be the same.

    Under torchrun all processes call this; only rank 0 writes, all read the folder. Raises ValueError for bad input, CheckpointError (a
    ValueError) for a checkpoint that is damaged or of another run, FloatingPointError when training diverges, OSError for a full disk.
    """
    out = Path(out)
    with connect(config.device) as ranks, _stop_signals() as stopped:
        path = out / "config.json"
        if not resume and (path.exists() or checkpoint.find(out / "checkpoints")):
            raise ValueError(f"out: {str(out)!r} holds a run already; resume it, or name another folder")
        if path.exists() and (known := Config.load(path)).fingerprint != config.fingerprint:
            differing = [f"{name} {value!r} there, {new!r} here" for name, value, new in known.differences(config)]
            raise ValueError(f"resume: {str(out)!r} holds a run of another configuration ({'; '.join(differing)})")
        teacher = None
        if config.defence == "distillation":
            plain = dataclasses.replace(config, defence="plain")
            # from_step is the teacher's while that is under way, and the student's afterwards.
            row = _train(plain, out / "teacher", resume, from_step if _under_way(out / "teacher") else None, ranks, stopped, student=config)
            if row["event"] == "stop":
                return row
            teacher = load_model(out / "teacher")
        return _train(config, out, resume, from_step, ranks, stopped, teacher=teacher)


def _under_way(run):
    rows = read(run / "log.jsonl")
    return bool(rows) and rows[-1]["event"] != "end"


def load_model(run: str | Path, which: str = "best", device: str | torch.device = "cpu") -> nn.Module:
    """The model of a run folder in eval mode, its defence built in (rse: noise is on, with the sigmas for use).

    which: "best", the epoch with the best validation accuracy, or "last", the newest checkpoint. Raises ValueError for a folder that is not
    a run's, or a file that is damaged. A model that the configuration names as package.module:function is imported and called.
    """
    run = Path(run)
    if which not in ("best", "last"):
        raise ValueError(f"which: expected best or last, got {which!r}")
    config = Config.load(run / "config.json")
    facts = _read_facts(run)
    model = defences.protect(models.make(config.model, len(facts["classes"]), facts["shape"][0]), config)
    defences.use_test_sigma(model, config)
    if which == "best":
        tensors = _read_weights(run / "best.safetensors")
    else:
        parts, _ = checkpoint.newest(run / "checkpoints", config.fingerprint)
        tensors = parts.get("average", parts["model"])
    _load_weights(model, tensors, run)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout).eval()


def load_data(config: Config, moved: str | None = None) -> data.Splits:
    """The data set that a configuration names, or another (``moved``), decoded and split as it says. ValueError for what cannot be read."""
    if moved is not None:
        images = Path(moved).is_dir()  # of a file, or digits, the size and place are given
        config = dataclasses.replace(config, data=moved, resize=config.resize if images else None, lazy=config.lazy and images)
    return data.load(
        config.data, resize=config.resize, val_fraction=config.val_fraction, workers=config.workers, lazy=config.lazy, progress=True
    )


# ---------------------------------------------------------------------------------------------------------------------- one run
def _train(config, out, resume, from_step, ranks: Ranks, stopped, teacher=None, student=None):
    """One run. student: the configuration of the distillation around it, if it is a teacher's."""
    rows = read(out / "log.jsonl")
    if resume and rows and rows[-1]["event"] == "end" and from_step is None:
        return rows[-1]
    splits = load_data(config)
    facts = {"name": splits.name, "classes": list(splits.classes), "shape": list(splits.train.shape)}
    facts |= {name: len(getattr(splits, name)) for name in ("train", "val", "test")}
    facts |= {"digest": _digest(splits.train), "val_digest": _digest(splits.val), "test_digest": _digest(splits.test)}
    if resume and (out / "data.json").exists():
        known = _read_facts(out)
        if any(known[fact] != facts[fact] for fact in (facts.keys() & known.keys()) - {"name"}):  # a folder may be called otherwise
            raise ValueError(f"data: expected what the run was trained on, {known}, got {facts} from {config.data!r}")
    trainer = Trainer(config, splits, ranks, teacher)
    saved = _Saved(out, config, ranks)
    begun = resume and saved.restore(trainer, from_step)
    log = None
    if ranks.main:
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out, trainer.step if begun else 0, trainer.epoch)
        for leftover in out.glob(".*.tmp"):  # of a process that was killed
            leftover.unlink()
        data.write_atomically(out / "data.json", lambda file: file.write(json.dumps(facts, indent=1).encode()))
        config.save(out / "config.json")  # the last: with it, the folder is a run's
        if student is not None:  # whose folder is this one's parent, and a run's from now on: it can be continued
            student.save(out.parent / "config.json")
        log.write(_start_row(trainer, begun))
        if student is None and (line := advice(config, ranks.device, ranks.size)) is not None:
            print(line)
    try:
        row = _loop(trainer, saved, log, stopped)
        if row["event"] != "stop":
            row = _end(trainer, saved, out) if ranks.main else row
        if log is not None and row["event"] in ("stop", "end"):
            log.write(row)
        return row
    finally:
        if log is not None:
            log.close()


def _digest(part):
    """SHA-256 of the labels in order and, where they are in memory, of the images: data that moved are the same, others are not."""
    digest = hashlib.sha256(part.labels.contiguous().numpy())
    if isinstance(part, data.Part):
        digest.update(part.images.contiguous().numpy())
    return digest.hexdigest()


def _loop(trainer, saved, log, stopped):
    """Trains to the end, or until a signal: then the state is saved and a row says so."""
    row = {"event": "epoch"}
    began = time.perf_counter()
    with _progress(trainer) if log is not None else nullcontext() as bar:
        while not trainer.complete:
            if trainer.ranks.any(bool(stopped)):
                saved.checkpoint(trainer)
                return {"event": "stop", "step": trainer.step, "signal": stopped[-1] if stopped else None}
            before = trainer.step
            found = trainer.advance()
            if bar is not None:
                bar.update(trainer.step - before)
            if found is not None:
                row = found | {"seconds": round(time.perf_counter() - began, 1)}
                if log is not None:
                    log.write(row)
                    bar.set_postfix({name: f"{row[name]:.3g}" for name in ("epoch", "loss", "val_accuracy") if name in row})
            if found is not None and found["event"] == "epoch":
                saved.best(trainer, row)
                saved.checkpoint(trainer)
            elif trainer.step > before and trainer.config.save_steps and trainer.step % trainer.config.save_steps == 0:
                saved.checkpoint(trainer)
    return row


def _end(trainer, saved, out):
    """The row that ends a log: accuracy of the best weights on the test images, which nothing was chosen by. Draws the curves."""
    config = trainer.config
    try:
        draw_curves(read(out / "log.jsonl"), out / "curves.png")
    except ImportError:
        print("no picture of the curves: pip install 'rse-fast[plot]'")
    model = load_model(out, device=trainer.ranks.device)
    row = {"event": "end", "step": trainer.step, **saved.best_so_far, "test_images": len(trainer.splits.test)}
    seed = data.derived_seed(config.seed, _TEST_STREAM)
    torch.manual_seed(seed)
    row["test_accuracy"] = _accuracy(lambda x, _: model(x).argmax(-1), trainer)
    if config.noisy:
        ensemble = Ensemble(model, draws=_TEST_DRAWS, seed=seed)
        row |= {"draws": _TEST_DRAWS, "test_ensemble_accuracy": _accuracy(lambda x, i: ensemble.predict(x, image_offset=i).labels, trainer)}
    return row


@torch.no_grad()
def _accuracy(predict, trainer):
    correct, seen = 0, 0
    for images, labels in data.batches(trainer.splits.test, trainer.config.batch_size, device=trainer.ranks.device):
        correct += (predict(images, seen) == labels).sum().item()
        seen += len(labels)
    return correct / max(seen, 1)


def _start_row(trainer, begun):
    config, ranks = trainer.config, trainer.ranks
    return {
        "event": "resume" if begun else "start", "step": trainer.step, "defence": config.defence, "model": config.model,
        "parameters": sum(p.numel() for p in trainer.model.parameters()), "processes": ranks.size, "device": str(ranks.device),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def _progress(trainer):
    from tqdm import tqdm

    return tqdm(total=trainer.total_steps, initial=trainer.step, desc=trainer.config.defence, unit="step", disable=None)


# ----------------------------------------------------------------------------------------------------------------- what is kept
class _Saved:
    """The checkpoints and the best weights of a run; rank 0 writes, all read."""

    def __init__(self, out: Path, config: Config, ranks: Ranks):
        self.out, self.config, self.ranks = out, config, ranks
        self.best_so_far: dict = {}

    def checkpoint(self, trainer: Trainer) -> None:
        state = trainer.state_dict() | {"best": self.best_so_far}
        if self.ranks.main:
            parts = {"model": checkpoint.weights(trainer.model)}
            if trainer.average is not None:
                parts["average"] = checkpoint.weights(trainer.average.module)
            if not all(bool(tensor.isfinite().all()) for part in parts.values() for tensor in part.values()):
                raise FloatingPointError(f"training diverged: weights are not finite at step {trainer.step}; try a smaller lr or sigma")
            checkpoint.save(self.out / "checkpoints", trainer.step, self.config.fingerprint, parts, state, self.config.keep)

    def best(self, trainer: Trainer, row: dict) -> None:
        """Keeps the weights if the validation accuracy, under attack where that is trained for, is the highest so far.

        Written before the checkpoint that knows of it: a run that is killed in between repeats the epoch and writes the same again.
        """
        score = row["val_attacked_accuracy" if self.config.adversarial else "val_accuracy"]
        if score > self.best_so_far.get("best_score", -1.0):
            self.best_so_far = {"best_score": score, "best_epoch": trainer.epoch}
            if self.ranks.main:
                from safetensors.torch import save

                metadata = {name: str(value) for name, value in self.best_so_far.items()}
                content = save(checkpoint.weights(trainer.evaluated), metadata)
                data.write_atomically(self.out / "best.safetensors", lambda file: file.write(content))

    def restore(self, trainer: Trainer, step: int | None) -> bool:
        """Brings the trainer where a checkpoint was taken; False if the run has none yet."""
        folder = self.out / "checkpoints"
        if step is None and not checkpoint.find(folder):
            return False
        parts, state = checkpoint.newest(folder, self.config.fingerprint, step)
        _load_weights(trainer.model, parts["model"], folder)
        if trainer.average is not None:
            _load_weights(trainer.average.module, parts["average"], folder)
        self.best_so_far = state.pop("best")
        path = self.out / "best.safetensors"
        if path.exists():  # it may be of an epoch after the checkpoint, whose accuracy the run does not reach again
            found = _read_metadata(path)
            if found["best_score"] > self.best_so_far.get("best_score", -1.0):
                self.best_so_far = found
        trainer.load_state_dict(state)
        return True


def _load_weights(model, tensors, source):
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise checkpoint.CheckpointError(f"the weights in {str(source)!r} do not fit the model: {reason}") from error


def _read_weights(path):
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # safetensors has errors of its own beside OSError
        raise checkpoint.CheckpointError(f"cannot read the weights in {str(path)!r}: {error}") from error


def _read_metadata(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            found = file.metadata()
        return {"best_score": float(found["best_score"]), "best_epoch": int(found["best_epoch"])}
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise checkpoint.CheckpointError(f"cannot read the weights in {str(path)!r}: {error!r}") from error


def _read_facts(run):
    """What data.json says of the data that a run is of."""
    path = run / "data.json"
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not {"classes", "shape", "train"} <= found.keys():
            raise ValueError("expected the facts about a data set")
        return found
    except (OSError, ValueError) as error:
        raise ValueError(f"run: cannot read {str(path)!r}: {error}") from error


@contextmanager
def _stop_signals():
    """Yields a list that fills with the names of SIGTERM and SIGINT as they come; a second Ctrl-C interrupts at once."""
    came: list[str] = []

    def note(number, frame):
        if signal.SIGINT == number and came:
            raise KeyboardInterrupt
        came.append(signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread, which alone may set handlers
        before = {}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
