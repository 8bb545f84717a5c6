"""An ensemble without a seed never repeats its noise: across calls, threads, forked processes, workers of a loader, replays of a graph."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from children import fork, status
from torch import nn

import rse_fast
from rse_fast import Ensemble

pytestmark = pytest.mark.usefixtures("one_thread")
CALLS = 20


@pytest.fixture
def ensemble():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    return Ensemble(rse_fast.convert(net.eval(), 0.3, 0.3), 2, dtype="float32")


X = torch.linspace(0, 1, 3 * 8 * 8).view(1, 3, 8, 8)


def seeds_and_answers(ensemble, calls=CALLS) -> list[tuple[int, tuple[float, ...]]]:
    """Of each call its seed and what it answered; torch's generator is put back before each, which must change nothing."""
    found = []
    for _ in range(calls):
        torch.manual_seed(0)
        out = ensemble.predict(X)
        found.append((out.seed, tuple(out.probs[0].tolist())))
    return found


def assert_all_differ(found) -> None:
    seeds, answers = zip(*found, strict=True)
    assert len(set(seeds)) == len(set(answers)) == len(found)
    assert max(seeds) > 2**50  # not a count


@pytest.mark.parametrize("call", ["predict", "forward", "stream"])
def test_calls(ensemble, call):
    ask = {
        "predict": lambda: ensemble.predict(X).probs,
        "forward": lambda: ensemble(X).detach(),
        "stream": lambda: next(ensemble.stream([X])).probs,
    }[call]
    answers = set()
    for _ in range(CALLS):
        torch.manual_seed(0)
        answers.add(tuple(ask()[0].tolist()))
    assert len(answers) == CALLS


def test_threads(ensemble):
    with ThreadPoolExecutor(8) as pool:
        found = [pair for part in pool.map(lambda _: seeds_and_answers(ensemble), range(8)) for pair in part]
    assert_all_differ(found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks(ensemble, tmp_path):
    """Children have all that their parent has, the state of every generator included."""
    found = seeds_and_answers(ensemble)
    children = [fork(lambda i=i: torch.save(seeds_and_answers(ensemble), tmp_path / f"{i}.pt")) for i in range(4)]
    assert [status(child) for child in children] == [0] * 4
    for i in range(4):
        found += torch.load(tmp_path / f"{i}.pt")
    assert_all_differ(found + seeds_and_answers(ensemble))


class Answers(torch.utils.data.Dataset):
    """An item is what the ensemble says within a worker: a seed, in two halves, and probabilities."""

    def __init__(self, ensemble):
        self.ensemble = ensemble

    def __len__(self):
        return 3 * CALLS

    def __getitem__(self, index):
        ((seed, answer),) = seeds_and_answers(self.ensemble, 1)
        return torch.tensor([seed >> 32, seed & 0xFFFFFFFF, *answer], dtype=torch.float64)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workers_of_a_loader(ensemble):
    """The same in two epochs, which give workers the same generators where the loader's own is put back."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        loader = torch.utils.data.DataLoader(Answers(ensemble), batch_size=5, num_workers=2, multiprocessing_context="fork")
        found += [(int(row[0]) << 32 | int(row[1]), tuple(row[2:].tolist())) for batch in loader for row in batch]
    assert len(found) == 6 * CALLS
    assert_all_differ(found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replays_of_a_graph(ensemble):
    ensemble = Ensemble(ensemble.model.cuda(), 2, dtype="float32", cuda_graphs=True)
    assert_all_differ(seeds_and_answers(ensemble, 3 * CALLS))
