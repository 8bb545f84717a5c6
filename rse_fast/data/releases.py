"""Data sets in the form in which they are published: digits, CIFAR-10 (binary and pickled), STL-10, and arrays of one's own."""

import os
import pickle
from pathlib import Path

import numpy as np
import torch

from rse_fast.data.folder import image_folder
from rse_fast.data.parts import Part, Splits, split

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def load(
    path: str | os.PathLike[str],
    *,
    resize: tuple[int, int] | int | None = None,
    val_fraction: float = 0.1,
    workers: int | None = None,
    lazy: bool = False,
    progress: bool = False,
) -> Splits:
    """The data set at ``path``, its kind told by the names of its files; "digits" is `digits`.

    A file is read by `arrays`; a folder by `cifar10` or `stl10` if it holds such a release, else by `image_folder`, which alone takes
    ``resize``, ``workers`` and ``lazy``. val_fraction: share of each class of the training images set aside as ``val``, in (0, 1); the
    digits have parts of their own. Raises ValueError for what cannot be read.
    """
    root = Path(path)
    reader = _reader(root) if str(path) != "digits" else None
    if reader is image_folder:
        return image_folder(root, resize=resize, val_fraction=val_fraction, workers=workers, lazy=lazy, progress=progress)
    if resize is not None or lazy:
        raise ValueError(f"{'lazy' if lazy else 'resize'}: only an image folder takes it, got {str(path)!r}")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction: expected a number in (0, 1), got {val_fraction!r}")
    return digits() if reader is None else reader(root, val_fraction=val_fraction)


def _reader(root):
    if root.is_file():
        return arrays
    if any((root / name).is_file() for name in ("data_batch_1.bin", "data_batch_1")):
        return cifar10
    return stl10 if (root / "train_X.bin").is_file() else image_folder


def digits() -> Splits:
    """scikit-learn's bundled handwritten digits: 1797 grey images of 8x8 pixels with 17 levels, 10 classes, scaled to 0..255.

    Source: test part of "Optical Recognition of Handwritten Digits", UCI (Alpaydin & Kaynak 1998). Split 60/10/30 within each class, the
    same on every machine; writers are not known, so one writer's digits may be in several parts. Augmentation: shifts by one pixel, no
    flip (a mirrored digit is another sign or none).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = bunch.target.astype(np.int64)
    rows = split([str(i) for i in range(len(labels))], labels, val_fraction=0.1, test_fraction=0.3)
    parts = [Part(images[r], torch.from_numpy(labels[r])) for r in rows]
    return Splits("handwritten digits (8x8)", tuple("0123456789"), *parts, pad=1, flip=False)


def cifar10(path: str | os.PathLike[str], *, val_fraction: float = 0.1) -> Splits:
    """CIFAR-10 (Krizhevsky 2009) as published: a folder with ``data_batch_1.bin`` .. ``_5.bin`` and ``test_batch.bin`` (the binary
    release), or the same names without ``.bin`` (the pickled release, of which nothing is run: see `_Unpickler`).

    Raises ValueError naming the file that is missing, of the wrong size, or not what it should be.
    """
    root = Path(path)
    binary = (root / "data_batch_1.bin").is_file()
    read = _read_binary if binary else _read_pickle
    files = [root / (name + ".bin" * binary) for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
    found = [read(file) for file in files]
    for file, (_, labels) in zip(files, found, strict=True):
        if len(labels) != max(len(others) for _, others in found):  # all are of one size: this one is cut
            raise ValueError(f"path: {str(file)!r} holds {len(labels)} images, fewer than the other files")
    train, test = (tuple(np.concatenate(arrays) for arrays in zip(*batches, strict=True)) for batches in (found[:5], found[5:]))
    return _with_val("CIFAR-10", _CIFAR10, train, test, val_fraction, flip=True)


def stl10(path: str | os.PathLike[str], *, val_fraction: float = 0.1) -> Splits:
    """The labelled part of STL-10 (Coates, Ng & Lee 2011) as published: ``train_X.bin``, ``train_y.bin``, ``test_X.bin``, ``test_y.bin``.

    96x96 RGB images, stored column by column; labels from 1. Raises ValueError naming the file that cannot be read.
    """
    root = Path(path)
    parts = []
    for name in ("train", "test"):
        labels = _bytes(root / f"{name}_y.bin", 1)[:, 0]
        images = _bytes(root / f"{name}_X.bin", 3 * 96 * 96)
        if len(images) != len(labels):
            raise ValueError(f"path: {len(images)} images but {len(labels)} labels in {name}_X.bin and {name}_y.bin of {str(root)!r}")
        if not ((labels >= 1) & (labels <= 10)).all():
            raise ValueError(f"path: expected labels 1 .. 10 in {str(root / f'{name}_y.bin')!r}, got {labels.min()} .. {labels.max()}")
        upright = np.ascontiguousarray(images.reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2))
        parts.append((upright, labels.astype(np.int64) - 1))
    return _with_val("STL-10", _STL10, *parts, val_fraction, flip=True)


def arrays(path: str | os.PathLike[str], *, val_fraction: float = 0.1) -> Splits:
    """A ``.npz`` or ``.safetensors`` file with train_images, test_images (uint8 [N, C, H, W]) and train_labels, test_labels (integers [N],
    from 0, each class with images to train on). The augmentation is that of photos, crop and flip. Raises ValueError for a file that cannot
    be read or holds something else."""
    file = Path(path)
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as stored:
                found = {name: stored[name] for name in _ARRAYS}
        elif file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "np") as stored:
                found = {name: stored.get_tensor(name) for name in _ARRAYS}
        else:
            raise ValueError("the name must end with .npz or .safetensors")
    except Exception as error:  # zipfile and safetensors have errors of their own for damaged files
        raise ValueError(f"path: cannot read {', '.join(_ARRAYS)} from {str(file)!r}: {error}") from error
    pairs = []
    for name in ("train", "test"):
        images, labels = found[f"{name}_images"], found[f"{name}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"path: expected {name}_images as uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not ((labels >= 0) & (labels < 2**31)).all():
            raise ValueError(f"path: expected {name}_labels as {len(images)} integers >= 0, got {labels.dtype} {list(labels.shape)}")
        if not len(images):
            raise ValueError(f"path: expected images in {name}_images, got none")
        pairs.append((images, labels.astype(np.int64)))
    (images, labels), (test_images, test_labels) = pairs
    if images.shape[1:] != test_images.shape[1:]:
        raise ValueError(f"path: expected test_images of the shape of train_images, {images.shape[1:]}, got {test_images.shape[1:]}")
    if images.shape[1] not in (1, 3, 4) and images.shape[3] in (1, 3, 4):
        raise ValueError(f"path: expected train_images as [N, C, H, W], got {list(images.shape)}, which looks like [N, H, W, C]")
    known = np.unique(labels)
    if len(known) < 2 or known[-1] != len(known) - 1:
        raise ValueError(f"path: expected train_labels of at least two classes 0, 1, ..., each there, got {known}")
    if test_labels.max() >= len(known):
        raise ValueError(f"path: expected test_labels below {len(known)}, the classes of train_labels, got {test_labels.max()}")
    classes = tuple(map(str, range(len(known))))
    return _with_val(file.stem, classes, *pairs, val_fraction, flip=True)


def _with_val(name, classes, train, test, val_fraction, flip) -> Splits:
    """Sets part of ``train`` (images, labels) aside as validation, by row number, and keeps ``test`` as it is."""
    images, labels = (torch.from_numpy(array) for array in train)
    rows = split([str(i) for i in range(len(labels))], train[1], val_fraction, None)[:2]
    parts = [Part(images[r], labels[r]) for r in rows]
    return Splits(name, classes, *parts, Part(*map(torch.from_numpy, test)), pad=max(1, images.shape[-1] // 8), flip=flip)


def _bytes(file: Path, record: int) -> np.ndarray:
    """A file of fixed-size records as uint8 [N, record]."""
    try:
        content = np.fromfile(file, np.uint8)
    except OSError as error:
        raise ValueError(f"path: cannot read {str(file)!r}: {error.strerror}") from error
    if not len(content) or len(content) % record:
        raise ValueError(f"path: expected records of {record} bytes in {str(file)!r}, got {len(content)} bytes; is it whole?")
    return content.reshape(-1, record)


def _read_binary(file):
    records = _bytes(file, 1 + 3 * 32 * 32)
    return _cifar_batch(file, records[:, 1:], records[:, 0].tolist())


def _read_pickle(file):
    try:
        with open(file, "rb") as stored:
            batch = _Unpickler(stored, encoding="bytes").load()
        pixels, labels = (batch[key] if key in batch else batch[key.decode()] for key in (b"data", b"labels"))
        pixels = pixels.array()
    except Exception as error:  # unpickling a damaged or foreign file raises whatever its opcodes lead to
        raise ValueError(f"path: {str(file)!r} is not a batch of the pickled CIFAR-10 release: {error!r}") from error
    return _cifar_batch(file, pixels, labels)


def _cifar_batch(file, pixels, labels):
    if pixels.ndim != 2 or pixels.shape[1] != 3072 or not isinstance(labels, list) or len(labels) != len(pixels):
        raise ValueError(f"path: expected 3072 bytes and a label for each image in {str(file)!r}, got {list(pixels.shape)}")
    if not all(type(label) is int and 0 <= label < 10 for label in labels):
        raise ValueError(f"path: expected labels 0 .. 9 in {str(file)!r}, got {sorted(set(map(str, labels)))[:20]}")
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


class _Unpickler(pickle.Unpickler):
    """Reads numbers, strings, lists, dicts and uint8 arrays, and refuses everything else before it is looked up, let alone called.

    numpy's own classes are not called either: stand-ins collect what the file says about its arrays.
    """

    def find_class(self, module, name):
        allowed = {
            "numpy": {"ndarray": _PickledArray, "dtype": _PickledDtype},
            "numpy.core.multiarray": {"_reconstruct": _reconstruct},
            "numpy._core.multiarray": {"_reconstruct": _reconstruct},
            "_codecs": {"encode": _encode},  # how Python 3 writes bytes in the old protocols
        }
        if name not in allowed.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return allowed[module][name]


class _PickledDtype:
    def __init__(self, code, *_):
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, state):
        pass


class _PickledArray:
    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran, self.content = state

    def array(self) -> np.ndarray:
        if self.dtype.code != "u1" or not isinstance(self.content, bytes):
            raise pickle.UnpicklingError(f"expected an array of uint8, got {self.dtype.code}")
        return np.frombuffer(self.content, np.uint8).reshape(self.shape, order="F" if self.fortran else "C").copy()


def _reconstruct(cls, *_):
    return cls()


def _encode(text, encoding):
    return text.encode("latin1")
