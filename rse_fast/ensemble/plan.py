"""How an ensemble's images x draws are cut into packed batches, and how many rows these get.

A packed batch is as large as throughput wants, as memory allows, and no larger than what ran out of memory before. None of this changes
a result by more than rounding: every row's noise is a function of its image and draw alone.
"""

import math
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rse_fast import arguments
from rse_fast.ensemble import memory

# Rows of a packed batch where throughput peaks in general: on a CPU the activations of more rows leave the cache, on a GPU fewer leave it
# idle. Twice as many where activations are bytes, half of bfloat16's size. And the numbers of rows worth measuring.
SWEET_SPOT = {"cpu": 80, "cuda": 1024}
LADDER = {"cpu": (20, 40, 80, 160, 320), "cuda": (256, 1024, 4096)}
OTHER_DEVICES = 256

CLEARLY = 0.97  # a number of rows replaces the general one if it takes less than this share of the time
MEMORY_SHARE = 0.5  # of the free memory that one packed batch may take; the rest is for what cannot be foreseen, such as workspaces
_ALWAYS_THERE = 2**24  # bytes for which the operating system is not asked whether they are free, which takes longer than small calls
_LEAST_WORK = 4  # a call is measured if it has this many times the rows of all trials, or more

Piece = tuple[slice, slice]  # of images, of draws


class Planner:
    """Rows of a packed batch for one (model, image shape, dtype, device); shared by every call, from any thread.

    device: where the model runs. row_bytes: memory one row needs while it passes through the model, None if unknown; gradient_bytes: where
    the gradient of the images is wanted, of all packed batches that keep something for it. in_bytes: activations are of 8 bits.
    """

    def __init__(self, device: torch.device, row_bytes: float | None = None, gradient_bytes: float | None = None, in_bytes: bool = False):
        self.device, self.row_bytes, self.gradient_bytes = device, row_bytes, gradient_bytes
        self.general = self.sweet_spot = SWEET_SPOT.get(device.type, OTHER_DEVICES) * (2 if in_bytes else 1)
        self.measured = False
        self.limit = math.inf  # fewer rows than ran out of memory

    def rows(self, fixed: int | None = None, gradient: bool = False, work: float = math.inf) -> int:
        """Rows of a full packed batch now, for a call of ``work`` rows.

        fixed: what the user wants instead; memory that ran out still counts.
        """
        if fixed is not None:
            return min(fixed, self.limit)
        most, row_bytes = min(self.sweet_spot, self.limit), self.gradient_bytes if gradient else self.row_bytes
        if row_bytes and min(most, work) * row_bytes > _ALWAYS_THERE:
            most = min(most, self._fits(row_bytes))
        return int(max(1, most))

    def run(
        self, images: int, draws: int, step: Callable, fixed: int | None = None, gradient: bool = False
    ) -> Iterator[tuple[slice, slice, Any]]:
        """Yields (image slice, draw slice, ``step(image slice, draw slice)``) until each draw of each image was there once.

        Images outermost; draws of one image in order. The first call with much work finds the sweet spot, by running packed batches of
        several sizes, each of which counts. When memory runs out, the batch is tried again in halves and later batches are no larger.
        ``gradient``: that of the images will be wanted.
        """
        start = 0
        for rows in [] if fixed else self._trials(images * draws):
            stop = min(images, start + max(1, rows // draws))
            seconds = 0.0
            for image, draw in chunks(stop - start, draws, rows):
                image = slice(start + image.start, start + image.stop)
                begin = self._clock()
                results = list(self.attempt(image, draw, step))
                seconds += self._clock() - begin
                yield from results
            self._note(rows, seconds / ((stop - start) * draws))
            start = stop
        for image, draw in chunks(images - start, draws, self.rows(fixed, gradient, images * draws)):
            yield from self.attempt(slice(start + image.start, start + image.stop), draw, step)

    def attempt(self, image: slice, draw: slice, step: Callable) -> Iterator[tuple[slice, slice, Any]]:
        """One piece of `run`: as a whole, or in halves where memory does not suffice. Raises what ``step`` raises for a single row."""
        rows = _length(image) * _length(draw)
        if rows <= self.limit:
            try:
                result = step(image, draw)
            except Exception as error:
                if rows == 1 or not memory.out_of_memory(error):
                    raise
            else:
                yield image, draw, result
                return
            # Not in the handler: its traceback holds what the failed pass had allocated.
            self.limit = max(1, rows // 2)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        for half in _halves(image, draw):
            yield from self.attempt(*half, step)

    def _fits(self, row_bytes: float | None) -> float:
        return math.inf if not row_bytes else memory.free_memory(self.device) * MEMORY_SHARE // row_bytes

    def _trials(self, work: int) -> list[int]:
        """Sizes to try, twice each: the first run of a size also pays for what a library prepares for it. On a GPU three times: the second
        captures a CUDA graph."""
        times = 3 if self.device.type == "cuda" else 2
        ladder = LADDER.get(self.device.type, ())
        if self.measured or torch.is_grad_enabled() or work < times * sum(ladder[:2]) * _LEAST_WORK:
            return []
        most = min(self.limit, self._fits(self.row_bytes))
        sizes = [rows for rows in ladder if rows <= most]
        if len(sizes) < 2 or times * sum(sizes) * _LEAST_WORK > work:
            return []
        self.measured, self._times = True, {}
        return sizes * times

    def _note(self, rows: int, seconds: float) -> None:
        self._times[rows] = min(seconds, self._times.get(rows, math.inf))
        best = min(self._times, key=self._times.get)
        clearly = self._times[best] < CLEARLY * self._times.get(self.general, math.inf)
        self.sweet_spot = best if clearly else self.general

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # of the device would spoil a capture in another thread
        return time.perf_counter()


_planners: "weakref.WeakKeyDictionary[torch.nn.Module, dict]" = weakref.WeakKeyDictionary()


def planner(
    model: torch.nn.Module, key: tuple, device: torch.device, row_bytes: float | None, gradient_bytes: float | None = None,
    in_bytes: bool = False,
) -> Planner:  # fmt: skip
    """The planner of ``model`` for ``key`` (image shape, dtype, ...): what it learns outlives every snapshot of the model."""
    known = _planners.setdefault(model, {})
    if (key, device) not in known:
        known[key, device] = Planner(device, row_bytes, gradient_bytes, in_bytes)
    return known[key, device]


# --------------------------------------------------------------------------------------------------------------------- cutting
def chunks(images: int, draws: int, rows: int) -> Iterator[Piece]:
    """Cuts ``images x draws`` into (image slice, draw slice) pairs of at most ``rows`` packed rows each, images outermost.

    All draws of an image stay together where they fit, so that what precedes the first noise runs once an image; pieces differ by at
    most one image or draw, so no last piece is left tiny. A piece with some of the draws has one image.
    """
    for image in _pieces(images, max(1, rows // draws)):
        for draw in _pieces(draws, rows):
            yield image, draw


def _pieces(total, most):
    count = -(-total // most)
    for i in range(count):
        yield slice(total * i // count, total * (i + 1) // count)


def _halves(image, draw) -> list[Piece]:
    """By images as long as there are several, so that the draws of an image stay in order."""
    if _length(image) > 1:
        middle = (image.start + image.stop) // 2
        return [(slice(image.start, middle), draw), (slice(middle, image.stop), draw)]
    middle = (draw.start + draw.stop) // 2
    return [(image, slice(draw.start, middle)), (image, slice(middle, draw.stop))]


def _length(s):
    return s.stop - s.start


def shard(images: int, rank: int, world_size: int) -> slice:
    """Which images are one process's: a contiguous part, in order of rank, of a size that differs by at most one.

    Args:
        images: how many there are, >= 0.
        rank: of the process, in [0, world_size).
        world_size: how many processes there are.

    Returns:
        A slice of the images' indices.

    Raises:
        TypeError: an argument is no integer.
        ValueError: an argument is out of range.

    Examples:
        >>> part = rse_fast.ensemble.shard(len(images), rank, world_size)
        >>> out = ensemble.predict(images[part], seed, image_offset=part.start)
    """
    images, rank, world_size = (
        arguments.integer(name, value) for name, value in (("images", images), ("rank", rank), ("world_size", world_size))
    )
    if images < 0:
        raise ValueError(f"images must not be negative, got {images}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got {rank} with world_size {world_size}")
    return slice(images * rank // world_size, images * (rank + 1) // world_size)
