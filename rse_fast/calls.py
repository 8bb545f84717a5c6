"""Which layers a forward pass calls, and which convolutions it does by itself: told by a run on the meta device, on a guessed input."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = (64, 32, 224, 28)  # pixels of the images that are tried, one after the other


@dataclass(frozen=True)
class Calls:
    """called: names of modules; read: names of parameters that a convolution reads while their module is not called."""

    called: frozenset[str]
    read: frozenset[str]


def calls(copied: nn.Module, first: nn.Module) -> Calls | None:
    """What a forward of ``copied``, which is on the meta device and plain or with its noise off, calls; None where no guess fits.

    first: the convolution or linear layer in it whose channels are those of the input.
    """
    names = {module: name for name, module in copied.named_modules()}
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
        seen = _Seen(owners)
        handles = []
        for module in names:
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks that see its input
                continue
            handles.append(module.register_forward_pre_hook(seen.enter))
            handles.append(module.register_forward_hook(seen.leave))
        try:
            with torch.no_grad(), seen:
                copied(torch.empty(shape, device="meta"))
        except Exception:  # the guess did not fit, or the forward needs data
            continue
        finally:
            for handle in handles:
                handle.remove()
        return Calls(frozenset(names[module] for module in seen.called), frozenset(seen.read))
    return None


class _Seen(TorchDispatchMode):
    def __init__(self, owners):
        super().__init__()
        self.owners, self.called, self.read, self.under_way = owners, set(), set(), []

    def enter(self, module, args):
        self.called.add(module)
        self.under_way.append(module)

    def leave(self, module, args, out):
        self.under_way.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in func.name():
            for value in args:
                module, name = self.owners.get(id(value), (None, None))
                # A container may hold a weight and convolve with it; only a layer that convolves alone is known for one.
                if module is not None and (module not in self.under_way or not _is_layer(module)):
                    self.read.add(name)
        return func(*args, **(kwargs or {}))


def _is_layer(module):
    return "conv" in type(module).__name__.lower() or isinstance(module, nn.modules.conv._ConvNd)
