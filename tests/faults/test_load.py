"""One ensemble under eight threads that predict, differentiate, stream, refresh and change a parameter, all at once.

`make load` does so for RSE_FAST_LOAD_SECONDS seconds; the test suite for a few.
"""

import faulthandler
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import rse_fast
from rse_fast import Ensemble

pytestmark = pytest.mark.usefixtures("one_thread")
SECONDS = float(os.environ.get("RSE_FAST_LOAD_SECONDS", 3))
THREADS, DRAWS, PATIENCE = 8, 5, 60
GAINS = (0.5, 1.0, 2.0, -1.0)
CALLS = {True: ("predict", "forward", "gradient", "stream"), False: ("predict", "forward", "stream")}  # backward reads a live model again


class Net(nn.Module):
    """All its logits carry one number, which changes at once: a call sees the number before a change, or the one after it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head, self.gain = nn.Linear(8, 4), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3))) * self.gain * 20


class Changes:
    """The gains that the model has had. A call may see those from `seen` at its start to `begun` at its end."""

    def __init__(self, model):
        self.model, self.lock, self.begun, self.seen = model, threading.Lock(), [1.0], 1

    def make(self, numbers):
        gain = numbers.choice(GAINS)
        with self.lock:
            self.begun.append(gain)
            how = numbers.randrange(3)
            if how == 0:
                with torch.no_grad():
                    self.model.gain.fill_(gain)
            elif how == 1:
                self.model.gain.data = torch.tensor([gain])
            else:
                self.model.gain = nn.Parameter(torch.tensor([gain]))
            self.seen = len(self.begun)


def answer(ensemble, call, x):
    """Rows [images, ...], one an image: what ``call`` says of images x."""
    if call == "predict":
        return ensemble.predict(x).probs
    if call == "forward":
        with torch.no_grad():
            return ensemble(x)
    if call == "gradient":
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ensemble(x)[:, 0].sum(), x)
        return gradient.flatten(1)
    return torch.cat([p.probs for p in ensemble.stream(x.split(2))])


def resident() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("fuse", [True, False])
def test_every_answer_is_that_of_the_model_before_or_after_a_change(fuse, rng):
    seed, seconds = int(rng.integers(2**31)), SECONDS if fuse else min(SECONDS, 60)
    model = rse_fast.convert(Net().eval(), 0.3, 0.2)
    inputs = [torch.rand(4, 3, 10 + 2 * (i > 7), 10) for i in range(10)]
    # Packed batches of two images, so that no image's draws are of two of them.
    ensemble = Ensemble(model, DRAWS, seed=seed, dtype="float32", fuse=fuse, max_rows=2 * DRAWS)
    changes, expected, calls = Changes(model), {}, CALLS[fuse]
    for gain in GAINS:
        with torch.no_grad():
            model.gain.fill_(gain)
        expected |= {(gain, call, i): answer(ensemble, call, x) for i, x in enumerate(inputs) for call in calls}
    model.gain.data = torch.ones(1)
    end, wrong, failures, counts, alive = time.monotonic() + seconds, [], [], Counter(), [time.monotonic()] * THREADS

    def work(thread):
        torch.set_num_threads(1)
        numbers = random.Random(seed + thread)
        try:
            while time.monotonic() < end and not wrong and not failures:
                kind = numbers.random()
                if kind < 0.04:
                    changes.make(numbers)
                    counts["change"] += 1
                elif kind < 0.06:
                    ensemble.refresh()
                    counts["refresh"] += 1
                else:
                    call, i = numbers.choice(calls), numbers.randrange(len(inputs))
                    first = changes.seen - 1
                    found = answer(ensemble, call, inputs[i])
                    allowed = {gain: expected[gain, call, i] for gain in changes.begun[first:]}
                    for row in range(len(found)):
                        if not any(torch.equal(found[row], whole[row]) for whole in allowed.values()):
                            nearest = min((found[row] - whole[row]).abs().max().item() for whole in allowed.values())
                            known = [gain for gain in GAINS if torch.equal(found[row], expected[gain, call, i][row])]
                            wrong.append(f"{call} of images {i}: off by {nearest:.2e}; it is that of gain {known}, not of {list(allowed)}")
                    counts[call] += 1
                alive[thread] = time.monotonic()
        except BaseException as error:
            failures.append(repr(error))
            raise

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.05 if seconds < 60 else 1)
        memory.append(resident())
        if time.monotonic() - max(alive) > PATIENCE:
            faulthandler.dump_traceback(file=sys.__stderr__)
            pytest.fail(f"no thread has done anything for {PATIENCE} s")
    assert not failures and not wrong, failures + wrong[:5]
    stuck = [i for i in range(THREADS) if alive[i] < end - PATIENCE]
    assert not stuck, f"threads {stuck} waited for more than {PATIENCE} s"
    assert all(counts[kind] for kind in (*calls, "change", "refresh")), counts
    first, second = (statistics.median(part) for part in (memory[: len(memory) // 2], memory[len(memory) // 2 :]))
    print(f"fuse={fuse}: {seconds:.0f} s, {dict(counts)}, memory {first:.1f} MiB in the first half, {second:.1f} in the second")
    assert second < 1.03 * first + 10, f"memory grew from {first:.1f} to {second:.1f} MiB"
