"""Training by several processes: what they compute together is what one computes, and only the first writes."""

import dataclasses
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from children import fork, status
from tiny_training import config, same, without_times

pytest.importorskip("tqdm")
safetensors = pytest.importorskip("safetensors.torch")

from rse_fast.train import Config, Trainer, checkpoint, load_data, train  # noqa: E402
from rse_fast.train.command import main  # noqa: E402
from rse_fast.train.distributed import connect  # noqa: E402
from rse_fast.train.log import read  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not (torch.distributed.is_available() and hasattr(os, "fork")), reason="needs torch.distributed and fork"),
]

BARE = "tiny_training:net_without_batch_statistics"  # each process would have BatchNorm's statistics of its own share
_PATIENCE = 240  # seconds that a process may take
PLAIN = {"defence": "plain", "model": BARE}


@pytest.fixture(scope="module")
def images(images):
    train(config(images, epochs=1), images.parent / "run")  # what a run imports, the children find imported
    return images


@pytest.fixture
def together(tmp_path):
    """``together(work, size=2)``: the results of ``work(rank)`` in so many processes that know of each other as torchrun's do."""

    def run(work, size=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [_fork(work, rank, size, port, tmp_path / f"result-{rank}") for rank in range(size)]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        results = [(tmp_path / f"result-{rank}").read_text() for rank in range(size)]
        assert statuses == [0] * size, "\n".join(results)
        return [json.loads(result) for result in results]

    return run


def _fork(work, rank, size, port, result: Path) -> int:
    """A child of this process, which has torch already: ten times as fast as a new interpreter."""
    child = os.fork()
    if child:
        return child
    try:
        faulthandler.dump_traceback_later(_PATIENCE, exit=True, file=open(result, "w"))  # processes that wait for each other in vain
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo")  # once: a second one at the same port could meet the first
        result.write_text(json.dumps(work(rank)))
        os._exit(0)
    except BaseException:
        result.write_text(traceback.format_exc())
        os._exit(1)


def finish(settings: Config) -> tuple[list[dict], dict]:
    """All rows of a run in memory, and the weights it ends with."""
    with connect("cpu") as ranks:
        trainer = Trainer(settings, load_data(settings), ranks)
        rows = []
        while not trainer.complete:
            rows.append(trainer.advance())
        return [row for row in rows if row], {name: value.tolist() for name, value in trainer.model.state_dict().items()}


def difference(a: list[dict], b: list[dict]) -> float:
    """The largest relative difference of the losses of two runs."""
    assert len(a) == len(b) and [row["event"] for row in a] == [row["event"] for row in b]
    return max(abs(x[name] / y[name] - 1) for x, y in zip(a, b, strict=True) for name in x if "loss" in name)


# -------------------------------------------------------------------------------------------------------------- as torchrun starts it
def test_torchrun_trains_continues_and_leaves_the_run_of_one_process(images, tmp_path):
    settings = config(images, epochs=2, **PLAIN)
    train(settings, tmp_path / "one")
    settings.save(tmp_path / "config.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "tiny_training", "train"]
    command += ["--trust", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best epoch") == 1  # one of them speaks
    assert done.stdout.count("threads left: []") == 2  # one that is left can abort the process while the interpreter shuts down
    assert read(tmp_path / "two" / "log.jsonl")[0]["processes"] == 2
    one, two = (without_times(read(tmp_path / name / "log.jsonl")) for name in ("one", "two"))
    assert difference(one, two) < 1e-3 and one[-1]["best_epoch"] == two[-1]["best_epoch"]
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (tmp_path / "one", tmp_path / "two")]
    assert [[name for name in names if "tensorboard" not in name] for names in files][0] == [n for n in files[1] if "tensorboard" not in n]


# ---------------------------------------------------------------------------------------------------------------------- the same loss
@pytest.mark.parametrize("fields", [{}, {"draws": 2, "clip": 0.1, "label_smoothing": 0.1, "ema": 0.9}, {"defence": "adversarial"}], ids=str)
def test_without_noise_two_processes_have_the_loss_curve_of_one(images, together, fields):
    """A random start of the attack would be another on each: fgsm has none."""
    settings = config(images, lr=0.2, epochs=2, log_steps=1, attack="fgsm", eps=0.02, **(PLAIN | fields))
    (one, weights), ((two, first), (_, second)) = finish(settings), together(lambda rank: finish(settings))
    assert len(one) == 2 * 7 and abs(one[0]["loss"] - one[-2]["loss"]) > 0.01  # it learned
    assert first == second  # to the last bit
    # float32 sums in another order, which training amplifies (1e-5 to 1e-4 here).
    assert difference(one, two) < 1e-3
    for name, value in weights.items():
        assert np.allclose(value, first[name], rtol=1e-3, atol=1e-3), name


def test_with_noise_the_loss_curves_agree_on_average(images, together):
    """Eight runs: of the paired differences in loss, in training and in validation, the mean is 0 within its error."""
    runs = [config(images, model=BARE, lr=0.2, epochs=2, log_steps=50, seed=seed, init_sigma=0.3, inner_sigma=0.3) for seed in range(8)]
    one = [finish(settings)[0] for settings in runs]
    two = together(lambda rank: [finish(settings)[0] for settings in runs])[0]
    for name in ("loss", "val_loss"):
        curves = [np.array([[row[name] for row in rows if row["event"] == "epoch"] for rows in side]) for side in (one, two)]
        apart = (curves[0] - curves[1]).mean(1)
        assert (apart != 0).all()
        assert abs(apart.mean()) < 8 * apart.std(ddof=1) / np.sqrt(len(runs)), (name, apart)


def test_noise_and_attacks_differ_between_processes(tmp_path, together):
    """All images are equal: without noise so are the rows of all processes, with noise no two are."""
    pixels = np.full((60, 3, 8, 8), 100, np.uint8)
    np.savez(tmp_path / "equal.npz", train_images=pixels, train_labels=np.arange(60) % 2, test_images=pixels, test_labels=np.arange(60) % 2)

    def outputs(rank):
        seen = {}
        for name, fields in {
            "plain": {"defence": "plain"}, "rse": {"defence": "rse"}, "pgd": {"defence": "adversarial", "attack_steps": 1},
            "brelu": {"defence": "brelu"},
        }.items():  # fmt: skip
            settings = config(tmp_path / "equal.npz", model=BARE, batch_size=6, **fields)
            with connect("cpu") as ranks:
                trainer = Trainer(settings, load_data(settings), ranks)
                trainer.splits = dataclasses.replace(trainer.splits, pad=0, flip=False)
                rows = []
                trainer.model.register_forward_hook(lambda _, args, out, rows=rows: rows.append(out.tolist()))
                for _ in range(2):
                    trainer.advance()
                seen[name] = rows
        return seen

    first, second = together(outputs)
    for name in first:
        rows = {tuple(row) for side in (first, second) for call in side[name][:2] for row in call}
        calls = 1 if name == "plain" else 2
        assert len(rows) == (2 if name == "plain" else 2 * calls * 3), name  # plain: a value for each step


# --------------------------------------------------------------------------------------------------------------------- the run folder
def watch_writes(folder: Path) -> list[str]:
    """Fills with whatever this process makes, changes or removes in ``folder``, from now to its end."""
    seen = []

    def note(event, args):
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.utime")
        if event == "open":
            writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and str(args[0]).startswith(str(folder)):
            seen.append(f"{event} {args[0]}")

    sys.addaudithook(note)
    return seen


def test_only_the_first_process_writes(images, tmp_path, together):
    settings = config(images, epochs=2, ema=0.9, save_steps=2, keep=2)

    def work(rank):
        seen = watch_writes(tmp_path / "run")
        assert train(settings, tmp_path / "run")["event"] in ("epoch", "end")
        return seen

    first, second = together(work)
    assert len(first) > 20 and any("best.safetensors" in what for what in first)
    assert second == []


def stop_at(step: int, rank: int) -> None:
    """SIGTERM comes to the process ``rank`` when it has made ``step`` steps."""
    advance = Trainer.advance

    def interrupted(self):
        if self.step == step and self.ranks.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self)

    Trainer.advance = interrupted


def test_a_signal_to_one_process_stops_all_at_one_step_and_one_process_goes_on(images, tmp_path, together):
    """Nine of twelve steps by two processes, three by one; and the other way round."""
    settings = config(images, epochs=2, lr=0.2, log_steps=1, ema=0.9, **PLAIN)
    train(settings, tmp_path / "one")

    def begun(rank):
        stop_at(8, rank=1)
        row = train(settings, tmp_path / "fewer")
        return row["event"], row["step"]

    assert together(begun) == [["stop", 9], ["stop", 9]]
    assert main(["--trust", "--resume", str(tmp_path / "fewer")]) == 0

    assert _stops(settings, tmp_path / "more")
    together(lambda rank: train(settings, tmp_path / "more", resume=True)["event"])

    expected = without_times(read(tmp_path / "one" / "log.jsonl"))
    for name, processes in (("fewer", [2, 1]), ("more", [1, 2])):
        rows = read(tmp_path / name / "log.jsonl")
        assert [row["processes"] for row in rows if row["event"] in ("start", "resume")] == processes
        assert difference(without_times(rows), expected) < 1e-3
        best = [safetensors.load_file(tmp_path / run / "best.safetensors") for run in (name, "one")]
        assert all(torch.allclose(best[0][key], best[1][key], rtol=1e-3, atol=1e-3) for key in best[1])


def _stops(settings, out) -> bool:
    """In a process of its own, for which a signal is."""

    def work():
        stop_at(8, rank=0)
        return train(settings, out)["event"] != "stop"

    return status(fork(work)) == 0


@pytest.mark.parametrize("defence", ["rse", "rse+adversarial"])
def test_two_processes_continue_bit_for_bit(images, tmp_path, together, defence):
    """Also with BatchNorm, of which each has its own statistics, from the last step of an epoch on, before validation."""
    settings = config(images, epochs=2, ema=0.9, defence=defence, attack_steps=1, save_steps=3, log_steps=1)
    together(lambda rank: train(settings, tmp_path / "whole")["event"])
    fingerprint = settings.fingerprint

    def continued(rank):
        stop_at(5, rank=1)
        train(settings, tmp_path / "run")  # stops behind step 6, the last of the epoch
        return train(settings, tmp_path / "run", resume=True)["event"]

    assert together(continued)[0] == "end"
    logs = [without_times(read(tmp_path / name / "log.jsonl")) for name in ("whole", "run")]
    assert logs[0] == logs[1]
    stored = [checkpoint.newest(tmp_path / name / "checkpoints", fingerprint)[0] for name in ("whole", "run")]
    assert all(same(stored[0][part], stored[1][part]) for part in ("model", "average"))


def test_a_batch_that_does_not_divide_is_named(images, tmp_path, together):
    def work(rank):
        return main(["--trust", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")])

    config(images, batch_size=17).save(tmp_path / "config.json")
    assert together(work) == [2, 2] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("dies", [0, 1])
def test_after_a_process_died_the_other_says_how_to_go_on(images, tmp_path, dies):
    settings = config(images, epochs=2, **PLAIN)
    settings.save(tmp_path / "config.json")

    def work(rank):
        if rank == dies:
            advance = Trainer.advance

            def killed(self):
                if self.step == 8:
                    os.kill(os.getpid(), signal.SIGKILL)
                return advance(self)

            Trainer.advance = killed
        sys.stderr = open(tmp_path / "said", "a", buffering=1)
        return main(["--trust", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")])

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(work, rank, 2, port, tmp_path / f"result-{rank}") for rank in (0, 1)]
    statuses = list(map(status, children))
    assert statuses[dies] == -signal.SIGKILL and statuses[1 - dies] == 1, (tmp_path / f"result-{1 - dies}").read_text()
    (said,) = [line for line in (tmp_path / "said").read_text().splitlines() if "rse-fast" in line]
    assert said.startswith("rse-fast train: another process of this run has died or cannot be reached (")
    assert said.endswith(f"rse-fast train --resume {tmp_path / 'run'} --trust")
    assert "Traceback" not in (tmp_path / "said").read_text()
    assert main(said.split("rse-fast train ")[1].split()) == 0
    assert read(tmp_path / "run" / "log.jsonl")[-1]["event"] == "end"
