"""One forward pass of an ensemble: where the noise of every layer that is called gets its address from."""

import sys
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed, nn

from rse_fast import autograd
from rse_fast.address import NoiseAddress
from rse_fast.layout import packed_like

LARGE = 2**20  # bytes from which on the C library may take fresh memory from the operating system
_LEAST, _MOST = -(2**63), 2**63 - 1  # of a seed
active = threading.local()  # its `context` is the one under way: two threads may run one model with different seeds


def room(x: torch.Tensor, rows: int, pool: bool = False) -> torch.Tensor | None:
    """`NoiseContext.room` of the context under way, or None."""
    context = getattr(active, "context", None)
    return None if context is None or torch.is_grad_enabled() or not autograd.is_direct(x) else context.room(x, rows, pool)


@dataclass
class NoiseContext:
    """Fixes the noise of every layer called within ``with context:`` on this thread.

    A batch of ``images`` rows leaves the first noisy layer as ``draws * images`` rows (lazy packing). A layer's stream is its index in the
    model, plus the number of its earlier calls within the context in the high half of the word: one context is one forward pass.
    Activation checkpointing goes around a context: one inside would run again in backward, where no context is left, and is refused.

    Attributes:
        seed: int64 tensor of one value.
        images: rows of the batch before packing.
        draws: draws of each image, >= 1.
        image_offset: index of the first image, in [0, 2^32).
        draw_offset: index of the first draw, in [0, 2^32).
        backend: of the noise, as in `rse_fast.functional.add_noise`.
        sample_ids: None, or int64 [images, 2]: each image's own (image index, first draw), in place of the two offsets.
        noiseless_stream: the stream of a layer whose first call adds no noise, because the caller has added it already.
        packed: whether the batch comes with all its rows. A layer may then get several rows an image (windows, heads, patches), those of an
            image beside each other: each has noise of its own, keyed by its place within its image.
        plain: streams of layers that add no noise, because they get one row for all images.
        calls: how often each layer was called.
        undefined: bool tensors, of the images or of all rows: which had NaN where they became bytes, in which NaN is lost.
        divided: names of the layers that got several rows an image.
    """

    seed: torch.Tensor
    images: int
    draws: int = 1
    image_offset: int = 0
    draw_offset: int = 0
    backend: str = "auto"
    sample_ids: torch.Tensor | None = None
    noiseless_stream: int | None = None
    packed: bool = False
    plain: frozenset[int] = frozenset()
    calls: dict[nn.Module, int] = field(default_factory=dict, repr=False)
    undefined: list[Tensor] = field(default_factory=list, repr=False)
    divided: set[str] = field(default_factory=set, repr=False)
    _memory: Tensor | None = field(default=None, repr=False)  # of `room`

    def __post_init__(self) -> None:
        seed, ids = self.seed, self.sample_ids
        if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed must be an int64 tensor of one value, got {seed!r}")
        if ids is not None:
            if ids.dtype != torch.int64 or tuple(ids.shape) != (self.images, 2):
                raise ValueError(f"sample_ids must be int64 [{self.images}, 2], got {ids.dtype} of shape {tuple(ids.shape)}")
            self.sample_ids = ids.contiguous()
        self.packed |= self.draws == 1

    def __enter__(self) -> "NoiseContext":
        self._outer = getattr(active, "context", None)
        active.context = self
        self._frame = None if torch.compiler.is_compiling() or not torch.is_grad_enabled() else id(sys._getframe(1))
        return self

    def __exit__(self, *error: object) -> None:
        active.context = self._outer

    def room(self, x: torch.Tensor, rows: int, pool: bool = False) -> torch.Tensor | None:
        """Memory for ``rows`` noisy rows like those of ``x``, or of its 2x2 max-pool, until the next call.

        None where fresh memory is as good.

        Large fresh memory on a CPU is new to the operating system at each call: its pages must be mapped, and no cache holds them.
        """
        values = rows * x.numel() // max(x.shape[0], 1)
        if not x.is_cpu or values * x.element_size() < LARGE:
            return None
        if self._memory is None or self._memory.dtype != x.dtype or self._memory.numel() < values:
            self._memory = torch.empty(values, dtype=x.dtype, device=x.device)
        return packed_like(x, rows, pool, memory=self._memory)

    def noise(self, layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, NoiseAddress, str]:
        """What `NoiseLayer.noise` returns for a call of ``layer``, which is one, on ``x`` within this context."""
        rows, whole = x.shape[0], self.images * self.draws
        one_each = rows == self.images or rows == whole
        if not one_each and layer.stream not in self.plain and (not self.packed or not whole or rows % whole):
            name = layer.layer_name or type(layer).__name__
            raise RowsError(
                f"the noisy layer {name!r} got {rows} rows where {self.images} images in {self.draws} draws are under way: a noisy layer "
                f"must have one row an image, or as many for each; convert(exclude={name!r}) leaves this one without noise",
                layer.stream, rows,
            )  # fmt: skip
        if self._frame is not None and (x.requires_grad or any(p.requires_grad for p in layer.parameters(recurse=False))):
            if is_checkpointed(self._frame):
                raise ValueError(
                    "the model must not checkpoint activations inside an ensemble, whose noise backward could not repeat; switch it off in "
                    "the model (an Ensemble bounds the memory of its gradient by itself, see max_rows)"
                )
        call = self.calls.get(layer, 0)
        self.calls[layer] = call + 1
        sigma = layer.current_sigma(x.dtype)
        if call == 0 and layer.stream == self.noiseless_stream:
            sigma = torch.zeros_like(sigma)
        seed, sample_ids = self.seed, self.sample_ids
        if seed.device != x.device:  # a model that is spread over devices
            seed, sample_ids = seed.to(x.device), None if sample_ids is None else sample_ids.to(x.device)
        stream = layer.stream + (call << 16)
        if layer.stream in self.plain:
            return torch.zeros_like(sigma), NoiseAddress(seed, stream, rows), self.backend
        if not one_each:
            self.divided.add(layer.layer_name or type(layer).__name__)
            return sigma, NoiseAddress(seed, stream, rows, sample_ids=self._divided(rows // whole, x.device)), self.backend
        return sigma, NoiseAddress(seed, stream, self.images, self.draws, self.image_offset, self.draw_offset, sample_ids), self.backend

    def _divided(self, parts: int, device: torch.device) -> torch.Tensor:
        """The sample ids of a packed batch in which every image has ``parts`` rows: part j of image i is number i * parts + j."""
        if self.sample_ids is None:
            image = torch.arange(self.image_offset, self.image_offset + self.images, device=device)
            first = torch.full_like(image, self.draw_offset)
        else:
            image, first = self.sample_ids.to(device).unbind(1)
        numbers = image[:, None] * parts + torch.arange(parts, device=device)
        draws = first + torch.arange(self.draws, device=device)[:, None]
        shape = self.draws, self.images, parts
        return torch.stack([numbers.expand(shape), draws[..., None].expand(shape)], -1).view(-1, 2)


class RowsError(ValueError):
    """A noisy layer got rows that are not those of the images. stream: its own; rows: how many it got."""

    def __init__(self, message: str, stream: int, rows: int):
        super().__init__(message)
        self.stream, self.rows = stream, rows


def is_checkpointed(outermost: int | None = None) -> bool:
    """Whether the caller runs within `torch.utils.checkpoint`, looked for up to the frame of id ``outermost``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and id(frame) != outermost:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def note_undefined(x: torch.Tensor) -> None:
    """Notes in the active context which rows of x [rows, ...] hold NaN."""
    context = getattr(active, "context", None)
    if context is not None and x.numel():
        context.undefined.append(x.amax(tuple(range(1, x.dim()))).isnan())


def ambient(x: torch.Tensor) -> NoiseAddress:
    """The address of fresh noise for a batch ``x``: a seed from torch's generator of the device, and the distributed rank as the stream,
    since equal generator seeds on all ranks must not give equal noise."""
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    return NoiseAddress(torch.randint(_LEAST, _MOST, (), dtype=torch.int64, device=x.device), rank, x.shape[0])
