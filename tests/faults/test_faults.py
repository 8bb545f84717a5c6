"""What a machine does to a run: a full disk, a folder that cannot be written, another process, memory that runs out."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from children import fork, status
from test_kills import COMMANDS, arguments, content, differing
from torch import nn

import rse_fast
from rse_fast import Ensemble, cli
from rse_fast.nn import GaussianNoise

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
RESULTS = {"predict": "predictions-0.jsonl", "certify": "certified.tsv", "evaluate": "rows-0.jsonl", "train": "log.jsonl"}


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of so many bytes at ``folder``. Where this user may not mount one the test is skipped."""
    folder.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True).returncode
    ):
        pytest.skip("may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def said(capfd, command, out):
    """Status of the command, and what it says."""
    capfd.readouterr()
    ended = cli.main(arguments(command, out))
    return ended, capfd.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_sentence_and_loses_nothing(command, tmp_path, capfd):
    assert status(fork(lambda: cli.main(arguments(command, tmp_path / "whole")))) == 0
    with small_disk(tmp_path / "disk", 2**16):
        out = tmp_path / "disk" / "run"
        (tmp_path / "disk" / "ballast").write_bytes(bytes(11 * 4096))  # a few pages are left
        ended, error = said(capfd, command, out)
        assert ended == 1 and "Traceback" not in error and "No space left on device" in error
        assert error.count("rse-fast") == 1 and str(out) in error
        subprocess.run(["mount", "-o", "remount,size=64M", tmp_path / "disk"], check=True)  # room again: the same command goes on
        assert status(fork(lambda: cli.main(arguments(command, out)))) == 0
        assert not differing(command, content(command, tmp_path / "whole"), content(command, out))


def locked(path):
    """Whether a process holds a lock on the file: there is a moment between making the file and locking it."""
    return path.exists() and f":{path.stat().st_ino} " in Path("/proc/locks").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_do_not_work_in_one_folder(command, tmp_path, capfd):
    out = tmp_path / "out"
    first = fork(lambda: cli.main(arguments(command, out)))
    try:
        lock = out / (".lock" if command == "train" else RESULTS[command])
        while not locked(lock) and os.waitpid(first, os.WNOHANG) == (0, 0):
            pass
        os.kill(first, signal.SIGSTOP)
        ended, error = said(capfd, command, out)
        assert ended == 2 and "another process is writing" in error and "Traceback" not in error
    finally:
        os.kill(first, signal.SIGCONT)
    assert status(first) == 0
    assert status(fork(lambda: cli.main(arguments(command, tmp_path / "whole")))) == 0
    assert not differing(command, content(command, tmp_path / "whole"), content(command, out))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_is_named(command, tmp_path, capfd):
    """Also as root, who may write everywhere: below what is a file, there is no folder."""
    (tmp_path / "file").write_text("")
    ended, error = said(capfd, command, tmp_path / "file" / "run")
    assert ended == 2 and "cannot write in" in error and "--out" in error and "Traceback" not in error
    assert (tmp_path / "file").read_text() == "" and os.listdir(tmp_path) == ["file"]


class SometimesFull(GaussianNoise):
    """A layer that finds no memory the first time, then at random, as on a device that others use; always some for a few rows."""

    def __init__(self, rng):
        super().__init__(0.1)
        self.chance, self.failed, self.lock = rng, 0, threading.Lock()

    def __deepcopy__(self, memo):
        return self  # a snapshot's counts here

    def forward(self, x):
        wanted = x.device.type != "meta" and len(x) > 4 and self.chance is not None
        if wanted and (not self.failed or self.chance.random() < 0.5):
            self.failed += 1
            raise torch.OutOfMemoryError("injected")
        return super().forward(x)


@pytest.mark.parametrize("how", [None, "exact"])
def test_memory_that_runs_out_at_random_changes_no_result(how, rng):
    torch.manual_seed(int(rng.integers(2**31)))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    model, x = rse_fast.convert(net.eval(), 0.3, 0.3), torch.rand(9, 3, 8, 8)
    model.insert(1, full := SometimesFull(None))
    expected = Ensemble(model, 8, seed=3, dtype="float32", early_exit=how, fuse=False).predict(x)
    full.chance = rng
    for _ in range(5):
        found = Ensemble(model, 8, seed=3, dtype="float32", early_exit=how, fuse=False).predict(x)
        assert torch.equal(found.labels, expected.labels) and torch.equal(found.draws_used, expected.draws_used)
        assert (found.probs - expected.probs).abs().max() < 1e-6  # float32 sums of other sizes of batch
    assert full.failed


def test_an_address_space_that_is_too_small_for_a_batch(tmp_path):
    """The allocator's own error, in a process that may take but a little more memory than it has."""
    torch.manual_seed(0)
    model = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)).eval())
    x = torch.rand(16, 3, 128, 128)
    ensemble = Ensemble(model, 8, seed=3, dtype="float32", max_rows=128)  # 128 rows of 64 x 126 x 126: 520 MB
    expected = ensemble.predict(x)

    def work():
        taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 400 * 2**20, resource.RLIM_INFINITY))
        out = ensemble.predict(x)
        assert torch.equal(out.labels, expected.labels) and (out.probs - expected.probs).abs().max() < 1e-5
        assert ensemble.prepared(x).planner.limit < 128  # it did run out

    assert status(fork(work)) == 0
