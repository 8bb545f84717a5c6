"""CUDA graphs of packed batches: one launch in place of hundreds, which is what all but very large batches wait for."""

import contextlib
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable

import torch

from rse_fast.context import NoiseContext
from rse_fast.ensemble.memory import out_of_memory
from rse_fast.ensemble.warn import warn_caller

# Rows up to which launches may take longer than the arithmetic. On an H100 a noise layer and its convolution cost the host about 0.15 ms,
# and 1024 rows of VGG16, by arithmetic alone, 0.12 ms of the device a layer.
MOST_ROWS = 4096
MOST = 32  # graphs of one model; shapes beyond run without

_one_capture = threading.Lock()  # `torch.cuda.graph` first waits for the whole device, which spoils a capture in another thread


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple):
    """`torch.cuda.graph`, one at a time in the process, while other threads use the device; a capture that fails leaves no trace.

    torch (2.11) ends such a capture half-way: the current stream, the allocator and the device's random generator stay in it, and the
    generator refuses every number, and every replay of other graphs, in the whole process.
    """
    with _one_capture:
        current, cause = torch.cuda.current_stream(), None
        try:
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                try:
                    yield
                except BaseException as error:
                    cause = error  # the end of the capture raises as well, and less to the point
                    raise
        except BaseException as error:
            torch.cuda.set_stream(current)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(current.device_index, pool)
            with (
                contextlib.suppress(RuntimeError),
                torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(), capture_error_mode="thread_local"),
            ):
                torch.zeros(1, device=current.device)  # the end of a capture that succeeds is the end of one for the generator as well
            raise (cause or error) from None


class Graphs:
    """Runs packed batches of one model on one CUDA device, captured by shape when a shape comes again.

    run: (x [images, ...], context) -> logits, without gradients. The seed, the images' indices and their first draws are device tensors of
    the graph, so each replay has the noise it is asked for. May be called from any thread and on any stream; replays follow each other.
    always: capture batches of any number of rows, not only up to MOST_ROWS. What cannot be captured runs as it is, after one warning. What
    Python does in a forward pass, such as calling hooks or drawing random numbers on the host, happens at the capture and not at a replay.
    """

    def __init__(self, run: Callable, always: bool):
        self.run, self.always, self.problem = run, always, None
        self._graphs, self._seen, self._lock = {}, Counter(), threading.Lock()
        self._pool = self._side = self._done = None

    def __call__(self, x: torch.Tensor, context: NoiseContext) -> torch.Tensor:
        key = x.shape, x.dtype, x.stride(), context.images, context.draws, context.backend, context.noiseless_stream
        wanted = self.always or context.images * context.draws <= MOST_ROWS
        if not wanted or self.problem or torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
            return self.run(x, context)
        with self._lock, torch.cuda.device(x.device):
            if key not in self._graphs:
                self._seen[key] += 1
                if self._seen[key] < 2 or len(self._graphs) >= MOST:
                    return self.run(x, context)
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)  # all graphs share one pool of memory, and another stream may be in it
            if key not in self._graphs:
                try:
                    self._graphs[key] = self._capture(x, context)
                except Exception as error:
                    if out_of_memory(error):
                        raise  # fewer rows may have a graph
                    self.problem = str(error).splitlines()[0] if str(error) else type(error).__name__
                    warn_caller(f"rse-fast: the model cannot be captured in a CUDA graph and runs without one ({self.problem})")
                    return self.run(x, context)
            graph, static, noise, logits = self._graphs[key]
            static.copy_(x)
            self._set(noise, context)
            graph.replay()
            result = logits.clone()
            self._done = stream.record_event()
            context.calls.update(noise.calls)
            return result

    @torch.inference_mode(False)  # the tensors of a graph that is captured under inference_mode are written outside it as well
    @torch.no_grad()
    def _capture(self, x, context):
        sample_ids = torch.zeros((context.images, 2), dtype=torch.int64, device=x.device)
        seed = torch.zeros_like(context.seed)
        noise = dataclasses.replace(context, seed=seed, image_offset=0, draw_offset=0, sample_ids=sample_ids, calls={})
        static = x.clone()
        self._set(noise, context)
        side = self._side = self._side or torch.cuda.Stream()  # one: torch keeps a workspace of cuBLAS for each
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels, picks algorithms, fills caches: none of it may happen in a capture
                self._fresh(noise)
                self.run(static, noise)
        torch.cuda.current_stream().wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._fresh(noise)
        with capturing(graph, side, self._pool):
            logits = self.run(static, noise)
        return graph, static, noise, logits

    @staticmethod
    def _fresh(noise):
        noise.calls.clear()  # one context is one forward pass: layers count their calls in it

    @staticmethod
    def _set(noise, context):
        noise.seed.copy_(context.seed)
        if context.sample_ids is not None:
            noise.sample_ids.copy_(context.sample_ids)
        else:
            first = context.image_offset
            noise.sample_ids[:, 0] = torch.arange(first, first + context.images, device=noise.sample_ids.device)
            noise.sample_ids[:, 1] = context.draw_offset
