"""The ensemble of n noisy passes as one module: draws packed into the batch, softmax averaged (Liu et al., ECCV 2018)."""

import functools
import itertools
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch.fx import Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from rse_fast import arguments, autograd, inputs, ops, outputs
from rse_fast.context import NoiseContext, is_checkpointed
from rse_fast.ensemble import convolution, gradient, quantize
from rse_fast.ensemble import temperature as calibrated
from rse_fast.ensemble.early_exit import make as make_criterion
from rse_fast.ensemble.prediction import DrawStatistics, Prediction
from rse_fast.ensemble.prepare import Preparation, Prepared, no_layers
from rse_fast.ensemble.softmax import LogSumOfDraws, log_softmax
from rse_fast.ensemble.stream import Scheduler, in_order
from rse_fast.ensemble.warn import warn_caller
from rse_fast.nn import NO_GRAPH, NO_SCRIPT, noise_layers, number_layers, one_node

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float16,
}  # fmt: skip

NO_EXPORT = (
    "an Ensemble runs a snapshot of its model, which torch.export and fullgraph=True cannot take: rse_fast.export writes a program whose "
    "seed is an input, and torch.compile without fullgraph=True leaves an Ensemble as it is"
)

Function = TypeVar("Function", bound=Callable[..., Any])


def _left_by_compilers(function: Function) -> Function:
    """`torch.compiler.disable` for calls that take fresh numbers of the operating system and run a snapshot, which is optimised already.

    It is done by what `torch.compiler.disable` does, without its import of the compiler, which would take as long as all of torch's.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):  # type: ignore[no-untyped-def]  # the signature is that of function
        return function(*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    run._torchdynamo_disable_msg = NO_EXPORT  # type: ignore[attr-defined]  # what a compiler says that may leave nothing
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(run.__code__, eval_frame._FrameExecStrategy(skip, skip))  # type: ignore[attr-defined]  # and what it calls
    return cast(Function, run)


class Ensemble(nn.Module):
    """Averages the softmax of ``draws`` noisy passes of a model that has noisy layers (see `rse_fast.convert`).

    Args:
        model: maps [N, ...] to logits [N, K], or [N, K, H, W] of pixels; runs in eval mode with its noise on. Its own mode is left as it
            is.
        draws: noisy passes for each image, >= 1.
        seed: None takes fresh entropy from the operating system at every call, which is what a defence needs. A number makes every
            call repeat the same noise, hence the model deterministic and attackable: for audits and tests only.
        max_rows: most rows (images x draws) of a packed batch. Default: by the free memory and a sweet spot that the first large call
            measures. Where memory runs out all the same, the batch is run again in halves, and later ones are no larger.
        dtype: "auto" is bfloat16 where the hardware computes in it and float32 otherwise; or float32, bfloat16, float16. "int8" runs noisy
            convolutions on bytes, the noise being the dither, and the rest as "auto" does: on the CPU, for inference only (no gradient).
            `quantization` tells which layers stayed in the higher precision, and why.
        calibration: for "int8", batches of images [N, C, H, W] like those to come; the steps are chosen on them, with the noise on.
        fuse: run an optimised snapshot of the model, renewed by itself when a tensor, module, hook or plain attribute has changed
            (`refresh` forces it). False runs the live model in its own dtype, under autocast for a lower one.
        early_exit: None takes all draws of every image. "exact": an image stops when its remaining draws cannot change its label, which
            is that of all draws, always. A number c in (0.5, 1): it stops when, at confidence c, its label is that of infinitely many
            draws, and never later than ``draws``. `Prediction.draws_used` tells. For `predict` and `stream`; `forward` takes all draws.
        backend: what makes the noise, as in `rse_fast.functional.add_noise`.
        algorithm: what computes the 3x3 convolutions of stride 1 in a fused snapshot on a CPU. "auto" takes for each layer what is
            faster on this machine: the vendor's "direct" algorithm, or Winograd's, which makes the noise inside and needs 4/9 or 1/4 of
            the multiplications. "winograd" takes Winograd's for all such layers. `algorithms` tells which layer runs what. The two
            differ by rounding alone: the choice moves float32 logits by less than 1e-5 of the largest one for every layer, and bfloat16
            logits by no more than bfloat16 itself does. In int8 they differ by more (`quantization`), so a rule on the layer's channels
            chooses, not a measurement. Within a process the choice for a layer is made once and stays, whatever the calls.
        temperature: in [0.1, 10]: `probs`, and what `forward` returns, are the mean softmax to the power of 1 / temperature, normalised
            again. It changes no label, vote or certificate. `rse_fast.fit_temperature` finds the one for validation images.
        cuda_graphs: whether packed batches on a CUDA device are captured in CUDA graphs: None up to 4096 rows, and if no module has a hook,
            which a replay does not call; True always; False never. Every replay has fresh noise. A model that cannot be captured runs
            without, after one warning.
        logits: where the logits are in what the model returns: a name ("logits"), an index, or a function of it. None finds them in a
            tensor, by the name "logits" or "out" in a mapping, dataclass or named tuple, as its only entry, and first in a plain tuple.

    The result for an image depends on (seed, image index, model) alone: chunks and batch splits change it by rounding at most, and
    fewer draws are a prefix of more. One ensemble may be called from many threads.

    ``draws``, ``seed``, ``max_rows``, ``early_exit`` and ``temperature`` may be set later, with the checks of the constructor, and the next
    call follows. The other arguments are fixed, since a snapshot is made by them: setting one is an AttributeError.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is out of range, or the model has no noisy layers.

    Examples:
        >>> ensemble = rse_fast.Ensemble(rse_fast.convert(model), draws=10)
        >>> ensemble.predict(images).labels  # int64 [B]; ensemble(images) is the log of the mean softmax, with a gradient

    Reference: Liu, Cheng, Zhang, Hsieh, ECCV 2018.
    """

    def __init__(
        self,
        model: nn.Module,
        draws: int = 10,
        *,
        seed: int | None = None,
        max_rows: int | None = None,
        dtype: str | torch.dtype = "auto",
        fuse: bool = True,
        early_exit: str | float | None = None,
        calibration: Iterable[Tensor] | None = None,
        backend: str = "auto",
        algorithm: str = "auto",
        cuda_graphs: bool | None = None,
        logits: outputs.Choice = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if not noise_layers(model):
            raise ValueError(no_layers(model))
        if not isinstance(dtype, (str, torch.dtype)) or (dtype not in ("auto", "int8") and dtype not in DTYPES):
            raise ValueError(f"dtype must be 'auto', float32, bfloat16, float16 or 'int8', got {dtype!r}")
        if dtype == "int8" and not fuse:
            raise ValueError("fuse must be True for dtype 'int8', which runs a snapshot of the model, got False")
        if dtype != "int8" and calibration is not None:
            raise ValueError(f"calibration is for dtype 'int8' alone, got it with dtype {dtype!r}")
        if backend not in arguments.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, arguments.BACKENDS))}, got {backend!r}")
        if cuda_graphs not in (None, True, False):
            raise ValueError(f"cuda_graphs must be None, True or False, got {cuda_graphs!r}")
        outputs.check(model, logits)
        self.draws, self.seed, self.max_rows = draws, seed, max_rows
        self.early_exit, self.temperature = early_exit, temperature
        self.dtype, self.fuse, self.backend, self.cuda_graphs, self.logits = dtype, bool(fuse), backend, cuda_graphs, logits
        convolution.check(model, algorithm, DTYPES.get(dtype), self.fuse, dtype == "int8", backend)
        self.algorithm = algorithm
        self.calibration = quantize.check_calibration(calibration) if dtype == "int8" else None
        number_layers(model)
        self.model = model
        compute = DTYPES.get(dtype)  # None: the best of the device
        self._preparation = Preparation(model, compute, self.fuse, backend, cuda_graphs, self.calibration, algorithm, logits)
        self._live = Preparation(model, compute, False, backend, False, None, logits=logits)  # for the gradient of its weights
        self._live.said = self._preparation.said

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and hasattr(self, name):
            raise AttributeError(
                f"{name} of an Ensemble is fixed, since its snapshot is made by it; make another: Ensemble(model, {name}=...)"
            )
        super().__setattr__(name, _SETTABLE[name](value) if name in _SETTABLE else value)

    def __prepare_scriptable__(self) -> None:  # what torch.jit.script asks first
        raise ValueError(NO_SCRIPT)

    # ------------------------------------------------------------------------------------------------------------------ public
    @_left_by_compilers
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The log of the mean softmax, which attacks and losses act on.

        It is differentiable in ``x``: the gradient is that of the whole ensemble, exact to rounding, in memory that does not grow with the
        draws (see `rse_fast.ensemble.gradient`). It is differentiable in the parameters of the model, too: where backward asks for their
        gradient, the model itself runs again beside its fused snapshot. It takes all draws, whatever ``early_exit`` says.

        Args:
            x: float [B, ...], as the model takes them; see `predict`.

        Returns:
            float32 [B, K], at the temperature, on the device of the model; of a model that classifies pixels [B, K, H, W].

        Raises:
            TypeError: x is no dense float tensor, and nothing that is clearly a batch of images.
            ValueError: x is no batch, or of a shape that the model does not take; the model does not return logits [N, K]; or there is
                no seed inside `torch.utils.checkpoint`, where backward could not repeat the noise.
            RuntimeError: a gradient is asked of an int8 ensemble.

        Examples:
            >>> loss = torch.nn.functional.nll_loss(ensemble(images), labels)
        """
        if isinstance(x, Proxy):
            return one_node(self, x)
        x = self.images(x)
        if self.dtype == "int8":
            quantize.check_no_gradient(x)
        if self.seed is None and is_checkpointed():
            raise ValueError(
                "seed must be a number within torch.utils.checkpoint, got None: backward runs the ensemble again, and fresh noise would be "
                "other noise; give Ensemble(seed=...), or call it without checkpoint, since it bounds the memory of its gradient by itself"
            )
        seed = arguments.seed_tensor(self.draw_seed(None), x.device)
        if self.seed is None and autograd.is_vectorised():  # its randomness says: other noise for each entry, the same, or an error
            seed = seed ^ torch.randint(-(2**63), 2**63 - 1, (), device=x.device)
        weights = []  # those that want a gradient, and that a snapshot only holds copies of
        if self.fuse and self.dtype != "int8" and torch.is_grad_enabled():
            weights = [t for t in (*self.model.parameters(), *self.model.buffers()) if t.requires_grad]

        draws, temperature = self.draws, self.temperature  # backward may run when they are set to others

        def live(x: Tensor, seed: Tensor) -> Tensor:
            with self._live.ready(x) as model:
                return self._log_mean(self._live, model, x, seed, draws, temperature)

        # What torch.func.functional_call has put in place, and a buffer that wants a gradient, is there for this call only.
        if weights and (autograd.is_transformed() or not all(isinstance(t, nn.Parameter) for t in weights)):
            return live(x, seed)
        with self._preparation.ready(x, gradients=torch.is_grad_enabled() and x.requires_grad) as model:
            if not weights:
                return self._log_mean(self._preparation, model, x, seed, draws, temperature)
            if not model.once:
                guarded = gradient.FirstDerivative.apply(x, weights) if x.requires_grad else x
                result = self._log_mean(self._preparation, model, guarded, seed, draws, temperature)
                return result + gradient.OfWeights.apply(live, model.watch, result.detach(), x.detach(), seed, *weights)
        return live(x, seed)

    def _log_mean(
        self, preparation: Preparation, model: Prepared, x: Tensor, seed: Tensor, draws: int, temperature: float
    ) -> Tensor:  # fmt: skip
        """Log of the mean softmax of ``draws`` draws, float32 [B, K, ...]."""
        rows = []
        for _, draw, logits in self._passes(preparation, model, x, seed, 0, draws):
            if draw.start == 0:
                rows.append(LogSumOfDraws(logits))
            else:
                rows[-1].add(logits)
        if not rows:  # no images: for the sake of their gradient
            return x.new_zeros((0, model.classes, *model.runner.pixels), dtype=torch.float32) + x.sum()
        mean = calibrated.rescale(torch.cat([part.value() for part in rows]) - math.log(draws), temperature)
        return mean.movedim(-1, 1).contiguous()

    @_left_by_compilers
    @torch.no_grad()
    def predict(self, x: torch.Tensor, seed: int | None = None, image_offset: int = 0) -> Prediction:
        """Predicts a batch of images.

        Args:
            x: float [B, ...], as the model takes them; or NumPy arrays or PIL images, see `rse_fast.inputs.batch`.
            seed: of the noise, an int taken modulo 2^64; None takes the ensemble's, or fresh entropy if it has none.
            image_offset: index of the first image, which addresses its noise: a data set predicted in parts, each with its own
                image_offset, gets the noise it would get as one batch.

        Returns:
            A `Prediction` on the device of x, which for arrays and pictures is the CPU.

        Raises:
            TypeError: x is no dense float tensor, and nothing that is clearly a batch of images.
            ValueError: x is no batch, or of a shape that the model does not take; image_offset is out of range; or the model does not
                return logits [N, K].

        Examples:
            >>> out = ensemble.predict(images)
            >>> out.labels, out.mutual_information  # int64 [B]; float32 [B], in nats
        """
        if autograd.is_transformed():
            raise ValueError(
                "x must not be inside a transform of torch.func or forward-mode differentiation, which Ensemble.predict has no rule for; "
                "predict the whole batch [B, ...] at once, or call the ensemble itself, which has gradients"
            )
        device, x, seed = inputs.device(x), self.images(x), self.draw_seed(seed)
        image_offset = arguments.first_image(image_offset, len(x))
        if self.early_exit is None:
            return self._prediction(self._all_draws(x, arguments.seed_tensor(seed, x.device), image_offset), seed, device)
        scheduler = self._scheduler(x, seed, self.draws)
        scheduler.put(x, image_offset)
        finished = [scheduler.nothing()]
        while scheduler.busy:
            finished.append(scheduler.step())
        statistics = DrawStatistics.cat(finished)
        return self._prediction(statistics.select(statistics.index.argsort()), seed, device)

    def stream(self, batches: Iterable[torch.Tensor], draws: int | None = None) -> "Stream":
        """Predicts batches as they come.

        With early exit, decided images free their slots for waiting ones, so the packed batch stays full (`Stream.occupancy`). Image i of
        the stream gets the noise and the result that `predict` gives it with the stream's seed and ``image_offset=i``. At most two
        packed batches of images, or two of the source's, are held at a time, and a bounded number of results.

        Args:
            batches: iterable of batches [B, ...], all of one image shape; B may differ.
            draws: passes an image, >= 1; default: the ensemble's.

        Returns:
            An iterator over one `Prediction` for each batch, in order, on the device of the first batch. Its ``seed`` repeats the stream.

        Raises:
            TypeError: ``batches`` is a tensor, or cannot be iterated over; ``draws`` is no int.
            ValueError: ``draws`` is below 1. Errors in a batch are raised where the iterator reaches it.

        Warns:
            RuntimeWarning: once a process, if the ensemble has a seed: serving needs fresh noise.

        Examples:
            >>> for out in ensemble.stream(loader_of_images):
            ...     print(out.labels, out.draws_used)
        """
        return Stream(self, batches, self.draws if draws is None else _count("draws", draws))

    @_left_by_compilers
    def prepared(self, x: torch.Tensor, argument: str = "x") -> Prepared:
        """The model as it is run for images like x [B, ...]: what it returns, how it is packed, and how large packed batches are.

        argument: as in `images`.
        """
        with self._preparation.ready(self.images(x, argument), argument) as model:
            return model

    def rows(self, x: torch.Tensor) -> int:
        """The size of a full packed batch at present.

        Args:
            x: a batch [B, ...]; only the shape of an image, its dtype and device matter.

        Returns:
            Rows, images times draws.

        Raises:
            TypeError: x is no dense float tensor, and nothing that is clearly a batch of images.
            ValueError: x is no batch, or of a shape that the model does not take.

        Examples:
            >>> ensemble.rows(images)  # 80 on a CPU, before a call has measured other sizes
        """
        return self.prepared(x).planner.rows(self.max_rows)

    def refresh(self) -> None:
        """Takes a new snapshot of the model at the next call. It is needed only after a change that no version counter shows.

        Examples:
            >>> model.conv.weight.data.copy_(other)
            >>> ensemble.refresh()
        """
        self._preparation.refresh()

    @property
    def quantization(self) -> quantize.Report | None:
        """Which layers run in int8, and which do not and why. Calibrates, if no call has done so yet.

        Returns:
            None for other dtypes than "int8". Else a report: ``quantized`` has each layer that runs in int8, with its error as a share of
            the layer's own noise, ``kept`` each layer in the higher precision, with the reason. Printed, it is a table.
        """
        if self.calibration is None:
            return None
        return self.prepared(self.calibration[0], "calibration").report

    @property
    def algorithms(self) -> dict[str, convolution.Choice]:
        """What each convolution of the fused snapshot runs, and why.

        Returns:
            (algorithm, why) by the layer's name; "direct" or a form of Winograd's. Empty before the first call, and for an unfused model.
        """
        return self._preparation.algorithms

    def extra_repr(self) -> str:
        seed = "fresh at every call" if self.seed is None else self.seed
        text = f"draws={self.draws}, seed={seed}, dtype={self.dtype}, fuse={self.fuse}, backend={self.backend!r}"
        text += "" if self.temperature == 1 else f", temperature={self.temperature:.4g}"
        layers = [f"({name}): {choice.algorithm}, {choice.why}" for name, choice in self.algorithms.items()]
        return "\n".join([f"{text}, algorithm={self.algorithm!r}", *layers])

    def images(self, x: torch.Tensor, argument: str = "x") -> torch.Tensor:
        """``x``, checked to be a batch [B, ...] of images, on the device of the model; NumPy arrays and PIL images as
        `rse_fast.inputs.batch` takes them. Raises TypeError or ValueError, which call the images by the name of the ``argument``."""
        if isinstance(x, Proxy):  # of predict, say: its results are no single node
            raise ValueError(NO_GRAPH)
        x = inputs.batch(x, self.model, argument)
        parameter = next(self.model.parameters(), None)
        if x.is_meta and (parameter is None or not parameter.is_meta):
            raise ValueError(f"{argument} must have data, got a tensor on the meta device")
        return x if parameter is None or parameter.device == x.device else x.to(parameter.device)

    def draw_seed(self, seed: int | None) -> int:
        """The seed of one call, in [0, 2^64): ``seed``, else the ensemble's own, else 64 fresh bits of the operating system."""
        if torch.onnx.is_in_onnx_export():
            raise ValueError(ops.NO_ONNX)
        if torch.compiler.is_exporting():
            raise ValueError(NO_EXPORT)
        if seed is not None:
            return _seed(seed)
        if self.seed is not None:
            return self.seed
        if torch.jit.is_tracing() or get_proxy_mode() is not None:
            raise ValueError(
                "seed must be a number for an Ensemble to be traced, got None: fresh noise at every call would become one "
                "constant of the graph; rse_fast.export writes a program whose seed is an input; give Ensemble(seed=...) for a graph with "
                "that one noise"
            )
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "seed: a captured call would have the same noise at every replay; give a seed, or let cuda_graphs=True capture"
            )
        return int.from_bytes(os.urandom(8), "little")

    # ----------------------------------------------------------------------------------------------------------------- one call
    def _all_draws(self, x: Tensor, seed: Tensor, image_offset: int) -> DrawStatistics:
        """The `DrawStatistics` of every draw of every image."""
        with self._preparation.ready(x) as model:
            statistics = [DrawStatistics.empty(torch.zeros(0, dtype=torch.int64, device=x.device), model.row)]
            for image, draw, logits in self._passes(self._preparation, model, x, seed, image_offset, self.draws):
                if draw.start == 0:
                    index = torch.arange(image_offset + image.start, image_offset + image.stop, device=x.device)
                    statistics.append(DrawStatistics.empty(index, logits.shape[2:]))
                statistics[-1].add(log_softmax(logits))
        return DrawStatistics.cat([t for t in statistics if len(t.index)] or statistics)

    def _scheduler(self, x: Tensor, seed: int, draws: int, argument: str = "x") -> Scheduler:
        """A `Scheduler` for images like ``x``, which runs them through the model."""
        key, model = arguments.seed_tensor(seed, x.device), self.prepared(x, argument)
        if model.runner.pixels and self.early_exit is not None:
            raise ValueError(
                f"early_exit must be None for a model that classifies pixels, got {self.early_exit!r}: an image has one number of draws, "
                "and would stop when its last pixel is decided"
            )

        def run(x: Tensor, sample_ids: Tensor, draws: int) -> Tensor:
            return self.logits_at(x, sample_ids, draws, key)

        criterion = make_criterion(self.early_exit, draws, max(model.classes, 1))
        return Scheduler(run, model.row, draws, model.planner.rows(self.max_rows), criterion, x.device)

    def logits_at(
        self, x: torch.Tensor, sample_ids: torch.Tensor, draws: int, seed: torch.Tensor, noiseless_stream: int | None = None
    ) -> torch.Tensor:
        """One packed batch: float32 logits [draws, A, ..., K] of images x [A, ...]: draws ``sample_ids[i, 1] ..`` of image
        ``sample_ids[i, 0]``. sample_ids int64 [A, 2] and seed, an int64 tensor, are on x's device. ``noiseless_stream``: see
        `rse_fast.context.NoiseContext`."""
        with self._preparation.ready(x) as model:

            def step(image: slice, draw: slice) -> Tensor:
                at = sample_ids[image].clone()
                at[:, 1] += draw.start
                images, draws = image.stop - image.start, draw.stop - draw.start
                context = NoiseContext(seed, images, draws, backend=self.backend, sample_ids=at, noiseless_stream=noiseless_stream)
                return self._logits(model, x[image], context)

            parts = list(model.planner.attempt(slice(0, len(x)), slice(0, draws), step))
        if len(parts) == 1:
            return parts[0][-1]
        logits = parts[0][-1].new_empty((draws, len(x), *parts[0][-1].shape[2:]))
        for image, draw, part in parts:  # memory did not suffice for the whole
            logits[draw, image] = part
        return logits

    def _prediction(self, statistics: DrawStatistics, seed: int, device: torch.device) -> Prediction:
        summary = statistics.summary(self.temperature)
        labels = summary["labels"]
        undefined = labels < 0
        if not (labels.is_cuda and torch.cuda.is_current_stream_capturing()) and bool(undefined.any()):
            warn_caller(
                f"rse-fast: the model gave NaN for {int(undefined.view(len(labels), -1).any(1).sum())} of {len(labels)} images; "
                "their label is -1 and their probs are NaN"
            )
        return Prediction(**{name: value.to(device) for name, value in summary.items()}, seed=seed)

    def _passes(
        self, preparation: Preparation, model: Prepared, x: Tensor, seed: Tensor, image_offset: int, draws: int
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields (image slice, draw slice, float32 logits [draws, images, ..., K]) for each packed batch, images outermost."""
        number = itertools.count()
        live = model.watch if not preparation.fuse else None  # a snapshot is as it was

        def step(image: slice, draw: slice) -> Tensor:
            batch = functools.partial(self._chunk, preparation, model, seed, image_offset + image.start, draw)
            return gradient.run(batch, x[image], next(number), live)

        wanted = torch.is_grad_enabled() and (x.requires_grad or not preparation.fuse)
        return model.planner.run(x.shape[0], draws, step, self.max_rows, wanted)

    def _chunk(self, preparation: Preparation, model: Prepared, seed: Tensor, image_offset: int, draw: slice, x: Tensor) -> Tensor:
        """`_logits` with the noise of given images and draws; backward may call it again, outside the context of `Preparation.ready`."""
        context = NoiseContext(seed, len(x), draw.stop - draw.start, image_offset, draw.start, self.backend)
        preparation.number()
        with preparation.mode():
            return self._logits(model, x, context)

    @staticmethod
    def _logits(model: Prepared, x: Tensor, context: NoiseContext) -> Tensor:
        """One packed batch: float32 logits [draws, images, K] of images ``x``, or [draws, images, H, W, K] of their pixels."""
        images, draws = context.images, context.draws
        logits = model.run(x, context)
        if not context.calls and model.runner.noisy:
            raise ValueError("model must call a noisy layer in its forward pass, got a pass without any")
        outputs.check_rows(logits, (images, images * draws))
        logits = logits.movedim(1, -1)
        row = logits.shape[1:]
        if logits.shape[0] == images:  # one draw, or all noise is switched off
            logits = logits.expand(draws, *logits.shape)
        logits = logits.reshape(draws, images, *row).float()
        if model.report is not None:  # bytes know no NaN, and make a bright pixel of an infinite one
            for rows in (~x.flatten(1).isfinite().all(-1), *context.undefined):
                rows = rows.expand(draws, images) if len(rows) == images else rows.view(draws, images)
                logits = logits.masked_fill(rows.view(draws, images, *[1] * len(row)), math.nan)
        return logits


class Stream:
    """Iterator over the predictions of `Ensemble.stream`, which makes it. Closing or dropping it frees everything it holds.

    Attributes:
        seed: the seed that reproduces the stream, in [0, 2^64).
    """

    # Packed batches of images and results held at most. Results are small, and many: while a hard image takes 100 draws, the slots beside
    # it finish eight times their number of easy ones, which wait for their turn.
    BACKLOG = 16

    def __init__(self, ensemble: Ensemble, batches: Iterable[torch.Tensor], draws: int):
        if isinstance(batches, torch.Tensor) or not isinstance(batches, Iterable):
            raise TypeError(f"batches must be an iterable of tensors [B, ...], got {type(batches).__name__}")
        self.seed = ensemble.draw_seed(None)
        if ensemble.seed is not None:
            _warn_of_seed()
        self._ensemble, self._draws = ensemble, draws
        self._scheduler: Scheduler | None = None
        self._predictions = self._run(iter(batches))

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Prediction:
        return next(self._predictions)

    def close(self) -> None:
        """Ends the stream: it gives no further predictions, and frees what it holds."""
        self._predictions.close()
        self._scheduler = None

    @property
    def occupancy(self) -> float:
        """Share of the rows of the packed batches so far that counted as a draw of an image: a float in [0, 1], nan before the first."""
        return self._scheduler.occupancy if self._scheduler else math.nan

    def _checked(self, x: Tensor, first: Tensor) -> Tensor:
        x = self._ensemble.images(x, "batch")
        if x.shape[1:] != first.shape[1:]:
            raise ValueError(f"batches must have images of one shape, got {tuple(x.shape[1:])} after {tuple(first.shape[1:])}")
        return x

    def _run(self, batches: Iterator[Tensor]) -> Generator[Prediction, None, None]:
        try:
            first = next(batches)
        except StopIteration:
            return
        device = inputs.device(first)
        first = self._ensemble.images(first, "batch")
        checked = (self._checked(x, first) for x in itertools.chain([first], batches))
        scheduler = self._scheduler = self._ensemble._scheduler(first, self.seed, self._draws, "batch")
        results = in_order(checked, scheduler, self.BACKLOG * scheduler.slots)
        while True:
            with torch.no_grad():  # not around the yield: it would reach into the consumer's code
                statistics = next(results, None)
            if statistics is None:
                return
            yield self._ensemble._prediction(statistics, self.seed, device)


@functools.cache  # once a process
def _warn_of_seed() -> None:
    warn_caller(
        "rse-fast: this stream is of an ensemble with a fixed seed, which makes the defence deterministic and attackable; leave the seed "
        "out to serve, and give one for audits and tests only"
    )


def _count(name: str, value: int) -> int:
    value = arguments.integer(name, value)
    if not 1 <= value <= 2**32:  # draws are counted in 32 bits
        raise ValueError(f"{name} must be at least 1{' and at most 2^32' if value > 1 else ''}, got {value}")
    return value


def _seed(seed: int) -> int:
    return arguments.integer("seed", seed) % 2**64


def _criterion(early_exit: str | float | None) -> str | float | None:
    make_criterion(early_exit, 1, 1)  # raises if it names none
    return early_exit


# Attributes that may be set at any time, and what checks them; those that a snapshot is made by, and are fixed.
_SETTABLE: dict[str, Callable[[Any], Any]] = {
    "draws": functools.partial(_count, "draws"),
    "max_rows": lambda value: None if value is None else _count("max_rows", value),
    "seed": lambda value: None if value is None else _seed(value),
    "early_exit": _criterion,
    "temperature": calibrated.check,
}
_FIXED = ("model", "dtype", "fuse", "backend", "cuda_graphs", "logits", "algorithm", "calibration")
