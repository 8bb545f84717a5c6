"""What the tests of data sets share: images of random pixels, folders and CIFAR-10 files of them, and an object that shows whether it was
unpickled."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from rse_fast import data

Image = pytest.importorskip("PIL.Image")


def random_pixels(height: int = 9, width: int = 7, channels: int = 3) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.randint(0, 256, shape, dtype=np.uint8)


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


def cifar_batches(count: int = 20) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images uint8 [N, 3, 32, 32] and labels of six batches: all classes in each."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {name: (np.random.randint(0, 256, (count, 3, 32, 32), dtype=np.uint8), np.arange(count) % 10) for name in names}


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as in the published files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes


def write_cifar(folder: Path, batches: dict, kind: str) -> None:
    for name, (images, labels) in batches.items():
        if kind == "binary":
            records = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
            continue
        content = {b"batch_label": name.encode(), b"labels": labels.tolist(), b"data": images.reshape(len(images), -1)}
        with open(folder / name, "wb") as file:
            if kind == "python 2":
                Python2Pickler(file, protocol=2).dump(content)
            else:
                pickle.dump({key.decode(): value for key, value in content.items()}, file, protocol=int(kind))
