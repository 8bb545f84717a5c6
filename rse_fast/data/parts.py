"""What a data set is: parts of uint8 images with labels, and how a set without a validation part is split."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Images and their labels, in memory.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(f"images: expected uint8 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels: expected int64 [{len(self.images)}], got {self.labels.dtype} {list(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def fetch(self, selections: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yields the images uint8 [B, C, H, W] of each selection of rows (int64 [B])."""
        return (self.images[rows] for rows in selections)


@dataclass(frozen=True)
class Splits:
    """A data set: disjoint parts, class names, and the augmentation that keeps its labels true.

    A part is a `Part`, or whatever else has ``labels``, ``shape``, a length and ``fetch``.

    Attributes:
        name: what reports call it.
        classes: name of each class, in the order of the labels.
        train: part to train on.
        val: part by which the best epoch is chosen.
        test: part for the figures in the end.
        pad: pixels of zero padding on each side before a random crop.
        flip: whether images are mirrored at random.
    """

    name: str
    classes: tuple[str, ...]
    train: Part
    val: Part
    test: Part
    pad: int
    flip: bool


def split(
    keys: Sequence[str], labels: np.ndarray, val_fraction: float, test_fraction: float | None, path: str | os.PathLike[str]
) -> list[np.ndarray]:
    """Row numbers of train, val and test: within each class by a hash of the key, so no random generator and no order of listing enters.

    path: of the images, for the error where a class has too few.
    """
    parts: list[list[int]] = [[], [], []]
    for label in np.unique(labels):
        rows = sorted(np.flatnonzero(labels == label).tolist(), key=lambda i: hashlib.sha256(keys[i].encode()).digest())
        val = max(1, round(val_fraction * len(rows)))
        test = 0 if test_fraction is None else max(1, round(test_fraction * len(rows)))
        if val + test >= len(rows):
            raise ValueError(
                f"path: a class has only {len(rows)} images in {os.fspath(path)!r}, {val} of them for validation, {test} for testing"
            )
        for part, chosen in zip(parts, (rows[val + test :], rows[:val], rows[val : val + test]), strict=True):
            part.extend(chosen)
    return [np.array(sorted(part), dtype=np.int64) for part in parts]
