"""Keeps a model ready to run packed batches: a fused snapshot of it, or the model itself, with the checks and the plan that belong to it.

The model is watched. When it changes, or images of another shape come, everything is made anew at the next call. It is made on a thread
of its own: what surrounds the caller (modes, transforms of `torch.func`, hooks of activation checkpointing, autocast) does not reach it.
"""

import contextlib
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor

from rse_fast import autograd, outputs
from rse_fast.context import NoiseContext
from rse_fast.convert import listing, vanished
from rse_fast.ensemble import convolution, fuse, gradient, hooks, plan, quantize
from rse_fast.ensemble.fused_conv import FusedConv
from rse_fast.ensemble.graphs import Graphs
from rse_fast.ensemble.runner import Runner, best_dtype, mismatch, probe_images
from rse_fast.ensemble.unfit import unfit
from rse_fast.ensemble.warn import warn_caller
from rse_fast.ensemble.watch import GLOBAL_HOOKS, Watch
from rse_fast.nn import noise_layers, number_layers
from rse_fast.trace import Generators

FAR = (-1.0, 2.0)  # pixels scaled to [0, 1] stay within, changed by an attack or by noise of their own; bytes and normalised ones do not

# A snapshot is taken this many times at most where another thread changes the model meanwhile, which would mix two states of the model.
TRIES = 3


@dataclass(frozen=True)
class Prepared:
    """A model made ready for images of one shape.

    Attributes:
        runner: runs a packed batch.
        run: the runner, or its CUDA graphs.
        planner: how large packed batches are.
        report: which layers run in int8, for dtype "int8".
        problem: why the model runs unfused where a fused one was wanted, or None.
        algorithms: what each convolution of a fused snapshot runs, by the layer's name.
        watch: tells whether the model has changed since.
        once: another pass of the same images may differ: the model draws numbers of its own, or has hooks, which shall see one pass.
    """

    runner: Runner
    run: Runner | Graphs
    planner: plan.Planner
    report: quantize.Report | None = None
    problem: str | None = None
    algorithms: dict[str, convolution.Choice] = field(default_factory=dict)
    watch: Watch | None = None
    once: bool = False

    @property
    def classes(self) -> int:
        return self.runner.classes

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of an image's logits, the classes last."""
        return *self.runner.pixels, self.runner.classes


class Preparation:
    """A model, and what an ensemble needs of it, made when it is asked for. May be used from any thread.

    Args:
        model: has noisy layers.
        dtype: the one to compute in, None for the best of the device.
        fuse: take a fused snapshot; False runs the model itself.
        backend: of the noise.
        cuda_graphs: True, False, or None to decide.
        calibration: batches of images for an int8 snapshot, or None for no such.
        algorithm: of the convolutions of a fused snapshot, see `rse_fast.ensemble.convolution`.
        logits: where they are in what the model returns, see `rse_fast.outputs.take`.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None, fuse: bool, backend: str, cuda_graphs: bool | None, calibration,
        algorithm: str = "direct", logits: outputs.Choice = None,
    ):  # fmt: skip
        self.model, self.dtype, self.fuse, self.backend = model, dtype, fuse, backend
        self.cuda_graphs, self.calibration, self.algorithm, self.logits = cuda_graphs, calibration, algorithm, logits
        self._gradients = False
        self.said: set[str] = set()  # what a user was warned of
        self._lock, self._current, self._layers = threading.Lock(), None, []

    @contextlib.contextmanager
    def ready(self, x: torch.Tensor, argument: str = "x", gradients: bool = False):
        """The `Prepared` model for images like ``x`` [B, ...], in eval mode while the context lasts.

        argument: what the user knows the images as, where the model does not take them. gradients: whether a gradient of the images
        is wanted; from then on, a snapshot is checked for its gradients as well.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()] if autograd.is_transformed() else []
        if any(map(is_functorch_wrapped_tensor, tensors)):
            # torch.func.functional_call has put other tensors in place, for this call only.
            with eval_mode(self.model):
                dtype = tensors[0].dtype
                runner = Runner(self.model, dtype, self.dtype or dtype, True, None, logits=self.logits)
                yield Prepared(runner, runner, plan.Planner(x.device))
            return
        with self._lock:
            shape, dtype, device = x.shape, x.dtype, x.device  # x itself may belong to a transform of the caller's thread
            state = shape[1:], device, self._gradients or gradients
            if self._current is None or self._current[0] != state or self._current[1].watch.changed():
                if self._current is not None and self._current[0][0] != shape[1:]:  # refused before what other images need is dropped
                    problem = _on_a_thread_of_its_own(lambda: unfit(self.model, shape, argument), device)
                    if problem is not None:
                        raise ValueError(problem)
                self._current, self._gradients = None, state[-1]
                self._layers = list(number_layers(self.model).values())
                if not self._layers:
                    raise ValueError(no_layers(self.model))
                for _ in range(TRIES if self.fuse else 1):
                    watch = Watch(self.model)
                    prepared = _on_a_thread_of_its_own(
                        lambda: self._prepare(torch.empty((), dtype=dtype, device=device).expand(shape), argument), device
                    )
                    if not watch.changed():
                        break
                once = prepared.runner.random or hooks.watched(self.model)
                prepared = dataclasses.replace(prepared, watch=watch, once=once)
                self._current = state, prepared
                if prepared.problem is not None:
                    warn_caller(f"rse-fast: the model runs unfused: {prepared.problem}")
                for kind, text in (*_remarks(self.model, prepared.runner, x), *self._unnoticed(watch)):
                    if kind not in self.said:
                        self.said.add(kind)
                        warn_caller(f"rse-fast: {text}")
            self.number()
            prepared = self._current[1]
        with self.mode():
            yield prepared

    def _unnoticed(self, watch):
        if self.fuse and watch.unversioned:
            yield (
                "inference tensors",
                "the model has tensors that were made in torch.inference_mode, and what is written into those goes unnoticed; "
                "call refresh() after a change, or make the model outside of it",
            )

    def mode(self):
        """A snapshot is in eval mode for good, a live model within this context."""
        return contextlib.nullcontext() if self.fuse else eval_mode(self.model)

    def number(self) -> None:
        """Numbers the layers again where an ensemble of a part of the model, or of more than it, has numbered them otherwise."""
        if any(layer.stream != index for index, layer in enumerate(self._layers)):
            number_layers(self.model)

    @property
    def algorithms(self) -> dict[str, convolution.Choice]:
        """Of the snapshot that there is, none before the first call."""
        current = self._current
        return {} if current is None else current[1].algorithms

    def refresh(self) -> None:
        """Makes everything anew at the next call."""
        with self._lock:
            self._current = None

    def __getstate__(self):
        return {**self.__dict__, "_lock": None, "_current": None, "_layers": []}  # a copy takes its own snapshot

    def __setstate__(self, state):
        self.__dict__ = {**state, "_lock": threading.Lock()}

    # ------------------------------------------------------------------------------------------------------------------ anew
    @hooks.without_hooks()
    def _prepare(self, x, argument) -> Prepared:
        generators, compute, drew = Generators(self.model, x), self.dtype or best_dtype(x.device), True
        try:
            runner, report, problem, algorithms = self._tried(x, compute, argument)
            drew = runner.random
        finally:
            if drew:  # a forward that draws numbers of its own did so in probes, too; one that failed may have
                generators.restore()
        kind = x.shape[1:], compute if self.calibration is None else "int8", self.fuse
        kept = (gradient.KEEP + 1) * runner.saved_bytes if runner.saved_bytes else None  # and one that is run again
        in_bytes = report is not None and bool(report.quantized)
        planner = plan.planner(self.model, kind, x.device, runner.row_bytes, kept, in_bytes)
        if x.device.type != "cuda":
            return Prepared(runner, runner, planner, report, problem, algorithms)
        torch.cuda.current_stream(x.device).synchronize()  # a call on another stream may be the next to read the snapshot
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self.model.modules())  # a replay does not call them
        captures = not hooked if self.cuda_graphs is None else self.cuda_graphs
        run = Graphs(runner, always=self.cuda_graphs is True) if captures else runner
        return Prepared(runner, run, planner, report, problem, algorithms)

    def _tried(self, x, compute, argument) -> tuple[Runner, quantize.Report | None, str | None, dict[str, convolution.Choice]]:
        """(runner, report, problem, algorithms) as in `Prepared`, of a snapshot or of the live model, tried by probes."""
        noisy = any(layer.noise_enabled for layer in noise_layers(self.model).values())
        report, problem, algorithms = None, None, {}
        if self.fuse:
            runner, problem, algorithms = self._fused(x, compute, noisy, argument)
            if self.calibration is not None:
                report, chosen = self._to_int8(runner, x, compute)
                algorithms = {**algorithms, **chosen}
            if self.algorithm == "winograd" and all(choice.algorithm == "direct" for choice in algorithms.values()):
                raise convolution.refusal(problem or "; ".join(dict.fromkeys(choice.why for choice in algorithms.values())))
        else:
            parameter = next(self.model.parameters(), None)
            try:
                tried = hooks.twin(self.model)
            except Exception:  # a module that cannot be copied
                tried = self.model
            with eval_mode(self.model):
                runner = self._runner(tried, compute if parameter is None else parameter.dtype, compute, noisy, x, argument, own=False)
            runner.model = self.model
        return runner, report, problem, algorithms

    def _runner(self, model, dtype, compute, noisy, x, argument, own=True) -> Runner:
        """Raises ValueError where the images ``x`` are of a shape that the model does not take."""
        runner = Runner(model, dtype, compute, noisy, x, own, self.logits)
        if runner.called is None and (problem := unfit(self.model, x.shape, argument)):
            raise ValueError(problem)
        return runner

    def _fused(self, x, dtype, noisy, argument) -> tuple[Runner, str | None, dict[str, convolution.Choice]]:
        """(runner of a fused snapshot, None, its algorithms), or (of an unfused one, why, none) where that cannot be had."""
        if any(GLOBAL_HOOKS):
            problem = "hooks of all modules are registered, which a fused model would not call for each"
            return self._runner(fuse.copy(self.model, dtype), dtype, dtype, noisy, x, argument), problem, {}
        fused, problem = fuse.snapshot(self.model, dtype, shape=x.shape[1:])
        runner = self._runner(fused, dtype, dtype, noisy, x, argument)
        if problem is None:
            direct = self._why_direct(runner, x.device)
            # Forms of Winograd's algorithm: where the probe refuses them, those with products in float32, then none.
            forms = [] if direct or self.calibration is not None else convolution.forms(dtype)
            tried = [forms] + [t for t in ([form for form in forms if form.products == torch.float32], []) if t != forms]
            for forms in tried:
                algorithms = self._choose(runner, x, forms, direct or problem or "the rest of an int8 model is direct")
                problem = mismatch(runner, fuse.copy(self.model, torch.float32), x, self._gradients)
                if problem is None:
                    return runner, None, algorithms
        return self._runner(fuse.copy(self.model, dtype), dtype, dtype, noisy, x, argument), problem, {}

    def _why_direct(self, runner, device) -> str | None:
        if self.algorithm == "direct":
            return "as was asked for"
        if runner.layout != torch.channels_last:
            return "the model wants contiguous maps"
        return convolution.unavailable(runner.dtype, device, self.backend)

    def _choose(self, runner, x, forms, why_none) -> dict[str, convolution.Choice]:
        def run():
            return runner(probe_images(x, 2), NoiseContext(torch.zeros((), dtype=torch.int64, device=x.device), 2, 2))

        rows = plan.SWEET_SPOT["cpu"]  # whatever a call finds better: the choice shall not depend on it
        return convolution.choose(runner.model, run, rows, self.algorithm, forms, why_none)

    def _to_int8(self, runner, x, dtype) -> tuple[quantize.Report, dict[str, convolution.Choice]]:
        """Makes a runner of a fused snapshot run an int8 one; ``dtype`` is that of the layers that stay in floating point."""
        quantize.check_available(x.device)
        if x.shape[1:] != self.calibration[0].shape[1:]:
            wanted, got = tuple(x.shape[1:]), tuple(self.calibration[0].shape[1:])
            raise ValueError(f"calibration must have images of the shape of x, {wanted}, got {got}")
        names = list(noise_layers(self.model))
        if not isinstance(runner.model, torch.fx.GraphModule):
            return quantize.Report({}, dict.fromkeys(names, "the model runs unfused"), quantize.weight_bits()), {}
        report, fast, chosen = None, {}, {}
        forms = [] if self._why_direct(runner, x.device) else convolution.byte_forms()

        def rewrite(graph):
            def run():
                image_offset = 0
                for batch in itertools.chain.from_iterable(b.split(plan.SWEET_SPOT["cpu"]) for b in self.calibration):
                    with NoiseContext(torch.tensor(0), len(batch), 1, image_offset, backend=self.backend):
                        graph(batch.contiguous(memory_format=torch.channels_last))
                    image_offset += len(batch)

            nonlocal report, fast, chosen
            with torch.no_grad():
                report, fast, chosen = quantize.quantize(graph, names, run, dtype, forms, self.algorithm)

        runner.model, _ = fuse.snapshot(self.model, dtype, rewrite, x.shape[1:])
        for fused in runner.model.modules():
            if isinstance(fused, FusedConv) and fused.layer in fast:
                fused.winograd = fast[fused.layer]
                fused.winograd.follow(fused)
        return report, chosen


def no_layers(model: nn.Module) -> str:
    """Why a model without noisy layers makes no ensemble."""
    if gone := vanished(model):
        return f"model must have noisy layers, got none any more: {listing(gone)} had noise when the model was converted"
    return "model must have noisy layers, got none; rse_fast.convert(model) adds them"


def _remarks(model, runner, x):
    """What is likely to be a mistake, as pairs of a kind and a text, for a user to read once."""
    layers = noise_layers(model)
    if gone := vanished(model):
        yield "vanished", f"{listing(gone)} had noise when the model was converted and have none now, after a reparameterisation perhaps"
    if runner.called is not None and runner.noisy:
        called = {stream & 0xFFFF for stream in runner.called}
        if uncalled := [name for name, layer in layers.items() if layer.noise_enabled and layer.stream not in called]:
            yield "uncalled", f"the model never calls the noisy layers {listing(uncalled, 5)}, so their noise is not there"
    if runner.plain:
        names = [name for name, layer in layers.items() if layer.stream in runner.plain]
        text = "get one row for all images, a table of positions perhaps, and add no noise in an ensemble"
        yield "one row", f"the noisy layers {listing(names, 5)} {text}; convert(..., exclude={tuple(names)!r}) says so"
    if runner.probabilities:
        yield "softmax", "the model gives probabilities; an ensemble takes logits, so leave out the softmax at the model's end"
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None]
    if norms or runner.mixes:
        why = "BatchNorm without running statistics" if norms else "something in the model, statistics of the batch perhaps,"
        text = f"{why} makes an image's logits depend on the other images in the batch"
        yield "batch statistics", f"{text}; use running statistics (track_running_stats=True), or GroupNorm"
    first = next((layer for layer in layers.values() if runner.called and layer.stream == runner.called[0] & 0xFFFF), None)
    if first is None or not x.numel() or autograd.is_transformed() or not autograd.is_direct(x):
        return
    channels = getattr(first, "in_channels", None) or getattr(first, "in_features", None)
    if channels in (None, x.shape[1], x[0].numel()):
        low, high = torch.aminmax(x.detach())
        if low < FAR[0] or high > FAR[1]:
            yield (
                "range",
                f"images reach from {low.item():.3g} to {high.item():.3g}, and the first sigma, of noise on them, is for pixels in [0, 1]: "
                "scale images to [0, 1] and let the model normalise behind the noise, or choose sigma for these units",
            )


def _on_a_thread_of_its_own(make: Callable, device: torch.device):
    """``make()`` without gradients on a fresh thread, with the caller's default device and current stream; raises what it raises."""
    result, default = [], torch.get_default_device()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run():
        try:
            with torch.no_grad(), default if default.type != "cpu" else contextlib.nullcontext(), torch.cuda.stream(stream):
                result.append(make())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, name="rse-fast-prepare", daemon=True)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


# Modules that ensembles hold in eval mode: how many calls are under way, and what the mode was before the first.
_held: "weakref.WeakKeyDictionary[nn.Module, list]" = weakref.WeakKeyDictionary()
_held_lock = threading.Lock()


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """``model`` in eval mode while any thread is within; each module's own mode comes back afterwards."""
    modules = list(model.modules())  # two models may share some
    with _held_lock:
        for module in modules:
            _held.setdefault(module, [0, module.training])[0] += 1
            module.training = False  # and nothing else that its train(False) does, which could not be taken back
    try:
        yield
    finally:
        with _held_lock:
            for module in modules:
                entry = _held[module]
                entry[0] -= 1
                if entry[0] == 0:
                    module.training = entry[1]
                    del _held[module]
