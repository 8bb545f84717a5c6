"""Batches as float images on a device: in order, or shuffled and augmented as a pure function of (seed, epoch, step).

Nothing here holds the state of a generator. An epoch can be entered at any step, and each of several ranks computes its own rows of the
one global batch, so an interrupted run continues exactly and the number of processes does not change what is trained on.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rse_fast.data.parts import Part

_ORDER, _AUGMENTATION, _MIRRORING = 0, 1, 5  # 2 to 4 are rse_fast.train's


def batches(part: Part, batch_size: int, *, rank: int = 0, ranks: int = 1, device="cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (images float32 [B, C, H, W] in [0, 1], labels int64 [B]) in order: of every ``ranks``-th image, beginning with ``rank``."""
    _check_batch_size(batch_size)
    rows = [chosen for chosen in torch.arange(rank, len(part), ranks).split(batch_size) if len(chosen)]
    return ((_scaled(_moved(images, device)), _moved(part.labels[chosen], device)) for chosen, images in _with_images(part, rows))


def shuffled(
    part: Part, batch_size: int, *, seed: int, epoch: int, start: int = 0, rank: int = 0, ranks: int = 1, pad=0, flip=False, device="cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the batches of an epoch from the ``start``-th on: (images float32 [B / ranks, C, H, W] in [0, 1], labels int64 [B / ranks]).

    Order and crops depend on (seed, epoch, number of the batch) alone; rank r of ``ranks`` gets the r-th share of each batch. A last batch
    that is not full is left out, so ``batch_size`` (at most the length of the part, divisible by ``ranks``) holds for all.
    pad: see `augment`. flip: half of the images, chosen by the seed, are mirrored in even epochs and the others in odd ones, so that any
    two epochs in a row show both ways (Jordan, "94% on CIFAR-10 in 3.29 Seconds", 2024, section 3.6).
    """
    _check_batch_size(batch_size)
    if batch_size > len(part):
        raise ValueError(f"batch_size: expected at most the {len(part)} images there are, got {batch_size}")
    if batch_size % ranks:
        raise ValueError(f"batch_size: expected a multiple of the {ranks} processes, got {batch_size}")
    order = torch.randperm(len(part), generator=_generator(seed, _ORDER, epoch))
    share = batch_size // ranks
    rows = [order[i * batch_size + rank * share :][:share] for i in range(start, len(part) // batch_size)]
    mirrored = None
    if flip:
        mirrored = (torch.rand(len(part), generator=_generator(seed, _MIRRORING)) < 0.5) ^ bool(epoch % 2)
    return _shuffled(part, rows, seed, epoch, start, rank * share, batch_size, pad, mirrored, device)


def _shuffled(part, rows, seed, epoch, start, first, batch_size, pad, mirrored, device):
    for i, (chosen, images) in enumerate(_with_images(part, rows), start):
        generator = _generator(seed, _AUGMENTATION, epoch, i)
        mirrors = None if mirrored is None else mirrored[chosen]
        images = augment(_moved(images, device), generator, pad=pad, mirrored=mirrors, first=first, total=batch_size)
        yield _scaled(images), _moved(part.labels[chosen], device)


def augment(
    images: Tensor, generator: torch.Generator, *, pad: int, mirrored: Tensor | None = None, first: int = 0, total: int | None = None
) -> Tensor:
    """Random crop after zero padding, one draw per image, and a horizontal flip of some, as tensor operations on the images' device.

    images: [B, C, H, W], any dtype: rows ``first ..`` of a batch of ``total`` (default: all of it), whose crops the generator gives.
    generator: a CPU generator, so that every device sees the same crops. mirrored: bool [B], the images that are flipped; None for none.
    Returns the same shape and dtype.
    """
    count, _, height, width = images.shape
    total = count if total is None else total
    if pad:
        offsets = torch.randint(2 * pad + 1, (2, total), generator=generator)[:, first : first + count]
        offsets = _moved(offsets, images.device)
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2 * pad + 1, 2 * pad + 1, H, W], a view
        images = windows[torch.arange(count, device=images.device), :, offsets[0], offsets[1]]
    if mirrored is not None:
        images = torch.where(_moved(mirrored, images.device)[:, None, None, None], images.flip(-1), images)
    return images


def derived_seed(seed: int, *path: int) -> int:
    """A seed in [0, 2^63) for one purpose of a run: streams of different paths are independent (numpy's SeedSequence)."""
    return int(np.random.SeedSequence((seed, *path)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _generator(*path: int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(*path))


def _with_images(part, rows):
    return zip(rows, part.fetch(rows), strict=True)


def _moved(tensor: Tensor, device) -> Tensor:
    """On the device; a GPU is not waited for, which from ordinary memory it would be."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _scaled(images: Tensor) -> Tensor:
    return images.float().div_(255)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size!r}")
