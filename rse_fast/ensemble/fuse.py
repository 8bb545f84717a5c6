"""Prepares a snapshot of a model for inference: the same function in fewer, cheaper operations."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rse_fast.nn import NoiseLayer, NoisyConv1d, NoisyConv2d, NoisyConv3d

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, NoisyConv1d, NoisyConv2d, NoisyConv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def snapshot(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, str | None]:
    """A copy of ``model`` in eval mode and ``dtype``, channels last, BatchNorm folded into the convolution before it.

    Returns (copy, None), or (copy without folding, why) when the model cannot be traced. The copy's parameters take no gradient; the
    gradient of the input flows through it.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    problem = None
    try:
        copied = fold_batch_norm(copied)
    except Exception as error:  # whatever a user's forward raises when it meets a proxy
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    copied = copied.to(dtype)
    if any(p.dim() == 4 for p in copied.parameters()):
        copied = copied.to(memory_format=torch.channels_last)
    return copied, problem


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, NoiseLayer) or super().is_leaf_module(module, name)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """``model`` (in eval mode, changed) as a graph in which every BatchNorm that alone reads a convolution's output is folded into it.

    Noise stands at the convolution's input, so folding the affine map that follows the convolution leaves it untouched.
    """
    graph = _Tracer().trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    calls: dict[nn.Module, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[modules[node.target]] = calls.get(modules[node.target], 0) + 1
    for node in list(graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) not in _NORMS:
            continue
        producer, norm = node.args[0], modules[node.target]
        if getattr(producer, "op", None) != "call_module" or len(producer.users) != 1 or norm.running_mean is None:
            continue
        conv = modules[producer.target]
        # A layer called twice has one weight for two places, which may want different foldings.
        if type(conv) not in _CONVOLUTIONS or calls[conv] != 1 or calls[norm] != 1:
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.requires_grad_(False)
        node.replace_all_uses_with(producer)
        graph.erase_node(node)
    graph.lint()
    return torch.fx.GraphModule(model, graph)
