"""Prepares a snapshot of a model for inference: the same function in fewer, cheaper operations.

BatchNorm is folded into the convolution before it. The noise op of a convolution also computes what stands in front of it, [BatchNorm ->]
ReLU [-> max-pool], inside the memory pass that adds the noise (see `merge`). On a CPU the convolutions' weights are kept in the vendor
library's own order, so that it does not reorder them at every call (see `fused_conv`).
"""

import linecache
import random
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rse_fast.attributes import detached
from rse_fast.ensemble import hooks
from rse_fast.ensemble.merge import CONVOLUTIONS, NORMS, has_hooks, merge_activations
from rse_fast.ensemble.shapes import ShapeTracer
from rse_fast.nn import NoiseLayer
from rse_fast.trace import RandomOpDetector, Tracer

_MOST_LEAVES = 8  # classes whose forward is left untraced


def snapshot(
    model: nn.Module,
    dtype: torch.dtype,
    rewrite: Callable[[torch.fx.GraphModule], None] | None = None,
    shape: torch.Size | None = None,
    merge: bool = True,
) -> tuple[nn.Module, str | None]:
    """A `copy` of ``model``, fused.

    Returns (copy, None), or (unfused copy, why) when the model cannot be traced. ``rewrite`` may change the traced model, in float32,
    once its BatchNorms are folded and before anything else is done. ``shape``: of an image. A model that branches on it is traced for it,
    and the copy is for such images alone. ``merge=False`` folds BatchNorms alone: what is left are torch's own layers and the noisy ones,
    for compilers.
    """
    wide = torch.promote_types(dtype, torch.float32)  # folding is done in float32 at least
    copied, graph, problem, tracer = copy(model, wide), None, None, _Tracer()
    while graph is None and tracer is not None:
        try:
            graph = _trace(copied, tracer)
        except Exception as error:  # whatever a user's forward raises when it meets a proxy
            problem = f"it cannot be traced ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
            tracer = None if shape is None else tracer.next(shape, type(model))
            if tracer is not None:
                copied = copy(model, wide)  # a forward may have kept what it saw
    if graph is not None:
        copied, problem = Graph(copied, graph), None
        copied.untraced = tracer.leaves
        _free_views(copied)
        fold_batch_norm(copied)
        if rewrite is not None:
            rewrite(copied)
        if merge:
            merge_activations(copied)
        copied.release()
    return _lay_out(copied, dtype), problem


def _trace(model, tracer):
    for _ in range(2):  # once more, as it may have been another thread that drew one of Python's or numpy's
        before = _host_numbers()
        with RandomOpDetector() as detector:
            graph = tracer.trace(model)
        if not detector.any and _host_numbers() == before:
            return graph
    raise RuntimeError("its forward draws random numbers, which the graph would repeat")


class Graph(torch.fx.GraphModule):
    """A traced model whose source is not kept: torch.fx would keep that of every one ever made, 20 to 40 KB each.

    untraced: classes of modules that it calls as they are, since their forward could not be traced.
    """

    untraced = frozenset()

    def recompile(self):
        code = super().recompile()
        name = type(self).forward.__code__.co_filename
        linecache.cache.pop(name, None)
        torch.fx.graph_module._loader.eval_cache.pop(name, None)
        return code

    def release(self):
        """Lets the graph, once it is done, not hold its module: the memory of a dropped one would wait for the garbage collector."""
        self.graph.owning_module = None

    def __deepcopy__(self, memo):
        copied = super().__deepcopy__(memo)
        copied.release()
        return copied


def _host_numbers():
    """State of the generators of Python and numpy."""
    _, words, position, *gauss = np.random.get_state()
    return random.getstate(), words.tobytes(), position, gauss


def _free_views(model: torch.fx.GraphModule) -> None:
    """Makes reshapes, in place, of views: a forward that flattens a contiguous map by x.view(N, -1) shall take a channels-last one."""
    for node in model.graph.nodes:
        if node.op == "call_method" and node.target == "view" and not any(isinstance(a, torch.dtype) for a in node.args):
            node.target = "reshape"
    model.recompile()


def copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` in eval mode and ``dtype``, channels last. Its parameters take no gradient; that of the input flows through it.

    In a container, the model is called rather than its forward: its own hooks are as well, and a model of one layer is a leaf.
    """
    memo = detached(model)
    hooks.remember(model, memo)
    try:
        copied = deepcopy(model, memo)
    except Exception as error:  # what a lock or a tensor with a history in an attribute raises
        raise TypeError(f"model cannot be copied ({error}); fuse=False runs the model itself") from error
    hooks.attach(copied, model)
    return _lay_out(nn.Sequential(copied.eval().requires_grad_(False)), dtype)


def _lay_out(model, dtype):
    # Maps of images alone: torch's own `to(memory_format=...)` fails for a model that holds tensors of five dimensions as well.
    return model.to(dtype)._apply(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)


class _Tracer(Tracer):
    """leaves: classes of modules that are called as they are, because their forward cannot be traced."""

    leaves, failed = frozenset(), None

    def is_leaf_module(self, module, name):
        # A hook traced through would be called once, with a proxy, and never again.
        leaf = isinstance(module, NoiseLayer) or has_hooks(module) or type(module) in self.leaves
        return leaf or super().is_leaf_module(module, name)

    def call_module(self, m, forward, args, kwargs):
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or type(m)  # the innermost
            raise

    def next(self, shape: torch.Size, whole: type) -> "_Tracer | None":
        """What to try where this one has failed: with sizes known, then with more and more leaves, but not the ``whole`` model as one."""
        if not isinstance(self, ShapeTracer):
            return _OfShape(shape)
        if self.failed in (None, whole, nn.Sequential, *self.leaves) or len(self.leaves) == _MOST_LEAVES:
            return None
        tracer = _OfShape(shape)
        tracer.leaves = self.leaves | {self.failed}
        return tracer


class _OfShape(_Tracer, ShapeTracer):
    """For a forward that branches on sizes."""


def fold_batch_norm(model: torch.fx.GraphModule) -> None:
    """Folds, in place, every BatchNorm (in eval mode) that alone reads a convolution's output into that convolution.

    Noise stands at the convolution's input, so folding the affine map that follows the convolution leaves it untouched.
    """
    graph, modules = model.graph, dict(model.named_modules(remove_duplicate=False))
    calls: dict[nn.Module, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[modules[node.target]] = calls.get(modules[node.target], 0) + 1
    read = [node.target for node in graph.nodes if node.op == "get_attr"]  # weights that the forward uses by itself as well
    for node in list(graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) not in NORMS or not node.args:
            continue
        producer, norm = node.args[0], modules[node.target]
        if getattr(producer, "op", None) != "call_module" or len(producer.users) != 1 or norm.running_mean is None:
            continue
        conv = modules[producer.target]
        # A layer called twice has one weight for two places, which may want different foldings.
        if type(conv) not in CONVOLUTIONS or calls[conv] != 1 or calls[norm] != 1 or has_hooks(conv) or has_hooks(norm):
            continue
        if any(modules[target.rpartition(".")[0]] is conv for target in read):
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.requires_grad_(False)
        node.replace_all_uses_with(producer)
        graph.erase_node(node)
    model.delete_all_unused_submodules()
    model.recompile()
