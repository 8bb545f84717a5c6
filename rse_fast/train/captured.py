"""A training step as one CUDA graph: one launch in place of a thousand."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from rse_fast.ensemble.graphs import capturing
from rse_fast.models import MODELS
from rse_fast.train.config import Config

_WARM = 3  # calls that run as they are first: they compile kernels, pick algorithms and allocate what lives on


def captures(config: Config, device: torch.device, processes: int) -> bool:
    """Whether a run captures its steps: as ``config.cuda_graphs`` says; where that is None, if it can and the network is the package's.

    A graph repeats what Python did once, so a network of which only its author knows what it does is not captured unasked. Raises
    ValueError where the configuration asks for what the device or the number of processes rules out.
    """
    possible = device.type == "cuda" and processes == 1
    if config.cuda_graphs and not possible:
        raise ValueError(f"cuda_graphs: needs one process on a CUDA device, got {processes} on {device}")
    if config.cuda_graphs is None:
        return possible and _fits(config) and config.model in MODELS
    return config.cuda_graphs


def advice(config: Config, device: torch.device, processes: int) -> str | None:
    """How to have the steps of a user's own network captured, in a line, where they could be and nothing was said about it."""
    if config.cuda_graphs is None and device.type == "cuda" and processes == 1 and _fits(config) and config.model not in MODELS:
        return (
            f"{config.model} may train faster with --cuda-graphs, which needs a forward pass that does the same at each step; "
            "--no-cuda-graphs leaves it as it is, without this line"
        )
    return None


def _fits(config):
    return not config.compile and config.start_scale is None


class Captured:
    """``function`` (tensors -> tuple of tensors), replayed on new inputs of the same shapes after three calls of its own.

    What it leaves elsewhere, gradients and batch statistics, is what a call leaves: with gradients set to None inside it, each replay
    writes them anew. Random numbers of torch's generator are fresh at each replay. What Python does inside happens once, at the capture. A
    result is overwritten by the next call. What cannot be captured raises what torch raises, or where ``required`` is False, runs as it is
    from then on, after one warning.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], required: bool = True):
        self._function, self._required, self._calls = function, required, 0
        self._failed = False
        self._graph = self._stream = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self._failed:
            return self._function(*inputs)
        with torch.cuda.device(inputs[0].device if inputs else None):
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
        generator = torch.cuda.get_rng_state()
        try:
            self._graph = self._capture(inputs)
        except RuntimeError as error:
            if self._required:
                raise
            self._failed, self._inputs = True, None
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(
                f"rse-fast: a step cannot be captured in a CUDA graph and runs without one ({reason})", RuntimeWarning, stacklevel=2
            )
            torch.cuda.set_rng_state(generator)  # the call draws what it would have drawn
            return self._function(*inputs)
        return self._call(*inputs)

    def _capture(self, inputs):
        self._inputs = [given.clone() for given in inputs]
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._stream, torch.cuda.graph_pool_handle()):
            self._results = self._function(*self._inputs)
        return graph
