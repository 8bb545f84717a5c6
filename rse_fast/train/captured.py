"""A training step as one CUDA graph: one launch in place of a thousand."""

from collections.abc import Callable

import torch
from torch import Tensor

from rse_fast.ensemble.graphs import capturing

_WARM = 3  # calls that run as they are first: they compile kernels, pick algorithms and allocate what lives on


class Captured:
    """``function`` (tensors -> tuple of tensors), replayed on new inputs of the same shapes after three calls of its own.

    What it leaves elsewhere, gradients and batch statistics, is what a call leaves: with gradients set to None inside it, each replay
    writes them anew. Random numbers of torch's generator are fresh at each replay. What Python does inside happens once, at the capture. A
    result is overwritten by the next call. Raises what torch raises for operations that cannot be captured.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]):
        self._function, self._calls = function, 0
        self._graph = self._stream = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.cuda.device(inputs[0].device):
            return self._call(*inputs)

    def _call(self, *inputs):
        if self._graph is not None:
            for kept, given in zip(self._inputs, inputs, strict=True):
                kept.copy_(given)
            self._graph.replay()
            return self._results
        self._stream = self._stream or torch.cuda.Stream()
        self._calls += 1
        if self._calls <= _WARM:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                results = self._function(*inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            return results
        self._inputs = [given.clone() for given in inputs]
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._stream, torch.cuda.graph_pool_handle()):
            self._results = self._function(*self._inputs)
        self._graph = graph
        return self._call(*inputs)
