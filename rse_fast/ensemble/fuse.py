"""Prepares a snapshot of a model for inference: the same function in fewer, cheaper operations.

BatchNorm is folded into the convolution before it, and a ReLU (also one with a max-pool behind it) that only noisy convolutions read
is done by their noise op, in the pass over memory that adds the noise anyway. On a CPU the convolutions' weights are kept in the vendor
library's own order, which it would otherwise bring them into at every call.
"""

import copy
import operator

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rse_fast import functional
from rse_fast.convert import tensor_attributes
from rse_fast.nn import NoiseLayer, NoisyConv1d, NoisyConv2d, NoisyConv3d

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, NoisyConv1d, NoisyConv2d, NoisyConv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_FRESH = (operator.add, operator.sub, operator.mul, torch.add, torch.cat)  # calls whose result is new memory


def snapshot(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, str | None]:
    """A copy of ``model`` in eval mode and ``dtype``, channels last, fused.

    Returns (copy, None), or (unfused copy, why) when the model cannot be traced. The copy's parameters take no gradient; the gradient
    of the input flows through it.
    """
    # A tensor with a history, such as the weight that old-style weight_norm computes, cannot be copied as it is.
    memo = {id(t): t.detach().clone() for t in tensor_attributes(model) if not t.is_leaf}
    copied = copy.deepcopy(model, memo).eval().requires_grad_(False)
    # In a container, the model is called rather than its forward: its own hooks are traced too, and a model of one layer is a leaf.
    copied = nn.Sequential(copied).to(torch.promote_types(dtype, torch.float32))  # folding is done in float32 at least
    problem = None
    try:
        before = torch.get_rng_state()
        graph = _Tracer().trace(copied)
        if not torch.equal(before, torch.get_rng_state()):
            raise RuntimeError("its forward draws random numbers, which the graph would repeat")
    except Exception as error:  # whatever a user's forward raises when it meets a proxy
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    else:
        copied = torch.fx.GraphModule(copied, graph)
        fold_batch_norm(copied)
        merge_relu(copied)
        pack_weights(copied)
    copied = copied.to(dtype)
    if any(p.dim() == 4 for p in copied.parameters()):
        copied = copied.to(memory_format=torch.channels_last)
    return copied, problem


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, NoiseLayer) or super().is_leaf_module(module, name)


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
        if type(conv) not in _CONVOLUTIONS or calls[conv] != 1 or calls[norm] != 1 or _has_hooks(conv) or _has_hooks(norm):
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


class FusedConv(nn.Module):
    """A plain or noisy 2-D convolution of x, or of ``relu(x)`` with the ReLU done by the noise op."""

    def __init__(self, layer: nn.Module, relu: bool = False):
        super().__init__()
        self.layer, self.relu = layer, relu
        self.packed = None

    def forward(self, input):  # the name that nn.Conv2d gives it
        layer = self.layer
        x = input.to(layer.weight.dtype)  # a forward may make a float32 tensor on the way, and autocast does not know the vendor's op
        if getattr(layer, "noise_enabled", False):
            x = functional.add_noise(x, act="relu" if self.relu else None, **layer.noise_arguments(x))
        elif self.relu:
            x = x.relu()
        # The vendor's op for packed weights has no gradient; elsewhere than on the CPU it does not exist.
        if x.device.type != "cpu" or x.requires_grad or not torch.backends.mkldnn.is_available() or not x.numel():
            return layer._conv_forward(x, layer.weight, layer.bias)
        if x.dim() != 4 or x.shape[1] != layer.in_channels:  # torch says what is wrong
            return layer._conv_forward(x, layer.weight, layer.bias)
        geometry = layer.padding, layer.stride, layer.dilation, layer.groups
        if self.packed is None:  # by the first batch's shape, which is the usual one; other shapes are right too
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *geometry, list(x.shape))
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, layer.bias, *geometry, "none", [], "")


def merge_relu(model: torch.fx.GraphModule) -> None:
    """Removes, in place, each ReLU that only noisy convolutions read, directly or through a max-pool (which commutes with it)."""

    def module_of(node, kinds):
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        return module if type(module) in kinds and not _has_hooks(module) else None

    def is_relu(node):
        if node.op == "call_module":
            return module_of(node, (nn.ReLU,)) is not None
        return node.op == "call_function" and node.target in (torch.relu, nn.functional.relu) or (
            node.op == "call_method" and node.target in ("relu", "relu_")
        )

    def is_pool(node):
        pool = module_of(node, _POOLS)
        return pool is not None and not pool.return_indices

    def is_noisy(node):
        layer = module_of(node, (NoisyConv2d,))
        return layer is not None and _is_simple(layer)

    def is_private(node):
        """Whether its one reader alone sees what it computes: whoever reads the memory of an in-place ReLU's source reads the ReLU's."""
        if len(node.users) != 1:
            return False
        if node.target in _FRESH or module_of(node, (*_CONVOLUTIONS, *_NORMS, *_POOLS, FusedConv)) is not None:
            return True
        views = node.args[:1] if node.target is operator.iadd else node.all_input_nodes  # what its result may be a view of
        return node.op.startswith("call_") and all(map(is_private, views))

    for node in list(model.graph.nodes):
        if not is_relu(node) or not node.users or not node.args:
            continue
        source = node.args[0]
        if not is_private(source):
            continue
        pools = [user for user in node.users if is_pool(user)]
        readers = [user for user in node.users if user not in pools] + [user for pool in pools for user in pool.users]
        if not readers or not all(map(is_noisy, readers)):
            continue
        for reader in readers:
            name = f"rse_fast_relu_{reader.name}"  # a name of its own: "relu_conv" may be one of the model's
            model.add_submodule(name, FusedConv(model.get_submodule(reader.target), relu=True))
            reader.target = name
        node.replace_all_uses_with(source)
        model.graph.erase_node(node)
    model.delete_all_unused_submodules()
    model.recompile()


def pack_weights(model: torch.fx.GraphModule) -> None:
    """Makes, in place, a `FusedConv` of every 2-D convolution that is not one yet."""
    for node in model.graph.nodes:
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        if type(layer) in (nn.Conv2d, NoisyConv2d) and len(node.args) == 1 and not _has_hooks(layer) and _is_simple(layer):
            name = f"rse_fast_{node.name}"
            model.add_submodule(name, FusedConv(layer))
            node.target = name
    model.delete_all_unused_submodules()
    model.recompile()


def _is_simple(layer) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _has_hooks(module: nn.Module) -> bool:
    """Hooks may compute the weight (weight_norm) or want to see what fusion would take away."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
