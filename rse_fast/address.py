"""Which noise: the value that every layer of the package hands on unchanged, from the public functions to the kernels."""

from typing import NamedTuple

import torch


class NoiseAddress(NamedTuple):
    """Addresses the noise of one packed batch: row ``d * images + i`` is draw ``draw_offset + d`` of image ``image_offset + i``.

    The fields stand in the order in which the ops take them, so a call may write ``*at``.

    Attributes:
        seed: int64 tensor of one value.
        stream: which layer, in [0, 2^32).
        images: images of the batch.
        draws: draws of each image.
        image_offset: index of the first image, in [0, 2^32).
        draw_offset: index of the first draw, in [0, 2^32).
        sample_ids: None, or int64 [images, 2], contiguous: each image's own (image index, first draw) in place of the two offsets.
    """

    seed: torch.Tensor
    stream: int
    images: int
    draws: int = 1
    image_offset: int = 0
    draw_offset: int = 0
    sample_ids: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of the noisy batch."""
        return self.images * self.draws
