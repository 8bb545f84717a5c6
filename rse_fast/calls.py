"""Which noisy layers a forward pass calls, and which convolutions it computes without a layer. A run on the meta device tells."""

import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rse_fast.attributes import unregistered
from rse_fast.nn import NoisyConv, NoisyInput, NoisyLinear

SIZES = (64, 32, 224, 28)  # pixels of the images that are tried, one after the other
_NOISY = {kind.forward.__code__ for kind in (NoisyInput, NoisyConv, NoisyLinear)}
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm, _aten.mv, _aten.matmul}
_VIEWS = {_aten.view, _aten._unsafe_view, _aten._reshape_alias, _aten.permute, _aten.transpose, _aten.t, _aten.unsqueeze, _aten.squeeze}
_VIEWS |= {_aten.clone, _aten.expand, _aten.alias}


@dataclass(frozen=True)
class Calls:
    """called: names of noisy layers whose forward runs, however it is called. read: names of parameters that a convolution uses, as they
    are or after arithmetic, while neither a noisy layer nor one of torch's convolution layers runs."""

    called: frozenset[str]
    read: frozenset[str]


def calls(copied: nn.Module, first: nn.Module) -> Calls | None:
    """What a forward of ``copied``, which is on the meta device and has its noise off, calls; None where no guess fits.

    first: the convolution or linear layer in it whose channels are those of the input.
    """
    loose = unregistered(copied)
    names = {module: name for name, module in copied.named_modules()} | loose
    owners = {
        id(parameter): (module, f"{name}.{own}".lstrip("."))
        for module, name in names.items()
        for own, parameter in module.named_parameters(recurse=False)
    }
    if isinstance(first, nn.Linear):
        shapes = [(2, first.in_features)]
    else:  # a convolution that forward does by itself may stand before the first layer: then pictures in colour, or grey ones, may fit
        channels = dict.fromkeys((first.in_channels, 3, 1))
        shapes = [(2, c, *[size] * len(first.kernel_size)) for c in channels for size in SIZES]
    for shape in shapes:
        x = torch.empty(shape, device="meta")
        seen = _Seen(owners, set(loose), x)
        try:
            with torch.no_grad(), seen:
                copied(x)
        except Exception:  # the guess did not fit, or the forward needs data
            continue
        return Calls(frozenset(names[module] for module in seen.called if module in names), frozenset(seen.read))
    return None


class _Seen(TorchDispatchMode):
    """Follows the image ``x``, the columns that unfolding makes of images, and parameters to the ops that read them."""

    def __init__(self, owners, loose, x):
        super().__init__()
        self.loose = loose
        self.called, self.read = set(), set()
        # By id, which the tensors keep while they are kept. sources: what parameters a tensor is made of that no image is in.
        self.image, self.columns, self.kept = {id(x)}, set(), [x]
        self.sources = {key: {owner} for key, owner in owners.items()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, packet = func(*args, **(kwargs or {})), func.overloadpacket
        noisy, running = _running()
        self.called.update(noisy)
        ids = [id(t) for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        parameters = set().union(*(self.sources.get(i, ()) for i in ids))
        of_image, of_columns = not self.image.isdisjoint(ids), not self.columns.isdisjoint(ids)
        if of_image and not noisy and ("conv" in func.name() or (of_columns and packet in _PRODUCTS)):
            # A container may hold a weight and convolve with it; only a layer that convolves alone is known for one.
            layers = {m for module in running if _is_layer(module) and not isinstance(module, NoisyInput) for m in module.modules()}
            self.read.update(name for module, name in parameters if module not in layers - self.loose)
        for made in torch.utils._pytree.tree_leaves(result):
            if not isinstance(made, torch.Tensor):
                continue
            self.kept.append(made)
            if of_image:
                self.image.add(id(made))
                if packet is _aten.im2col or (of_columns and packet in _VIEWS):
                    self.columns.add(id(made))
            elif parameters:
                self.sources[id(made)] = parameters
        return result


def _running() -> tuple[list[nn.Module], list[nn.Module]]:
    """The noisy layers whose noisy forward this thread is in, and all modules whose methods it is in. A forward may be called in many ways;
    hooks see one of them."""
    noisy, running, frame = [], [], sys._getframe(2)
    while frame is not None and frame.f_code is not calls.__code__:
        code = frame.f_code
        module = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(module, nn.Module):
            running.append(module)
            if code in _NOISY:
                noisy.append(module)
        frame = frame.f_back
    return noisy, running


def _is_layer(module):
    return "conv" in type(module).__name__.lower() or isinstance(module, nn.modules.conv._ConvNd)
