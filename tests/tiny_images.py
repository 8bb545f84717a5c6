"""What the tests of data sets share: images of random pixels, folders of them, and an object that shows whether it was unpickled."""

import os
from pathlib import Path

import numpy as np
import pytest

from rse_fast import data

Image = pytest.importorskip("PIL.Image")

rng = np.random.default_rng()


def random_pixels(height: int = 9, width: int = 7, channels: int = 3) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def make_folder(root: Path, per_class: int = 10, classes: tuple[str, ...] = ("cat", "dog"), suffix: str = ".png") -> dict[str, np.ndarray]:
    """Images of random pixels at root/CLASS/NN.suffix; returns them by relative name."""
    made = {f"{name}/{i:02}{suffix}": random_pixels() for name in classes for i in range(per_class)}
    for name, pixels in made.items():
        save(root / name, pixels)
    return made


def rows_of(part: data.Part) -> set[bytes]:
    return {image.numpy().tobytes() for image in part.images}


class Unpickled:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def cached_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.npy"))
