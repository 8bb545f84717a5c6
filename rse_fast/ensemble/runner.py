"""A model made ready to run packed batches: how its batch is packed, in which dtype it computes, and whether a fused copy still is it."""

import contextlib

import torch
from torch import nn

from rse_fast.convert import meta_copy
from rse_fast.ensemble.plan import PeakBytes
from rse_fast.nn import Scope

# A fused model in low precision may be so many times as far from float32 as the unfused one: both errors are sums of the same kind of
# roundings, whose sizes differ by chance. A wrong fusion is off by far more.
CHANCE = 4


class Runner:
    """Runs a model in eval mode and ``dtype`` on packed batches of images like ``x``, computing in ``compute``.

    noisy: whether any noise is switched on.

    classes: length of the logits, 0 if unknown. packs_input: whether the batch is packed at the input, since something bypasses the first
    noise. row_bytes: of all tensors that are alive at once, a row; None if unknown.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, compute: torch.dtype, noisy: bool, x: torch.Tensor):
        self.model, self.dtype, self.compute, self.noisy = model, dtype, compute, noisy
        self.row_bytes = None
        lazy = self._dry_run(x, packed=False)
        self.packs_input = lazy is None
        shape = lazy or self._dry_run(x, packed=True)
        self.classes = shape[1] if shape else self._count_classes(x)

    def __call__(self, x: torch.Tensor, scope: Scope) -> torch.Tensor:
        """Whatever the model returns for the packed batch that ``scope`` makes of images ``x``."""
        if self.packs_input and self.noisy:
            x = x.repeat(scope.draws, *[1] * (x.dim() - 1))
        return run(self.model, x, scope, self.dtype, self.compute)

    def _count_classes(self, x):
        """For a model that does not run without data: what one image gives, or 0 if there is none."""
        if not len(x):
            return 0
        with torch.no_grad():
            logits = self(x[:1], Scope(torch.zeros((), dtype=torch.int64, device=x.device), 1))
        return logits.shape[-1] if isinstance(logits, torch.Tensor) and logits.dim() else 0

    def _dry_run(self, x, packed):
        """Shape of the result on the meta device for 3 images in 2 draws, None if that fails: a skip connection that bypasses the
        first noise then meets 6 rows with its 3. It fails as well where the forward needs data; packing the input is right anyway."""
        images, draws = 3, 2
        shape = (images * (draws if packed and self.noisy else 1), *x.shape[1:])
        try:
            model, x = meta_copy(self.model).float(), torch.empty(shape, device="meta")
            with torch.no_grad(), Scope(torch.zeros((), dtype=torch.int64), images, draws), PeakBytes() as memory:
                out = model(x)
            self.row_bytes = memory.peak / (images * draws) * self.compute.itemsize / torch.float32.itemsize
            return tuple(out.shape) if out.dim() == 2 and out.shape[0] == (images * draws if self.noisy else images) else None
        except Exception:
            return None


def run(model: nn.Module, x: torch.Tensor, scope: Scope, dtype: torch.dtype, compute: torch.dtype):
    """``model``, whose parameters are in ``dtype``, computing in ``compute`` on x (packed, or to be packed by the first noise)."""
    # Never the caller's tensor: a forward that works in place would change it, and see its own work at the next chunk of draws.
    x = x.to(dtype, copy=True, memory_format=torch.channels_last if x.dim() == 4 else torch.preserve_format)
    # Autocast also where the model is in low precision: its forward may make a float32 tensor on the way, as x.float() does. Without its
    # cache, which inside an autocast of the caller's would free, at the end of that, weights that a CUDA graph reads.
    low = compute != torch.float32
    with scope, torch.autocast(x.device.type, compute if low else None, enabled=low, cache_enabled=False):
        return model(x)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device):
    """torch's generators of the CPU and of ``device`` begin at ``seed``, and are what they were afterwards; others are not touched."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


@torch.no_grad()
def mismatch(fused: nn.Module, unfused: nn.Module, dtype: torch.dtype, x: torch.Tensor) -> str | None:
    """None if ``fused``, in ``dtype``, computes what ``unfused``, in float32, computes; or what is wrong with it.

    Both run 2 images of noise like ``x`` in 2 draws with the same seed. The limit is the unfused model's own error in ``dtype``, or in
    bfloat16 for float32: what everybody accepts who runs it so.
    """
    narrow = dtype if dtype.itemsize < 4 else torch.bfloat16
    values = torch.rand((4, *x.shape[1:]), generator=torch.Generator().manual_seed(0)).to(x.device)

    def logits(model, compute):
        scope = Scope(torch.zeros((), dtype=torch.int64, device=x.device), 2, 2)
        with seeded(0, x.device):  # a layer that draws numbers of its own shall draw the same
            return run(model, values, scope, compute, compute)

    try:
        expected = logits(unfused, torch.float32)
        own = logits(unfused.to(narrow), narrow)
    except Exception as error:
        return f"a probe batch to check the fused model with failed ({type(error).__name__}: {error})"
    if not isinstance(expected, torch.Tensor):
        return None  # no logits: the ensemble says so
    found = logits(fused, dtype)
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return "fused, it gives results of another shape"
    error, own = (found.float() - expected).norm(), (own.float() - expected).norm()
    limit = own * (1 if dtype == torch.float32 else CHANCE) + torch.finfo(torch.float32).eps * expected.norm()
    if error <= limit or not bool(torch.isfinite(expected).all() & torch.isfinite(own)):
        return None
    error, own = error / expected.norm(), own / expected.norm()
    return f"fused, it gives other results (relative error {error:.2g}, the unfused model's own in {narrow} is {own:.2g})"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device's hardware computes in bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_bf16_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False
