"""Tracing by torch.fx with known shapes: a forward that branches on the sizes of its images has one graph for each size.

Plain tracing knows no sizes, so ``if x.shape[-1] % 2`` ends it. Here each node of the graph is also computed on the meta device, for 2
images and for 3. A size that is the same for both becomes a number in the graph. One that differs counts images or rows, and stays an
operation of the graph. So the graph is right for any number of images of one shape. The caller must not give it others.
"""

import operator

import torch
from torch.fx.node import map_aggregate

from rse_fast.convert import meta_copy
from rse_fast.nn import noise_layers
from rse_fast.trace import Tracer

_IMAGES = (2, 3)


class ShapeTracer(Tracer):
    """Traces a model for images of ``shape`` [C, H, W] (without their number)."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self._shape, self._values, self._evaluating = shape, {}, False

    def trace(self, root, concrete_args=None):
        self._twin = meta_copy(root)
        for layer in noise_layers(self._twin).values():
            layer.noise_enabled = False
        return super().trace(root, concrete_args)

    def proxy(self, node):
        return _ShapedProxy(node, self)

    def create_proxy(self, kind, target, args, kwargs, *rest, **options):
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if kind == "placeholder":
            images = [torch.empty((count, *self._shape), dtype=torch.float32, device="meta") for count in _IMAGES]
            self._values[proxy.node] = images
        elif kind in ("call_function", "call_method", "call_module", "get_attr"):
            self._evaluating, before = True, self._evaluating
            try:
                self._values[proxy.node] = [self._value(kind, target, args, kwargs, i) for i in range(len(_IMAGES))]
            except Exception:  # what depends on data, or on a node that does: its sizes are not known
                pass
            finally:
                self._evaluating = before
        return proxy

    def _value(self, kind, target, args, kwargs, i):
        def known(argument):
            if isinstance(argument, torch.fx.Proxy):
                return self._values[argument.node][i]
            return argument.to("meta") if isinstance(argument, torch.Tensor) else argument

        args, kwargs = map_aggregate(args, known), map_aggregate(kwargs, known)
        if kind == "call_module":
            return self._twin.get_submodule(target)(*args, **kwargs)
        if kind == "get_attr":
            owner, _, name = target.rpartition(".")
            return getattr(self._twin.get_submodule(owner), name)
        return getattr(args[0], target)(*args[1:], **kwargs) if kind == "call_method" else target(*args, **kwargs)

    def values(self, node) -> list | None:
        """What the node computes for each number of images; None if unknown."""
        return self._values.get(node)

    # What is evaluated calls modules and reads attributes while torch.fx watches both.
    def call_module(self, m, forward, args, kwargs):
        return forward(*args, **kwargs) if self._evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)


class _ShapedProxy(torch.fx.Proxy):
    """A proxy that knows the sizes of its tensor."""

    def _tensors(self):
        values = self.tracer.values(self.node)
        known = values is not None and all(isinstance(value, torch.Tensor) for value in values)
        return values if known and values[0].dim() == values[1].dim() else None

    @property
    def shape(self):
        tensors = self._tensors()
        if tensors is None:
            return self.__getattr__("shape")
        first, second = (t.shape for t in tensors)
        return tuple(a if a == b else self._size(i) for i, (a, b) in enumerate(zip(first, second, strict=True)))

    def _size(self, dim):
        return self.tracer.create_proxy("call_method", "size", (self, dim), {})

    def size(self, dim=None):
        if self._tensors() is None:
            return self.tracer.create_proxy("call_method", "size", (self,) if dim is None else (self, dim), {})
        return self.shape if dim is None else self.shape[dim]

    def dim(self):
        tensors = self._tensors()
        return self.tracer.create_proxy("call_method", "dim", (self,), {}) if tensors is None else tensors[0].dim()

    @property
    def ndim(self):
        return self.dim()

    def __setitem__(self, key, value):
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self):
        length = self._length()
        if length is None:
            raise torch.fx.proxy.TraceError("the length of something depends on the number of images, or on data")
        return length

    def __iter__(self):
        return iter([self[i] for i in range(len(self))])

    def _length(self):
        values = self.tracer.values(self.node) or [None]
        lengths = {len(v) if isinstance(v, (tuple, list)) or isinstance(v, torch.Tensor) and v.dim() else None for v in values}
        return lengths.pop() if len(lengths) == 1 else None
