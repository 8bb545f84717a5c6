"""Graphs that a compiler gets of a training step."""

from collections import Counter

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd


class _Traced(Exception):
    pass


def joint_graphs(model, x):
    """(forward graph, backward graph) of one training step, which runs."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    _compiled(model, keep)(x).sum().backward()
    return graphs


def forward_graph(model, x):
    """The forward graph of a training step. Nothing runs, so its kernels may be those of another device."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)

        def run(*args):
            raise _Traced

        return make_boxed_func(run)

    try:
        _compiled(model, keep)(x)
    except _Traced:
        pass
    return graphs[0]


def _compiled(model, keep):
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    return torch.compile(model, backend=backend, fullgraph=True)


def calls(graph):
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


def saved_bytes(graph):
    """Bytes that the forward graph hands to backward, beside its inputs."""
    (output,) = graph.graph.find_nodes(op="output")
    kept = [node for node in output.args[0] if isinstance(node, torch.fx.Node) and node.op != "placeholder"]
    return sum(value.nbytes for value in {node: node.meta["val"] for node in kept}.values() if isinstance(value, torch.Tensor))
