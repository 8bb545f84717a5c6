"""A compiler on a GPU gets the Triton kernel itself, not a call into Python. No GPU is needed to trace; nothing runs."""

import copy

import torch
from torch import nn
from traced_graphs import calls, forward_graph, saved_bytes
from triton.runtime import driver

import rse_fast
from rse_fast import noise
from rse_fast.bench.host import still_driver


def test_noise_is_a_triton_kernel_in_the_graph_and_is_not_stored(monkeypatch, rng):
    driver.set_active(still_driver(lambda launch: None))
    monkeypatch.setattr(noise, "active_backend", lambda x: "triton")  # what it is on a GPU
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
    )
    x = torch.rand(4, 3, 16, 16)
    graph = forward_graph(rse_fast.convert(copy.deepcopy(plain)), x)
    found = calls(graph)
    assert found["triton_kernel_wrapper_functional"] == found["aten.convolution.default"] == 2 and not found["rse_fast.add_noise.default"]
    assert saved_bytes(graph) <= 1.01 * saved_bytes(forward_graph(plain, x))
