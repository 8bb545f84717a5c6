"""Prepares a snapshot of a model for inference: the same function in fewer, cheaper operations.

BatchNorm is folded into the convolution before it. What stands before a noisy convolution, [BatchNorm ->] ReLU [-> max-pool], is done by
its noise op, in the pass over memory that adds the noise anyway. On a CPU the convolutions' weights are kept in the vendor library's own
order, which it would otherwise bring them into at every call.
"""

import functools
import linecache
import operator
import random
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rse_fast import autograd, functional
from rse_fast.convert import tensor_attributes
from rse_fast.ensemble import hooks
from rse_fast.ensemble.shapes import ShapeTracer
from rse_fast.nn import NoiseLayer, NoisyConv1d, NoisyConv2d, NoisyConv3d, room
from rse_fast.trace import RandomOpDetector, Tracer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, NoisyConv1d, NoisyConv2d, NoisyConv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_INPLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
_MOST_LEAVES = 8  # classes whose forward is left untraced
_FRESH = (operator.add, operator.sub, operator.mul, torch.add, torch.cat)  # calls whose result is new memory


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
    # A tensor with a history, such as the weight that old-style weight_norm computes, cannot be copied as it is.
    memo = {id(t): t.detach().clone() for t in tensor_attributes(model) if not t.is_leaf}
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
        if node.op != "call_module" or type(modules[node.target]) not in _NORMS or not node.args:
            continue
        producer, norm = node.args[0], modules[node.target]
        if getattr(producer, "op", None) != "call_module" or len(producer.users) != 1 or norm.running_mean is None:
            continue
        conv = modules[producer.target]
        # A layer called twice has one weight for two places, which may want different foldings.
        if type(conv) not in _CONVOLUTIONS or calls[conv] != 1 or calls[norm] != 1 or has_hooks(conv) or has_hooks(norm):
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


class Activation(nn.Module):
    """``[x * scale + shift] -> ReLU -> [2x2 max-pool] -> noise of a layer``, one pass over memory for all of it.

    affine: scale and shift [C], or None. Returns (noisy, clean) of x; clean, to which the noise was added, is complete if ``clean_output``.
    alone: whether x is memory that nobody else reads, so that the result may take its place.
    """

    def __init__(
        self,
        layer: nn.Module,
        pool: bool = False,
        affine: tuple[torch.Tensor, torch.Tensor] | None = None,
        clean_output: bool = False,
        alone: bool = False,
    ):
        super().__init__()
        self.layer, self.pool, self.clean_output, self.alone = layer, pool, clean_output, alone
        self.scale, self.shift = affine or (None, None)  # no buffers: they stay in float32, as the noise arithmetic is

    def forward(self, x):
        x = x.to(self.layer.weight.dtype)
        noisy = self.layer.noise_enabled
        # The op that does it all is for inference, in numbers that the transforms of torch.func do not see.
        if not noisy or x.requires_grad or autograd.is_transformed() or x.shape[1] != self.layer.in_channels:
            clean = self.clean(x)
            return self.layer.add_noise(clean) if noisy else clean, clean
        sigma, at, backend = self.layer.noise(x)
        if backend != "auto":
            functional.check_backend(backend, x)
        options = at, self.scale, self.shift, True
        if self.pool or self.clean_output:
            out = room(x, at.rows, self.pool)
            return autograd.activate_noise(x, sigma, *options, self.pool, backend, self.clean_output, out)
        if self.alone and len(x) == at.rows and x.is_contiguous(memory_format=torch.channels_last):
            autograd.add_noise_(x, sigma, *options, backend)  # no fresh memory, and the convolution that reads it finds it in the cache
            return x, x
        return autograd.add_noise(x, sigma, *options, backend, out=room(x, at.rows)), x

    def clean(self, x):
        """What the noise is added to, by torch's operations."""
        x = x if self.scale is None else (x * self.scale[:, None, None] + self.shift[:, None, None]).to(x.dtype)
        return nn.functional.max_pool2d(x.relu(), 2) if self.pool else x.relu()


class FusedConv(nn.Module):
    """A 2-D convolution with its weight in the vendor library's order: of x with the layer's noise, of an `Activation` of x, or of x.

    name: of the layer in the model. activation: makes the noisy input out of x; where it keeps the clean values, (result, clean) is
    returned. winograd: another algorithm for all of it, see `rse_fast.ensemble.convolution`, or None. Its call may be given what is to
    be added to the result. rectified: whether a ReLU of the sum ends it. overwrites: whether the result
    may take the memory of what is added.

    A noisy input takes memory that all convolutions of a packed batch share.
    """

    def __init__(self, layer: nn.Module, name: str, activation: Activation | None = None):
        super().__init__()
        self.layer, self.activation = layer, activation
        self.name = name.removeprefix("0.")  # of the container that `copy` puts around the model
        self.packed = self.winograd = None
        self.rectified = self.overwrites = False

    @property
    def clean_output(self) -> bool:
        return self.activation is not None and self.activation.clean_output

    def forward(self, input, residual=None):  # the name that nn.Conv2d gives it
        layer = self.layer
        x = input.to(layer.weight.dtype)  # a forward may make a float32 tensor on the way, and autocast does not know the vendor's op
        if self.winograd is not None and self.winograd.takes(x):
            return self.winograd(x, residual)
        if self.activation is not None:
            x, clean = self.activation.forward(x)  # nobody hangs a hook there
            return (self._convolve(x, residual), clean) if self.clean_output else self._convolve(x, residual)
        return self._convolve(layer.add_noise(x, room) if getattr(layer, "noise_enabled", False) else x, residual)

    def _convolve(self, x, residual):
        layer = self.layer
        # The vendor's op for packed weights has no gradient, and what watches torch's ops does not know it. It exists on the CPU alone.
        watched = autograd.is_transformed() or not autograd.is_direct(x)
        unpacked = x.device.type != "cpu" or x.requires_grad or watched or not x.numel() or not _packs(x.dtype)
        if unpacked or x.dim() != 4 or x.shape[1] != layer.in_channels:  # of the latter, torch says what is wrong
            return finish(layer._conv_forward(x, layer.weight, layer.bias), residual, self.rectified)
        geometry = layer.padding, layer.stride, layer.dilation, layer.groups
        if self.packed is None:  # by the first batch's shape, which is the usual one; other shapes are right too
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *geometry, list(x.shape))
        takes = residual is not None and residual.shape == self._shape(x) and residual.dtype == x.dtype
        if takes and autograd.is_direct(residual) and not residual.requires_grad:
            add = "add", 1.0, None, [], ""
            if self.overwrites and residual.is_contiguous(memory_format=torch.channels_last):
                y = torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, self.packed, layer.bias, *geometry, *add)
            else:
                residual = residual.contiguous(memory_format=torch.channels_last)
                y = torch.ops.mkldnn._convolution_pointwise.binary(x, residual, self.packed, layer.bias, *geometry, *add)
        else:
            y = torch.ops.mkldnn._convolution_pointwise(x, self.packed, layer.bias, *geometry, "none", [], "")
            y = y if residual is None else y + residual
        return y.relu_() if self.rectified else y  # the vendor's own makes 0 of NaN

    def _shape(self, x):
        layer = self.layer
        geometry = zip(x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True)
        return len(x), layer.out_channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in geometry)


def finish(y: torch.Tensor, residual: torch.Tensor | None, rectified: bool) -> torch.Tensor:
    """What a `FusedConv` does to the result of its convolution, by torch's operations."""
    y = y if residual is None else y + residual
    return y.relu() if rectified else y


def merge_activations(model: torch.fx.GraphModule) -> None:
    """Removes, in place, each ReLU in front of noisy convolutions, with what stands around it; their noise ops do the work. Every 2-D
    convolution becomes a `FusedConv`, with an addition behind it where there is one.

    Where only noisy convolutions read it, directly or through a max-pool (which commutes with it), each takes the source's values itself.
    Where something else reads it as well, as in residual networks, the convolution in front of it does it, or one convolution behind it
    gives the clean values to all others.
    """
    nodes = _Nodes(model)
    for node in list(model.graph.nodes):
        found = _Rectified.find(nodes, node)
        if found is None:
            continue
        if found.only_noisy:
            found.give_each_reader_its_own(nodes)
        elif nodes.on_cpu and not found.pooled and nodes.ends_convolution(found.relu.args[0]):
            continue  # `merge_ends` will give it to that one
        elif found.can_be_shared(nodes):
            found.share(nodes)
        else:
            continue
        found.erase(nodes)
    pack_weights(model)
    merge_ends(nodes)
    model.delete_all_unused_submodules()
    model.recompile()


class _Nodes:
    """What `merge_activations` asks of the nodes of a traced model."""

    def __init__(self, model: torch.fx.GraphModule):
        self.model, self.graph = model, model.graph
        # On a GPU a ReLU behind a convolution would be a kernel of its own; the noise's kernel does it on the way.
        self.on_cpu = all(p.device.type == "cpu" for p in model.parameters())
        self.calls = Counter(model.get_submodule(node.target) for node in model.graph.nodes if node.op == "call_module")

    def module_of(self, node, kinds):
        """The module that a node calls, if it is exactly of one of the kinds and has no hooks."""
        module = self.model.get_submodule(node.target) if node.op == "call_module" else None
        return module if type(module) in kinds and not has_hooks(module) else None

    def is_pool(self, node) -> bool:
        pool = self.module_of(node, _POOLS)
        return pool is not None and not pool.return_indices

    def is_noisy(self, node) -> bool:
        layer = self.module_of(node, (NoisyConv2d,))
        return layer is not None and is_simple(layer)

    def is_fresh(self, node) -> bool:
        """Whether what it computes is new memory, which no hook has seen."""
        if node.target is operator.getitem and isinstance(node.args[0], torch.fx.Node):
            return self.module_of(node.args[0], (FusedConv,)) is not None
        if is_relu(self.model, node) and node.args:  # in place or not
            return self.is_private(node.args[0])
        return node.target in _FRESH or self.module_of(node, (*_CONVOLUTIONS, *_NORMS, *_POOLS, FusedConv)) is not None

    def is_private(self, node) -> bool:
        """Whether its one reader alone sees what it computes: whoever reads the memory of an in-place ReLU's source reads the ReLU's."""
        if len(node.users) != 1:
            return False
        if self.is_fresh(node):
            return True
        views = node.args[:1] if node.target is operator.iadd else node.all_input_nodes  # what its result may be a view of
        return node.op.startswith("call_") and all(map(self.is_private, views))

    def is_steady(self, node) -> bool:
        """Whether what it computes is new memory that nobody writes to later, so that it may be read later than the graph says."""
        return self.is_fresh(node) and not any(self.writes(user, node) for user in node.users)

    def is_sum(self, node) -> bool:
        """Whether it is the result of a convolution, which one node alone reads and a `FusedConv` may therefore do more to."""
        if not (isinstance(node, torch.fx.Node) and node.op == "call_module" and len(node.users) == 1):
            return False
        conv = self.model.get_submodule(node.target)
        if type(conv) is FusedConv:
            return not conv.clean_output and not conv.rectified
        return _is_packable(conv) and len(node.args) == 1

    def addition(self, node):
        """(the result of a convolution, what is there before it), where ``node`` adds them and alone reads the former; or None."""
        if node.op != "call_function" or node.target not in (operator.add, operator.iadd, torch.add) or node.kwargs or len(node.args) != 2:
            return None
        sides = [node.args, node.args[::-1]][: 1 if node.target is operator.iadd else 2]  # which writes over its first operand
        for result, other in sides:
            if self.is_sum(result) and len(result.args) == 1 and isinstance(other, torch.fx.Node) and other < result:
                if self.is_steady(other):
                    return result, other
        return None

    def is_done_with(self, node, last) -> bool:
        """Whether only convolutions before ``last`` read ``node``, beside the addition to ``last``, which may then take its memory."""
        readers = [user for user in node.users if self.addition(user) != (last, node)]
        return all(user.op == "call_module" and user < last and self._only_reads(user) for user in readers)

    def _only_reads(self, node) -> bool:
        return type(self.model.get_submodule(node.target)) is FusedConv

    def ends_convolution(self, node) -> bool:
        """Whether a ReLU that alone reads ``node`` can be done by a convolution."""
        return self.is_sum(node) or self.addition(node) is not None

    def writes(self, node, source) -> bool:
        """Whether a node may write over what ``source``, which it reads, computes."""
        if node.target in _INPLACE:
            return node.args[0] is source
        if node.op == "call_module":
            module = self.model.get_submodule(node.target)
            return getattr(module, "inplace", False) or type(module) in self.model.untraced  # which may do anything
        name = node.target if isinstance(node.target, str) else node.target.__name__
        return name.rstrip("_") != name or node.kwargs.get("inplace")

    def fuse(self, prefix: str, node, **options) -> str:
        """Adds the `FusedConv` of the convolution that ``node`` calls behind an `Activation`; returns its name."""
        layer = self.model.get_submodule(node.target)
        name = f"rse_fast_{prefix}_{node.name}"  # a name of its own: "relu_conv" may be one of the model's
        self.model.add_submodule(name, FusedConv(layer, node.target, Activation(layer, **options)))
        return name


@dataclass
class _Rectified:
    """A ReLU that may be merged: ``relu`` reads ``source``, the output of ``norm`` if that can be merged as well.

    pool: the max-pool that alone reads the ReLU. merged_pool: the same if noise ops can do it. readers: (who reads the values, through
    which node), the pools left out.
    """

    relu: torch.fx.Node
    source: torch.fx.Node
    affine: tuple[torch.Tensor, torch.Tensor] | None
    pool: torch.fx.Node | None
    merged_pool: torch.fx.Node | None
    pooled: bool
    readers: list[tuple[torch.fx.Node, torch.fx.Node]]
    noisy: list[torch.fx.Node]

    @classmethod
    def find(cls, nodes: _Nodes, relu: torch.fx.Node) -> "_Rectified | None":
        if not is_relu(nodes.model, relu) or not relu.users or not relu.args or not nodes.is_private(relu.args[0]):
            return None
        source, affine, users = relu.args[0], None, list(relu.users)
        pools = [user for user in users if nodes.is_pool(user)]
        pool = users[0] if len(users) == 1 and pools else None
        merged_pool = pool if pool is not None and pools_2x2(nodes.model, pool) else None
        norm = nodes.module_of(source, (nn.BatchNorm2d,))
        reachable = norm is not None and norm.running_mean is not None and source.args and (merged_pool or not pools)
        if reachable and nodes.is_steady(source.args[0]):
            affine = _affine(norm)
        readers = [(user, relu) for user in users if user not in pools] + [(user, p) for p in pools for user in p.users]
        noisy = [reader for reader, _ in readers if nodes.is_noisy(reader)]
        return cls(relu, source, affine, pool, merged_pool, bool(pools), readers, noisy)

    @property
    def only_noisy(self) -> bool:
        return bool(self.readers) and len(self.noisy) == len(self.readers)

    @property
    def memory(self) -> torch.fx.Node:
        """What the noise ops read in place of the ReLU."""
        return self.source if self.affine is None else self.source.args[0]

    def once(self, nodes: _Nodes) -> list[torch.fx.Node]:
        """The noisy readers whose layer is called once: the calls of a layer stay in order."""
        return [user for user in self.noisy if nodes.calls[nodes.model.get_submodule(user.target)] == 1]

    def can_be_shared(self, nodes: _Nodes) -> bool:
        whole = self.pool is not None or not self.pooled
        return bool(self.once(nodes)) and whole and not any(nodes.writes(*pair) for pair in self.readers)

    def give_each_reader_its_own(self, nodes: _Nodes) -> None:
        if self.affine is None and len(self.readers) > 1:
            self.merged_pool = None  # once, and not again for every reader
        alone = len(self.readers) == 1 and len(self.memory.users) == 1 and nodes.is_fresh(self.memory)
        for reader, _ in self.readers:
            reader.target = nodes.fuse("fused", reader, pool=self.merged_pool is not None, affine=self.affine, alone=alone)

    def share(self, nodes: _Nodes) -> None:
        """One noisy convolution gives the clean values to all others."""
        graph, shared, value = nodes.graph, self.once(nodes)[0], self.relu if self.pool is None else self.pool
        name = nodes.fuse("shared", shared, pool=self.merged_pool is not None, affine=self.affine, clean_output=True)
        with graph.inserting_after(value):
            both = graph.call_module(name, (value,))
        with graph.inserting_after(both):
            values = [graph.call_function(operator.getitem, (both, i)) for i in (0, 1)]
        value.replace_all_uses_with(values[1], delete_user_cb=lambda user: user is not both)
        shared.replace_all_uses_with(values[0])
        graph.erase_node(shared)

    def erase(self, nodes: _Nodes) -> None:
        """Takes out of the graph what the noise ops do now."""
        memory = self.memory
        if self.merged_pool is not None:
            self.merged_pool.replace_all_uses_with(self.relu)
            nodes.graph.erase_node(self.merged_pool)
        self.relu.replace_all_uses_with(memory)
        nodes.graph.erase_node(self.relu)
        if self.affine is not None:
            nodes.graph.erase_node(self.source)


def merge_ends(nodes: _Nodes) -> None:
    """Gives, in place, each `FusedConv` the addition that alone reads its result, as in residual networks, and then the ReLU that does."""
    graph = nodes.graph
    for node in list(graph.nodes):
        if (sides := nodes.addition(node)) is not None:
            result, other = sides
            nodes.model.get_submodule(result.target).overwrites = nodes.is_done_with(other, result)
            result.args = (*result.args, other)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
        elif nodes.on_cpu and is_relu(nodes.model, node) and node.args and nodes.is_sum(node.args[0]):
            nodes.model.get_submodule(node.args[0].target).rectified = True
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _affine(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """A BatchNorm in eval mode as scale and shift [C]."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale.detach(), (shift if norm.bias is None else shift + norm.bias).detach()


def is_relu(model: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Whether ``node`` is a ReLU, by whatever call, that no hook watches."""
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        return type(module) is nn.ReLU and not has_hooks(module)
    if node.op == "call_function":
        return node.target in (torch.relu, nn.functional.relu)
    return node.op == "call_method" and node.target in ("relu", "relu_")


def pools_2x2(model: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Whether ``node`` is the max-pool that noise ops do: of 2x2 windows side by side."""
    pool = model.get_submodule(node.target) if node.op == "call_module" else None
    if type(pool) is not nn.MaxPool2d or has_hooks(pool) or pool.ceil_mode or pool.return_indices:
        return False
    return [pair(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)] == [(2, 2), (2, 2), (0, 0), (1, 1)]


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """A parameter of a 2-D layer for each dimension."""
    return (value, value) if isinstance(value, int) else tuple(value)


def pack_weights(model: torch.fx.GraphModule) -> None:
    """Makes, in place, a `FusedConv` of every 2-D convolution that is not one yet."""
    for node in model.graph.nodes:
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        if _is_packable(layer) and len(node.args) == 1:
            name = f"rse_fast_{node.name}"
            model.add_submodule(name, FusedConv(layer, node.target))
            node.target = name
    model.delete_all_unused_submodules()
    model.recompile()


def _is_packable(layer) -> bool:
    return type(layer) in (nn.Conv2d, NoisyConv2d) and not has_hooks(layer) and is_simple(layer)


def _packs(dtype: torch.dtype) -> bool:
    """Whether the vendor's library keeps weights of ``dtype`` in its own order on this processor."""
    return torch.backends.mkldnn.enabled and _packs_in_hardware(dtype)


@functools.cache
def _packs_in_hardware(dtype):
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def is_simple(layer) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def has_hooks(module: nn.Module) -> bool:
    """Hooks may compute the weight (weight_norm) or want to see what fusion would take away."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
