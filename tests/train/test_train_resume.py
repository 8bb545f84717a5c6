"""Nothing is lost: a run that is killed, stopped or out of disk space continues bit for bit; what is not its checkpoint is refused."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from children import fork
from tiny_training import config, same, without_times, write_images

pytest.importorskip("tqdm")
safetensors = pytest.importorskip("safetensors.torch")

from rse_fast import data  # noqa: E402
from rse_fast.train import CheckpointError, Config, checkpoint, load_model, train  # noqa: E402
from rse_fast.train.command import main  # noqa: E402
from rse_fast.train.log import read  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run of everything that has state, never interrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    settings = config(images, ema=0.9, sigma_warmup=2.5, draws=2, clip=1.0, save_steps=1, keep=2)
    assert train(settings, out)["event"] == "end"
    torch.set_num_threads(threads)
    return out, settings


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def assert_equal_runs(out: Path, other: Path) -> None:
    """Same log, same best weights, same state of optimiser, schedule and averages at the end."""
    assert without_times(read(out / "log.jsonl")) == without_times(read(other / "log.jsonl"))
    assert (out / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()
    fingerprint = Config.load(out / "config.json").fingerprint
    (parts, state), (other_parts, other_state) = (checkpoint.newest(folder / "checkpoints", fingerprint) for folder in (out, other))
    assert all(same(parts[name], other_parts[name]) for name in ("model", "average"))
    assert state["step"] == other_state["step"] == 24 and state["scheduler"] == other_state["scheduler"]
    momenta = [[s["momentum_buffer"] for s in st["optimizer"]["state"].values()] for st in (state, other_state)]
    assert momenta[0] and all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


def test_killed_at_ten_random_points_the_run_ends_with_the_same_bits(whole, tmp_path, rng):
    out, settings = whole
    folder = tmp_path / "run" / "checkpoints"

    def progress() -> int:
        found = checkpoint.find(folder)
        return checkpoint._step(found[0]) if found else 0

    for _ in range(10):
        # Two checkpoints or fewer after it began, and a little later: also while a checkpoint is written.
        goal = min(progress() + rng.integers(3), 23)
        child = fork(lambda: train(settings, tmp_path / "run", resume=(tmp_path / "run" / "config.json").exists()))
        while progress() < goal and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it ended before it was killed"
    assert progress() > 4
    assert train(settings, tmp_path / "run", resume=True)["event"] == "end"
    assert_equal_runs(out, tmp_path / "run")
    assert not [name for name in os.listdir(tmp_path / "run" / "checkpoints") if name.startswith(".")]
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_two_processes_do_not_train_in_one_folder(run, whole, capsys):
    shutil.rmtree(checkpoint.find(run / "checkpoints")[0])
    inside, outside = os.pipe()

    def train_and_wait():
        with data.claim(run / ".lock"):
            os.write(outside, b"!")
            time.sleep(60)

    child = fork(train_and_wait)
    os.read(inside, 1)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["--trust", "--resume", str(run), "--from-step", "23"]) == 2
    assert "another process is writing" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (run / ".log.jsonl.0a1b2c3d.tmp").write_text("what a killed process leaves")
    assert main(["--trust", "--resume", str(run), "--from-step", "23"]) == 0
    assert_equal_runs(whole[0], run)
    assert not list(run.glob(".*.tmp"))


def test_sigterm_saves_in_mid_epoch_and_exits_0(whole, tmp_path):
    out, settings = whole
    slow = dataclasses.replace(settings, save_steps=None)  # where checkpoints lie does not enter the result
    slow.save(tmp_path / "config.json")
    # The signal comes from within, at the 9th step, of 6 an epoch: a moment that a timer could not hit.
    code = (
        "import os, signal, sys, torch; from rse_fast.train import Trainer, command; advance = Trainer.advance\n"
        "torch.set_num_threads(1)\n"
        "def interrupted(self):\n"
        "    if self.step == 9: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return advance(self)\n"
        "Trainer.advance = interrupted; sys.exit(command.main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    command = [sys.executable, "-c", code, "--trust", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "stopped at step 10 and saved" in done.stdout and "--resume" in done.stdout
    assert [path.name for path in checkpoint.find(tmp_path / "run" / "checkpoints")] == ["step-00000010", "step-00000006"]
    assert read(tmp_path / "run" / "log.jsonl")[-1]["event"] == "stop"
    assert main(["--trust", "--resume", str(tmp_path / "run")]) == 0
    assert_equal_runs(out, tmp_path / "run")


def test_a_complete_run_is_left_alone(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert train(Config.load(run / "config.json"), run, resume=True)["event"] == "end"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_last_k_are_kept_and_hold_no_pickle_that_needs_trust(whole):
    out, settings = whole
    found = checkpoint.find(out / "checkpoints")
    assert [path.name for path in found] == ["step-00000024", "step-00000023"]
    for path in found:
        assert {file.name for file in path.iterdir()} == {"model.safetensors", "average.safetensors", "state.pt", "manifest.json"}
        state = torch.load(path / "state.pt", weights_only=True)
        assert state["step"] == int(path.name[5:]) and {"optimizer", "scheduler", "epoch"} <= state.keys()
        assert "0.weight" in safetensors.load_file(path / "model.safetensors")


DAMAGE = {
    "cut": (lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-7]), "bytes instead of"),
    "cut state": (lambda path: (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:100]), "bytes instead of"),
    "empty": (lambda path: (path / "average.safetensors").write_bytes(b""), "bytes instead of"),
    "one bit": (lambda path: flip_one_bit(path / "model.safetensors"), "SHA-256"),
    "a file is missing": (lambda path: (path / "state.pt").unlink(), "should hold"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "no JSON": (lambda path: (path / "manifest.json").write_text("{"), "cannot be read"),
    "another format": (lambda path: change_manifest(path, format="rse-fast checkpoint 9"), "format"),
    "another run": (lambda path: change_manifest(path, run="0" * 16), "another configuration"),
    "a pickle": (lambda path: (path / "more.pkl").write_bytes(b"."), "should hold"),
}


def flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def change_manifest(path: Path, **values) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | values))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_refused_and_the_previous_one_offered(run, damage, capsys):
    change, words = DAMAGE[damage]
    newest, previous = checkpoint.find(run / "checkpoints")
    change(newest)
    drop_end(run)
    assert main(["--trust", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert newest.name in said and words in said
    assert "step 23 before it is whole" in said and "--from-step" in said
    with pytest.raises(CheckpointError, match="refused"):
        load_model(run, "last", trust=True)


def test_the_offer_is_good(run, whole, capsys):
    newest, previous = checkpoint.find(run / "checkpoints")
    flip_one_bit(newest / "model.safetensors")
    drop_end(run)
    assert main(["--trust", "--resume", str(run), "--from-step", "23"]) == 0
    assert_equal_runs(whole[0], run)


def drop_end(run: Path) -> None:
    """As if the run had been killed before its end."""
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[:-1]))


def test_killed_between_two_checkpoints_of_one_step_the_first_is_there(run, whole):
    """The only one was moved aside, and the other of its step was not in its place yet."""
    folder = run / "checkpoints"
    newest, previous = checkpoint.find(folder)
    shutil.rmtree(newest)
    moved = previous.rename(folder / f".{previous.name}.old")
    shutil.copytree(moved, folder / f".{previous.name}.0123abcd")  # the other one
    drop_end(run)
    assert checkpoint.find(folder) == [moved]
    assert train(Config.load(run / "config.json"), run, resume=True)["event"] == "end"
    assert_equal_runs(whole[0], run)
    assert [path.name for path in folder.iterdir()] == ["step-00000024"]  # nothing hidden is left


def test_nothing_is_offered_where_nothing_is_whole(run, capsys):
    for path in checkpoint.find(run / "checkpoints"):
        flip_one_bit(path / "state.pt")
    drop_end(run)
    assert main(["--trust", "--resume", str(run)]) == 2
    assert "there is no whole one" in capsys.readouterr().err
    assert main(["--trust", "--resume", str(run), "--from-step", "5"]) == 2
    assert "no checkpoint of step 5" in capsys.readouterr().err


def test_another_configuration_does_not_continue_a_run_but_another_machine_does(run, whole, capsys):
    drop_end(run)
    assert main(["--trust", "--resume", str(run), "--lr", "0.06"]) == 2
    assert "another configuration" in capsys.readouterr().err
    assert main(["--trust", "--resume", str(run), "--keep", "1"]) == 0
    assert_equal_runs(whole[0], run)


def test_a_complete_run_of_another_configuration_is_not_taken_for_this_one(run, capsys):
    assert main(["--trust", "--resume", str(run), "--epochs", "9"]) == 2
    assert "epochs 4 there, 9 here" in capsys.readouterr().err


def test_going_on_from_an_earlier_step_leaves_the_later_ones(run, whole):
    """Or the next resume would go on from a branch that was left, and a new checkpoint be the one too many."""
    drop_end(run)
    folder = run / "checkpoints"
    assert [path.name[-2:] for path in checkpoint.find(folder)] == ["24", "23"]
    settings = Config.load(run / "config.json")
    parts, state = checkpoint.newest(folder, settings.fingerprint, 23)
    checkpoint.save(folder, 7, settings.fingerprint, parts, state, keep=2)
    assert [path.name[-2:] for path in checkpoint.find(folder)] == ["07"]


def test_a_new_run_does_not_take_the_checkpoints_of_another_folder_for_its_own(run, capsys):
    settings = Config.load(run / "config.json")
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match="holds a run already"):
        train(settings, run)


def test_the_best_epoch_that_is_told_is_that_of_the_weights(run):
    """Killed between the best weights and their checkpoint, and not as good when the epoch is repeated, as with other processes."""
    drop_end(run)
    stored = safetensors.load_file(run / "best.safetensors")
    checkpoint.save_best(run / "best.safetensors", stored, 1.5, 3)
    row = train(Config.load(run / "config.json"), run, resume=True, from_step=23)
    assert row["best_score"] == 1.5 and row["best_epoch"] == 3


def test_a_lost_log_does_not_keep_a_run_from_its_end(run):
    (run / "log.jsonl").unlink()
    assert train(Config.load(run / "config.json"), run, resume=True)["event"] == "end"


def test_weights_that_are_not_finite_replace_no_checkpoint(run, monkeypatch):
    drop_end(run)
    settings = Config.load(run / "config.json")
    before = [path.name for path in checkpoint.find(run / "checkpoints")]
    step = torch.optim.SGD.step

    def diverges(self, *args):
        step(self, *args)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))

    monkeypatch.setattr(torch.optim.SGD, "step", diverges)
    with pytest.raises(FloatingPointError, match="diverged"):
        train(settings, run, resume=True, from_step=23)
    assert [path.name for path in checkpoint.find(run / "checkpoints")] == before


def test_sigterm_to_the_whole_group_is_the_parents_alone(tmp_path, rng):
    """As torchrun sends it: workers that decode images outlive it, so that the parent can save."""
    Image = pytest.importorskip("PIL.Image")
    for kind in ("a", "b"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for i in range(60):
            picture = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "images" / kind / f"{i}.png")
    command = [
        sys.executable, "-m", "rse_fast.cli", "train", "--data", str(tmp_path / "images"), "--lazy", "--resize", "8", "--workers", "1",
        "--model", "tiny_training:net", "--batch-size", "8", "--epochs", "500", "--device", "cpu", "--log-steps", "1", "--out",
        str(tmp_path / "run"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and len(read(log)) < 20:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "and saved" in out, error
    assert checkpoint.find(tmp_path / "run" / "checkpoints")[0].name == f"step-{read(log)[-1]['step']:08}"


def test_other_images_do_not_continue_a_run(tmp_path, rng, capsys):
    settings = config(write_images(tmp_path / "images.npz", rng), epochs=1)
    train(settings, tmp_path / "run")
    drop_end(tmp_path / "run")
    for number, held in ((120, 108), (150, 135)):  # as many others, and more
        write_images(tmp_path / "images.npz", rng, train=number)
        assert main(["--trust", "--resume", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert "data: expected what the run was trained on" in said and "'train': 108" in said and f"'train': {held}" in said


def test_images_that_moved_continue_a_run(run, whole, images, tmp_path, capsys):
    drop_end(run)
    moved = tmp_path / "elsewhere" / "other.npz"
    moved.parent.mkdir()
    shutil.copy(images, moved)
    assert main(["--trust", "--resume", str(run), "--data", str(moved)]) == 0
    assert_equal_runs(whole[0], run)
    assert Config.load(run / "config.json").data == str(moved)


def test_weights_of_another_model_are_refused(run):
    settings = dataclasses.replace(Config.load(run / "config.json"), model="tiny_training:net_without_batch_statistics")
    settings.save(run / "config.json")
    with pytest.raises(CheckpointError, match="do not fit the model"):
        load_model(run, trust=True)
    (run / "best.safetensors").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        load_model(run, trust=True)


@pytest.mark.parametrize("limit", [2000, 20_000], ids=["no room for weights", "no room for the rest"])
def test_full_disk_leaves_the_old_checkpoint(whole, tmp_path, limit):
    """A limit on the size of files stands for the full disk: writes fail half way, as they do there."""
    settings = whole[1]

    def stop_at_step_7():
        _stop_at(7, settings, tmp_path / "run")

    assert os.waitpid(fork(stop_at_step_7), 0)[1] == 0
    before = checkpoint.find(tmp_path / "run" / "checkpoints")
    sizes = [file.stat().st_size for file in before[0].iterdir()]
    assert any(size > limit for size in sizes) or limit == 20_000

    def continue_without_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit < 10_000 else max(sizes) - 1, resource.RLIM_INFINITY))
        os._exit(main(["--trust", "--resume", str(tmp_path / "run")]))

    assert os.waitstatus_to_exitcode(os.waitpid(fork(continue_without_room), 0)[1]) == 1
    assert checkpoint.find(tmp_path / "run" / "checkpoints") == before
    assert not [name for name in os.listdir(tmp_path / "run" / "checkpoints") if name.startswith(".")]
    assert main(["--trust", "--resume", str(tmp_path / "run")]) == 0
    assert_equal_runs(whole[0], tmp_path / "run")


def _stop_at(step, settings, out):
    """Trains until SIGTERM comes at a step."""
    from rse_fast.train import Trainer

    advance = Trainer.advance

    def interrupted(self):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self)

    Trainer.advance = interrupted
    train(settings, out)


def test_a_run_folder_is_not_overwritten(run, whole, capsys):
    with pytest.raises(ValueError, match="^out: .*holds a run already"):
        train(whole[1], run)
    assert main(["--out", str(run)]) == 2
    assert "holds a run already" in capsys.readouterr().err
