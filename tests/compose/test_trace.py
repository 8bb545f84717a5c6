"""rse_fast/trace.py: one thread traces, the others compute."""

import threading

import torch
from torch import nn

from rse_fast.trace import Tracer


class Calls(nn.Module):
    """Identity whose forward first calls ``first()``."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, x):
        self.first()
        return x + 1


def test_a_model_in_another_thread_runs_as_ever():
    layer, found = nn.Linear(2, 2), []

    def elsewhere():
        thread = threading.Thread(target=lambda: found.append(layer(torch.ones(1, 2))))
        thread.start()
        thread.join()

    graph = Tracer().trace(Calls(elsewhere))
    assert torch.equal(found[0], layer(torch.ones(1, 2))) and len(graph.nodes) == 3


def test_two_traces_at_once_leave_modules_as_they_were(monkeypatch):
    monkeypatch.setattr(nn.Module, "__call__", nn.Module.__call__)  # put back behind a failure, which other tests would feel
    call, over, begun = nn.Module.__call__, threading.Event(), threading.Event()
    second = threading.Thread(target=lambda: Tracer().trace(Calls(lambda: (begun.set(), over.wait()))))

    def start():
        second.start()
        begun.wait(0.2)  # which it does not, if it waits its turn

    Tracer().trace(Calls(start))
    over.set()
    second.join()
    assert nn.Module.__call__ is call
