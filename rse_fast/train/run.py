"""A run and its folder: what is logged and kept, how it stops, continues and ends.

The folder: ``config.json``; ``data.json`` (what was trained on); ``log.jsonl``; ``checkpoints/``; ``best.safetensors``, the weights of the
best epoch on the validation images, and ``temperature.json``, fitted on the same; ``curves.png``; with a distillation, ``teacher/``, a run
of its own.
"""

import dataclasses
import hashlib
import json
import signal
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from rse_fast import data, models
from rse_fast.cli import wrapper
from rse_fast.ensemble import Ensemble, fit_temperature, temperature
from rse_fast.outputs import take
from rse_fast.train import checkpoint, defences
from rse_fast.train.captured import advice
from rse_fast.train.config import Config
from rse_fast.train.distributed import Ranks, connect
from rse_fast.train.log import Log, draw_curves, read
from rse_fast.train.trainer import Trainer

_TEST_DRAWS = 10
_TEST_STREAM, _TEMPERATURE_STREAM = 4, 5  # of the seeds of a run


def train(config: Config, out: str | Path, *, resume: bool = False, from_step: int | None = None) -> dict:
    """Trains in the folder ``out``, as ``rse-fast train`` does.

    Under torchrun all processes call this; only rank 0 writes, all read the folder. SIGTERM and SIGINT save and stop the run while it
    trains. Before that, and during the test at its end, they do what they do elsewhere.

    Args:
        config: `rse_fast.train.Config`; its fields are the flags of ``rse-fast train``.
        out: the run folder. It must not hold a run, unless ``resume``.
        resume: continue the run in ``out`` from its newest checkpoint. A run that was killed before its first checkpoint begins anew, a
            complete one is left as it is. The configuration must be the run's own, except for what concerns the machine
            (`Config.fingerprint`). The data may have moved, but must be the same.
        from_step: continue from the checkpoint of this step instead.

    Returns:
        The last row of the run's log. Its "event" is "end", or "stop" after SIGTERM or Ctrl-C.

    Raises:
        ValueError: an argument is wrong; as its subclass `CheckpointError`, a checkpoint is damaged or of another run.
        FloatingPointError: the training diverged.
        OSError: a file cannot be written.
        ProcessLost: another process of the run is gone.

    Examples:
        >>> config = rse_fast.train.Config(data="digits", model="small", defence="rse", epochs=2)
        >>> rse_fast.train.train(config, "runs/small-rse")["test_accuracy"]
    """
    out = Path(out)
    with connect(config.device) as ranks:
        _check_folder(config, out, resume)
        if ranks.main:
            data.check_writable(out)
        teacher = None
        if config.defence == "distillation":
            plain = dataclasses.replace(config, defence="plain")
            _check_folder(plain, out / "teacher", resume)
            # from_step is the teacher's while that is under way, and the student's afterwards.
            row = _train(plain, out / "teacher", resume, from_step if _under_way(out / "teacher") else None, ranks, student=config)
            if row["event"] == "stop":
                return row
            teacher = load_model(out / "teacher", trust=True)  # its configuration is this one
        return _train(config, out, resume, from_step, ranks, teacher=teacher)


def _check_folder(config, out, resume):
    path = out / "config.json"
    if not resume and (path.exists() or checkpoint.find(out / "checkpoints")):
        raise ValueError(f"out: {str(out)!r} holds a run already; resume it, or name another folder")
    if path.exists() and (known := Config.load(path)).fingerprint != config.fingerprint:
        differing = [f"{name} {value!r} there, {new!r} here" for name, value, new in known.differences(config)]
        raise ValueError(f"resume: {str(out)!r} holds a run of another configuration ({'; '.join(differing)})")


def _under_way(run):
    rows = read(run / "log.jsonl")
    return bool(rows) and rows[-1]["event"] != "end"


def load_model(run: str | Path, which: str = "best", device: str | torch.device = "cpu", *, trust: bool = False) -> nn.Module:
    """The trained network of a run folder, with its defence built in.

    Args:
        run: folder that ``rse-fast train`` wrote.
        which: "best", the weights of the epoch with the best validation accuracy, or "last", those of the newest checkpoint.
        device: where the network shall be.
        trust: whether a model that the configuration names as package.module:function may be imported and called. That runs its code, so
            give True only for folders of authors whom you trust.

    Returns:
        An `nn.Module` in eval mode that maps float images [B, C, H, W] in [0, 1] to logits [B, K]. The noise of a noisy defence is on,
        with the sigmas that the configuration has for use.

    Raises:
        ValueError: the folder is not a run's, a file in it is damaged, or its model is code that is not trusted.

    Examples:
        >>> ensemble = rse_fast.Ensemble(rse_fast.train.load_model("runs/small-rse"), draws=10)
    """
    run = Path(run)
    if which not in ("best", "last"):
        raise ValueError(f"which: expected best or last, got {which!r}")
    config = Config.load(run / "config.json")
    if config.model not in models.MODELS and not trust:
        raise ValueError(
            f"trust: {str(run / 'config.json')!r} names the model {config.model!r}, code that would be imported and run; if you trust who "
            "wrote that folder: trust=True, or --trust on the command line"
        )
    facts = _read_facts(run)
    model = defences.protect(models.make(config.model, len(facts["classes"]), facts["shape"][0]), config)
    defences.use_test_sigma(model, config)
    if which == "best":
        checkpoint.load_best(run / "best.safetensors", model)
    else:
        parts, _ = checkpoint.newest(run / "checkpoints", config.fingerprint)
        checkpoint.give(model, parts.get("average", parts.get("model", {})), run)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout).eval()


def load_temperature(run: str | Path) -> float:
    """The temperature that was fitted at the end of a run, for ``Ensemble(..., temperature=)``.

    Args:
        run: folder that ``rse-fast train`` wrote.

    Returns:
        A number in [0.1, 10]; 1 for a run without one: it is not complete, is of an older version, or had every validation image right.

    Raises:
        ValueError: the file is damaged.

    Examples:
        >>> temperature = rse_fast.train.load_temperature("runs/small-rse")
    """
    path = Path(run) / "temperature.json"
    if not path.exists():
        return 1.0
    try:
        return temperature.check(data.read_json(path)["temperature"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"run: cannot read {str(path)!r}: {error}") from error


def is_validation_part(run: str | Path, part: data.Part) -> bool:
    """Whether a part of a data set holds the images by which a run's best epoch was chosen, and on which its temperature was fitted.

    Args:
        run: folder that ``rse-fast train`` wrote.
        part: a part of a data set, such as ``rse_fast.data.load(path).test``.

    Returns:
        True if images and labels are the same. Of images that are read lazily the labels alone are compared.

    Raises:
        ValueError: a file of the run is damaged.

    Examples:
        >>> if rse_fast.train.is_validation_part("runs/small-rse", part):
        ...     print("figures on this part look better than on new images")
    """
    return _read_facts(Path(run)).get("val_digest") == _digest(part)


def load_data(config: Config, moved: str | None = None, resize: int | tuple[int, int] | None = None) -> data.Splits:
    """The data set of a configuration, decoded and split as it says.

    Args:
        config: of a run.
        moved: path of the data, where it is not that of the configuration.
        resize: size of the images, where it is not that of the configuration: (height, width), or one number for both.

    Returns:
        A `rse_fast.data.Splits`.

    Raises:
        ValueError: the data cannot be read.
    """
    if moved is not None:
        images = Path(moved).is_dir()  # of a file, or digits, the size and place are given
        config = dataclasses.replace(config, data=moved, resize=config.resize if images else None, lazy=config.lazy and images)
    if resize is not None:
        config = dataclasses.replace(config, resize=resize)
    return data.load(
        config.data, resize=config.resize, val_fraction=config.val_fraction, workers=config.workers, lazy=config.lazy, progress=True
    )


# ---------------------------------------------------------------------------------------------------------------------- one run
def _train(config, out, resume, from_step, ranks: Ranks, teacher=None, student=None):
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
    with _writing(out, config, resume or teacher is not None) if ranks.main else nullcontext():
        log = None
        if ranks.main:
            data.write_atomically(out / "data.json", lambda file: file.write(json.dumps(facts, indent=1).encode()))
            config.save(out / "config.json")  # the last: with it, the folder is a run's
            if student is not None:  # whose folder is this one's parent, and a run's from now on: it can be continued
                student.save(out.parent / "config.json")
            log = Log(out, trainer.step if begun else 0, trainer.epoch)
        try:
            if log is not None:
                log.write(_start_row(trainer, begun))
                if student is None and (line := advice(config, ranks.device, ranks.size)) is not None:
                    print(line)
            before = next((row["cpu_seconds"] for row in reversed(read(out / "log.jsonl")) if "cpu_seconds" in row), 0.0)
            spent = _ProcessorTime(before)
            with _stop_signals() as stopped:
                row = _loop(trainer, saved, log, stopped, spent)
            if row["event"] != "stop":
                row = _end(trainer, saved, out) | {"cpu_seconds": spent()} if ranks.main else row
            if log is not None and row["event"] in ("stop", "end"):
                log.write(row)
            return row
        finally:
            if log is not None:
                log.close()


@contextmanager
def _writing(out, config, resume):
    """The folder is this thread's alone meanwhile. ValueError where another trains in it, or has done so since it was asked for."""
    out.mkdir(parents=True, exist_ok=True)
    with data.claim(out / ".lock"):  # not the log, which may be replaced
        _check_folder(config, out, resume)
        data.remove_leftovers(out)
        yield


def _digest(part):
    """SHA-256 of the labels in order and, where they are in memory, of the images: data that moved are the same, others are not."""
    digest = hashlib.sha256(part.labels.contiguous().numpy())
    if isinstance(part, data.Part):
        digest.update(part.images.contiguous().numpy())
    return digest.hexdigest()


class _ProcessorTime:
    """Seconds of processor time, all threads of this process, since it was made; before: of the calls that this one continues."""

    def __init__(self, before: float):
        self._began = time.process_time() - before

    def __call__(self) -> float:
        return round(time.process_time() - self._began, 3)


def _loop(trainer, saved, log, stopped, spent):
    """Trains to the end, or until a signal: then the state is saved and a row says so."""
    row = {"event": "epoch"}
    began, config = time.perf_counter(), trainer.config
    with wrapper.Progress(config.defence, trainer.total_steps, "step", trainer.step, shown=log is not None) as progress:
        while not trainer.complete:
            if trainer.ranks.any(bool(stopped)):
                saved.checkpoint(trainer)
                return {"event": "stop", "step": trainer.step, "signal": stopped[-1] if stopped else None}
            before = trainer.step
            found = trainer.advance()
            progress.update(trainer.step - before, "" if found is None else _figures(found, config))
            if found is not None:
                row = found | {"seconds": round(time.perf_counter() - began, 1), "cpu_seconds": spent()}
                if log is not None:
                    log.write(row)
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
    model = load_model(out, device=trainer.ranks.device, trust=True)  # the configuration is the caller's
    _keep_temperature(model, trainer, out)
    row = {"event": "end", "step": trainer.step, **saved.best_so_far, "test_images": len(trainer.splits.test)}
    seed = data.derived_seed(config.seed, _TEST_STREAM)
    torch.manual_seed(seed)
    row["test_accuracy"] = _accuracy(lambda x, _: take(model(x)).argmax(-1), trainer)
    if config.noisy:
        ensemble = Ensemble(model, draws=_TEST_DRAWS, seed=seed)
        row |= {"draws": _TEST_DRAWS, "test_ensemble_accuracy": _accuracy(lambda x, i: ensemble.predict(x, image_offset=i).labels, trainer)}
    return row


def _keep_temperature(model, trainer, out):
    """Fits the temperature of the ensemble, or of a network without noise, on the validation images."""
    config, val = trainer.config, trainer.splits.val
    classifier = lambda x: take(model(x)).float().log_softmax(-1)  # noqa: E731 - as an ensemble, it gives log-probabilities
    if config.noisy:
        classifier = Ensemble(model, draws=_TEST_DRAWS, seed=data.derived_seed(config.seed, _TEMPERATURE_STREAM))
    try:
        with warnings.catch_warnings():  # of few images all may be right, which says nothing of others
            warnings.filterwarnings("error", message="rse-fast: the best temperature is not within")
            found = fit_temperature(classifier, data.batches(val, config.batch_size, device=trainer.ranks.device))
    except (ValueError, RuntimeWarning) as error:
        print(f"no temperature is kept: {error}")
        return
    facts = {"temperature": found, "draws": _TEST_DRAWS if config.noisy else None, "images": len(val)}
    data.write_atomically(out / "temperature.json", lambda file: file.write(json.dumps(facts).encode()))


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


def _figures(row, config):
    """What a row of the log says of epoch, loss and accuracy, in words."""
    names = {"loss": "loss {:.3g}", "val_accuracy": "validation accuracy {:.1%}", "val_attacked_accuracy": "attacked {:.1%}"}
    known = [text.format(row[name]) for name, text in names.items() if row.get(name) is not None]
    return ", ".join([f"epoch {row['epoch']:.3g} of {config.epochs}", *known])


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
                (self.out / "temperature.json").unlink(missing_ok=True)  # of other weights
                checkpoint.save_best(self.out / "best.safetensors", checkpoint.weights(trainer.evaluated), score, trainer.epoch)

    def restore(self, trainer: Trainer, step: int | None) -> bool:
        """Brings the trainer where a checkpoint was taken; False if the run has none yet."""
        folder = self.out / "checkpoints"
        if step is None and not checkpoint.find(folder):
            return False
        parts, state = checkpoint.newest(folder, self.config.fingerprint, step)
        path = self.out / "best.safetensors"
        try:
            best = checkpoint.load_best(path, trainer.evaluated) if path.exists() else {}
            checkpoint.give(trainer.model, parts["model"], folder)
            if trainer.average is not None:
                checkpoint.give(trainer.average.module, parts["average"], folder)
            self.best_so_far = dict(state.pop("best"))
            if best and best["best_score"] > self.best_so_far.get("best_score", -1.0):
                self.best_so_far = best  # of an epoch after the checkpoint, whose accuracy the run does not reach again
            trainer.load_state_dict(state)
        except checkpoint.CheckpointError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise checkpoint.CheckpointError(f"the checkpoints in {str(folder)!r} are not of such a run ({error!r})") from error
        return True


def _read_facts(run):
    """What data.json says of the data that a run is of."""
    path = run / "data.json"
    try:
        found = data.read_json(path)
        if not isinstance(found, dict) or not {"classes", "shape", "train"} <= found.keys():
            raise ValueError("expected the facts about a data set")
        classes, shape = found["classes"], found["shape"]
        if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
            raise ValueError("expected at least two names of classes")
        if not isinstance(shape, list) or len(shape) != 3 or not all(type(side) is int and 0 < side <= 2**16 for side in shape):
            raise ValueError("expected a shape [channels, height, width]")
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
