"""A compiler on a GPU gets the Triton kernel itself, not a call into Python. No GPU is needed to trace; nothing runs."""

import copy
from collections import Counter

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from triton.runtime import driver

import rse_fast
from rse_fast import noise
from rse_fast.bench.host import still_driver


class _Traced(Exception):
    pass


def forward_graph(model, x):
    """The forward graph that a compiler gets of a training step."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)

        def run(*args):
            raise _Traced

        return make_boxed_func(run)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    try:
        torch.compile(model, backend=backend, fullgraph=True)(x)
    except _Traced:
        pass
    return graphs[0]


def calls(graph):
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


def saved_bytes(graph):
    (output,) = graph.graph.find_nodes(op="output")
    kept = {node: node.meta["val"] for node in output.args[0] if isinstance(node, torch.fx.Node) and node.op != "placeholder"}
    return sum(value.nbytes for value in kept.values() if isinstance(value, torch.Tensor))


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
