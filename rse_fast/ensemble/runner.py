"""A model made ready to run packed batches: how its batch is packed, in which dtype it computes, and whether a fused copy still is it."""

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from rse_fast import autograd, outputs
from rse_fast.context import NoiseContext, RowsError
from rse_fast.convert import meta_copy
from rse_fast.ensemble.memory import PeakBytes, SavedBytes
from rse_fast.ensemble.softmax import contending, distance
from rse_fast.trace import RandomOpDetector

# The error of a fused model in low precision, against float32, may be this many times that of the unfused one: both errors are sums of
# the same kind of roundings, whose sizes differ by chance. A wrong fusion is off by far more. The same factor holds for two passes whose
# kernels add in no fixed order.
CHANCE = 4


class Runner:
    """Runs a model in eval mode and ``dtype`` on packed batches of images like ``x``, computing in ``compute``.

    x: None tries nothing, and packs the batch at the input, which is right for every model.

    noisy: whether any noise is switched on. own: whether the model may be laid out in memory as it runs best.

    logits: where the logits are in what the model returns, see `rse_fast.outputs.take`.

    classes: length of the logits, 0 if unknown. pixels: shape of what each class has a map of, () for logits [N, K]. packs_input: whether
    the batch is packed at the input, since something bypasses the first noise, or takes the rows for images behind it. layout: of images
    of 4 dimensions. row_bytes: of all tensors that are alive at once, a row; saved_bytes: of those that are kept for the gradient of the
    images, a row; None if unknown. random: whether the forward draws numbers of torch's generators by itself. called: streams of the
    layers that a probe of real images called, in order; None if it failed. plain: streams of layers that get one row for all images, and
    no noise. probabilities: whether it gave probabilities rather than logits. mixes: whether an image's logits depend on those beside it.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, compute: torch.dtype, noisy: bool, x: torch.Tensor | None, own: bool = True,
        logits: outputs.Choice = None,
    ):  # fmt: skip
        self.model, self.dtype, self.compute, self.noisy, self.logits = model, dtype, compute, noisy, logits
        self.row_bytes = self.saved_bytes = None
        self.layout, self.packs_input, self.random, self.classes, self.pixels = torch.channels_last, True, False, 0, ()
        self.called, self.probabilities, self.plain, self.divided, self.mixes = None, False, frozenset(), set(), False
        if x is not None:
            self._try(x, own)

    def _try(self, x, own):
        """Finds out what the model needs."""
        images = probe_images(x, 2)
        packed = self._first_probe(images)
        if _wants_contiguous(packed):
            self.layout = torch.contiguous_format
            if own:
                self.model.to(memory_format=self.layout)
            packed = self._first_probe(images)
        if isinstance(packed, outputs.Unclear):
            raise packed
        lazy = self._dry_run(x, packed=False)
        shape = lazy or self._dry_run(x, packed=True)
        if lazy is not None:
            packed = self._probe(images) if self.random else packed
            self.packs_input = False
            late = self._probe(images)
            self.packs_input = isinstance(packed, torch.Tensor) and not self._agree(packed, late)
            packed = packed if self.packs_input else late
        if outputs.is_logits(packed) and len(packed) in (2, 4) and not self.random:
            self._check_rows(images, packed)
        if shape is None and outputs.is_logits(packed):
            shape = packed.shape
        self.classes, self.pixels = (shape[1], tuple(shape[2:])) if shape else (0, ())
        self.probabilities = isinstance(packed, torch.Tensor) and _are_probabilities(packed)

    def __call__(self, x: torch.Tensor, context: NoiseContext) -> torch.Tensor:
        """The logits that the model returns for the packed batch that ``context`` makes of images ``x``."""
        context.packed, context.plain = context.packed or self.packs_input, self.plain
        if self.packs_input and self.noisy:
            x = x.repeat(context.draws, *[1] * (x.dim() - 1))
        return run(self.model, x, context, self.dtype, self.compute, self.layout, self.logits)

    def _first_probe(self, images):
        """`_probe`, which finds out on the way which layers are plain, and whether the model draws random numbers. Raises ValueError where
        it returns sigmoids."""
        with RandomOpDetector() as detector, outputs.SigmoidDetector() as sigmoids:
            packed = self._probe(images)
            while isinstance(packed, RowsError) and packed.rows == 1:  # of a table of positions, say
                self.plain |= {packed.stream}
                packed = self._probe(images)
        sigmoids.check(packed)
        self.random = detector.any
        return packed

    @torch.no_grad()
    def _probe(self, images):
        """The logits of ``images`` in 2 draws, or the exception that the model raises."""
        try:
            with seeded(0, images.device) if self.random else contextlib.nullcontext():
                context = NoiseContext(torch.zeros((), dtype=torch.int64, device=images.device), len(images), 2)
                result = self(images, context)
                self.called, self.divided = [layer.stream for layer in context.calls], context.divided
                return result
        except Exception as error:
            return error.with_traceback(None)

    def _check_rows(self, images, both):
        """Finds out whether the logits of the first of ``images``, which are among ``both``, are others beside another image, or alone.

        Raises ValueError where its noise changes: some layer gets several rows for each image, and those of one image are not adjacent.
        """
        other = self._probe(torch.cat([images[:1], 3 * images[1:]]))  # brighter, so that the largest value of the batch changes, too
        if outputs.is_logits(other) and other.shape == both.shape:
            self.mixes = not unmoved(both[::2], other[::2], lambda: self._probe(images)[::2])
        alone = self._probe(images[:1])
        if outputs.is_logits(alone) and alone.shape == both[::2].shape:
            self.mixes |= not self._agree(both[::2], alone)
        if self.mixes and self.divided:
            name = min(self.divided)
            raise ValueError(
                f"the noisy layer {name!r} gets several rows for each image, and those of one image are not adjacent: its noise would "
                f"depend on the other images in the batch; convert(exclude={name!r}) leaves this layer without noise"
            )

    def _agree(self, packed, lazy):
        """Whether packing at the first noise gives the same rows. A model that treats packed rows as images gives another order."""
        if not isinstance(lazy, torch.Tensor) or lazy.shape != packed.shape:
            return False
        return agree(packed, lazy, self.compute)

    def _dry_run(self, x, packed):
        """Shape of the result on the meta device for 3 images in 2 draws, or None if that fails.

        It fails where a skip connection bypasses the first noise: its 3 rows meet 6. It fails as well where the forward needs data. Both
        models are packed at the input, which is right for every model.
        """
        images, draws = 3, 2
        shape = (images * (draws if packed and self.noisy else 1), *x.shape[1:])
        try:
            model, x = meta_copy(self.model).float(), torch.empty(shape, dtype=torch.float32, device="meta")
            seed = torch.zeros((), dtype=torch.int64, device="cpu")
            scale = self.compute.itemsize / torch.float32.itemsize / (images * draws)
            options = dict(packed=packed, plain=self.plain)
            with torch.no_grad(), NoiseContext(seed, images, draws, **options), PeakBytes() as memory:
                out = outputs.take(model(x), self.logits)
            self.row_bytes = memory.peak * scale
            try:
                with torch.enable_grad(), NoiseContext(seed, images, draws, **options), SavedBytes(model) as saved:
                    model(x.requires_grad_())
                self.saved_bytes = saved.total * scale
            except Exception:  # a model without a gradient
                self.saved_bytes = None
            return tuple(out.shape) if outputs.is_logits(out) and out.shape[0] == (images * draws if self.noisy else images) else None
        except Exception:
            return None


def agree(logits: torch.Tensor, others: torch.Tensor, compute: torch.dtype) -> bool:
    """Whether two logits [N, K, ...] of the same rows are the same up to rounding: another size of batch is summed in another order."""
    difference, size = distance(*contending(logits, others))
    return bool(difference <= min(torch.finfo(compute).eps ** 0.5, 1 / 32) * size)


def unmoved(logits: torch.Tensor, others: torch.Tensor, again: Callable[[], torch.Tensor]) -> bool:
    """Whether logits of an image are the same ``others`` beside another image, in a batch of the same size.

    A kernel does the same sums for a row whatever the values in other rows are. So the logits are the same bit for bit, in any dtype and
    behind any number of layers. Some kernels of GPUs add in no fixed order. Then a difference like that of two equal passes (``again``)
    is allowed.
    """
    difference, _ = distance(logits.double(), others.double())
    return bool(difference == 0) or bool(difference <= CHANCE * distance(logits.double(), again().double())[0])


def _wants_contiguous(error) -> bool:
    """Whether a forward failed as x.view(N, -1) does for a channels-last map."""
    return isinstance(error, RuntimeError) and "view size is not compatible" in str(error)


def _are_probabilities(rows) -> bool:
    """Whether rows [N, K] are the results of a softmax: none below 0, and sums of 1."""
    if rows.dim() != 2 or rows.shape[1] < 2 or not rows.is_floating_point():
        return False
    error = max(torch.finfo(rows.dtype).eps, torch.finfo(torch.float32).eps) * rows.shape[1]
    return bool((rows >= 0).all() and ((rows.double().sum(1) - 1).abs() <= error).all())


def probe_images(x: torch.Tensor, count: int) -> torch.Tensor:
    """So many images like those of ``x``, of uniform noise, always the same."""
    return torch.rand((count, *x.shape[1:]), generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").to(x.device)


def run(
    model: nn.Module, x: torch.Tensor, context: NoiseContext, dtype: torch.dtype, compute: torch.dtype, layout=torch.channels_last,
    logits: outputs.Choice = None,
) -> torch.Tensor:  # fmt: skip
    """Logits of ``model``, whose parameters are in ``dtype``, computed in ``compute`` on x (packed, or to be packed by the first noise)."""
    # Never the caller's tensor: a forward that works in place would change it, and see its own work at the next chunk of draws.
    # A transform of torch.func may see fewer dimensions than there are, and then knows no layout of four.
    laid = layout if x.dim() == 4 and not autograd.is_transformed() else torch.preserve_format
    x = x.to(dtype, copy=True, memory_format=laid)
    # Autocast also where the model is in low precision: its forward may make a float32 tensor on the way, as x.float() does. Without its
    # cache, which inside an autocast of the caller's would free, at the end of that, weights that a CUDA graph reads.
    low = compute != torch.float32
    with context, torch.autocast(x.device.type, compute if low else None, enabled=low, cache_enabled=False):
        return outputs.take(model(x), logits)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device):
    """torch's generators of the CPU and of ``device`` begin at ``seed``, and are what they were afterwards; others are not touched.

    Other threads share these: to be used where there is a need alone.
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


def mismatch(runner: Runner, unfused: nn.Module, x: torch.Tensor, gradients: bool) -> str | None:
    """None if the fused model of ``runner``, in its dtype, computes what ``unfused``, in float32, computes; or what is wrong with it.

    Both run 2 images of noise like ``x`` in 2 draws with the same seed. The limit is the unfused model's own error in ``dtype``, or in
    bfloat16 for float32: what everybody accepts who runs it so. gradients: the same for the gradient of the images, which a forward
    may define otherwise than its values do (`torch.autograd.Function`, `torch.no_grad`), and a graph of the values does not know.
    """
    dtype = runner.dtype
    narrow = dtype if dtype.itemsize < 4 else torch.bfloat16

    def results(model, compute, layout):
        values = probe_images(x, 4).requires_grad_(gradients)
        context = NoiseContext(torch.zeros((), dtype=torch.int64, device=x.device), 2, 2, packed=True, plain=runner.plain)
        # A layer that draws numbers of its own shall draw the same.
        with torch.set_grad_enabled(gradients), seeded(0, x.device) if runner.random else contextlib.nullcontext():
            logits = run(model, values, context, compute, compute, layout, runner.logits)
            if not gradients:
                return (logits,)
            weights = torch.linspace(1, 2, logits.numel(), dtype=torch.float32, device=x.device).view(
                logits.shape
            )  # that no symmetry takes away
            return logits.detach(), torch.autograd.grad((logits.float() * weights).sum(), values, materialize_grads=True)[0]

    layout = torch.channels_last
    try:
        try:
            expected = results(unfused, torch.float32, layout)
        except RuntimeError as error:
            if not _wants_contiguous(error):
                raise
            layout = torch.contiguous_format  # which bfloat16 is much slower in where it is emulated
            expected = results(unfused.to(memory_format=layout), torch.float32, layout)
        own = results(unfused.to(narrow), narrow, layout)
        found = results(runner.model, dtype, runner.layout)
    except Exception as error:
        return f"a probe batch to check the fused model with failed ({type(error).__name__}: {error})"
    for what, wanted, low, got in zip(("results", "gradients"), expected, own, found, strict=False):
        if not isinstance(got, torch.Tensor) or got.shape != wanted.shape:
            return "fused, it gives results of another shape"
        pair = contending if what == "results" else lambda *both: both
        (error, size), (low, _) = distance(*pair(wanted, got)), distance(*pair(wanted, low))
        limit = low * (1 if dtype == torch.float32 else CHANCE) + torch.finfo(torch.float32).eps * size
        if not (error <= limit or not bool(torch.isfinite(low))):
            error, low = error / size, low / size
            return f"fused, it gives other {what} (relative error {error:.2g}, the unfused model's own in {narrow} is {low:.2g})"
    return None


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device's hardware computes in it, else float32."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device's hardware computes in bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_bf16_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False
