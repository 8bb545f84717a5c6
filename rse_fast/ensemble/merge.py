"""Merges the operations around the convolutions of a traced model into them: ReLU, max-pool and noise before, addition and ReLU behind."""

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from rse_fast.ensemble.fused_conv import Activation, FusedConv
from rse_fast.nn import NoisyConv1d, NoisyConv2d, NoisyConv3d

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, NoisyConv1d, NoisyConv2d, NoisyConv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_INPLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
_FRESH = (operator.add, operator.sub, operator.mul, torch.add, torch.cat)  # calls whose result is new memory


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
        pool = self.module_of(node, POOLS)
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
        return node.target in _FRESH or self.module_of(node, (*CONVOLUTIONS, *NORMS, *POOLS, FusedConv)) is not None

    def is_private(self, node) -> bool:
        """Whether only its one reader sees its memory. (An in-place ReLU shares memory with its source, so the source counts as well.)"""
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
        return all(user < last and self.module_of(user, (FusedConv,)) is not None for user in readers)

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


def is_simple(layer) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def has_hooks(module: nn.Module) -> bool:
    """Hooks may compute the weight (weight_norm) or want to see what fusion would take away."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
