"""Data sets in the form in which they are published: digits, CIFAR-10 (binary and pickled), STL-10, and arrays of one's own."""

import math
import os
import pickletools
import zipfile
from pathlib import Path

import numpy as np
import torch

from rse_fast.data.files import open_regular, read_bytes
from rse_fast.data.folder import image_folder, memory
from rse_fast.data.parts import Part, Splits, split

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_LARGEST = 2**28  # bytes of a file of a release; the largest that is published has 221 million


def load(
    path: str | os.PathLike[str],
    *,
    resize: tuple[int, int] | int | None = None,
    val_fraction: float = 0.1,
    workers: int | None = None,
    lazy: bool = False,
    progress: bool = False,
) -> Splits:
    """The data set at ``path``. The names of its files tell its kind.

    Args:
        path: a file of arrays (`arrays`), a folder with CIFAR-10 (`cifar10`) or STL-10 (`stl10`) as published, another folder
            (`image_folder`), or "digits" (`digits`).
        resize: as in `image_folder`, and for such a folder alone; so are workers and lazy.
        val_fraction: share of each class of the training images set aside as ``val``, in (0, 1). The digits have parts of their own.
        workers: processes or threads that decode.
        lazy: whether images are decoded at each use.
        progress: show a tqdm bar while decoding, where stderr is a terminal.

    Returns:
        A `Splits`, whose parts hold uint8 images [N, C, H, W] and labels int64 [N].

    Raises:
        ValueError: the data set cannot be read, or an argument is out of range or not for this kind.

    Examples:
        >>> splits = rse_fast.data.load("digits")
        >>> splits.test.images.shape, splits.test.labels.shape
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

    Returns:
        A `Splits` of uint8 images [N, 1, 8, 8].
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = bunch.target.astype(np.int64)
    rows = split([str(i) for i in range(len(labels))], labels, val_fraction=0.1, test_fraction=0.3, path="digits")
    parts = [Part(images[r], torch.from_numpy(labels[r])) for r in rows]
    return Splits("handwritten digits (8x8)", tuple("0123456789"), *parts, pad=1, flip=False)


def cifar10(path: str | os.PathLike[str], *, val_fraction: float = 0.1) -> Splits:
    """CIFAR-10 (Krizhevsky 2009) as published.

    Args:
        path: a folder with ``data_batch_1.bin`` .. ``_5.bin`` and ``test_batch.bin`` (the binary release), or the same names without
            ``.bin`` (the pickled release, of which nothing is run: see `_unpickled`).
        val_fraction: share of each class of the training images set aside as ``val``, in (0, 1).

    Returns:
        A `Splits` of uint8 images [N, 3, 32, 32].

    Raises:
        ValueError: a file is missing, of the wrong size, or not what it should be; the message names it.
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
    return _with_val(path, "CIFAR-10", _CIFAR10, train, test, val_fraction, flip=True)


def stl10(path: str | os.PathLike[str], *, val_fraction: float = 0.1) -> Splits:
    """The labelled part of STL-10 (Coates, Ng & Lee 2011) as published: RGB images stored column by column, labels from 1.

    Args:
        path: a folder with ``train_X.bin``, ``train_y.bin``, ``test_X.bin`` and ``test_y.bin``.
        val_fraction: share of each class of the training images set aside as ``val``, in (0, 1).

    Returns:
        A `Splits` of uint8 images [N, 3, 96, 96], upright, and labels from 0.

    Raises:
        ValueError: a file cannot be read; the message names it.
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
    return _with_val(path, "STL-10", _STL10, *parts, val_fraction, flip=True)


def arrays(path: str | os.PathLike[str], *, val_fraction: float = 0.1) -> Splits:
    """Arrays of one's own in one file. The augmentation is that of photos, crop and flip.

    Args:
        path: a ``.npz`` or ``.safetensors`` file with train_images, test_images (uint8 [N, C, H, W]) and train_labels, test_labels
            (integers [N], from 0, each class with images to train on).
        val_fraction: share of each class of the training images set aside as ``val``, in (0, 1).

    Returns:
        A `Splits` of these images.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    file = Path(path)
    try:
        pairs, classes = _pairs(_found(file))
    except _Unfit as error:
        raise ValueError(f"path: cannot take {str(file)!r}: {error}") from None
    return _with_val(file, file.stem, classes, *pairs, val_fraction, flip=True)


def _found(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, of shapes and dtypes that fit."""
    try:
        if file.suffix == ".npz":
            with open_regular(file) as opened, zipfile.ZipFile(opened) as archive:
                kinds = {name: _array_in_zip(archive, name) for name in _ARRAYS}
                _check_arrays(kinds)
                found = {}
                for name in _ARRAYS:
                    with archive.open(f"{name}.npy") as member:
                        found[name] = np.lib.format.read_array(member, allow_pickle=False)
        elif file.suffix == ".safetensors":
            from safetensors import safe_open

            open_regular(file).close()
            with safe_open(file, "np") as stored:
                kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name in _ARRAYS for part in [stored.get_slice(name)]}
                _check_arrays({name: (shape, _SAFETENSORS.get(kind, np.dtype(np.void))) for name, (shape, kind) in kinds.items()})
                found = {name: stored.get_tensor(name) for name in _ARRAYS}
        else:
            raise ValueError("the name must end with .npz or .safetensors")
    except _Unfit:
        raise
    except Exception as error:  # zipfile and safetensors have errors of their own for damaged files
        reason = f"{error}"[:300]
        raise ValueError(f"path: cannot read {', '.join(_ARRAYS)} from {str(file)!r}: {reason}") from error
    return found


def _pairs(found: dict[str, np.ndarray]) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """(images, labels) to train on and to test on, and the names of the classes."""
    pairs = []
    for name in ("train", "test"):
        images, labels = found[f"{name}_images"], found[f"{name}_labels"]
        if not ((labels >= 0) & (labels < 2**31)).all():
            raise _Unfit(f"expected {name}_labels as {len(images)} integers >= 0, got {labels.min()} .. {labels.max()}")
        pairs.append((images, labels.astype(np.int64)))
    (images, labels), (test_images, test_labels) = pairs
    known = np.unique(labels)
    if len(known) < 2 or known[-1] != len(known) - 1:
        raise _Unfit(f"expected train_labels of at least two classes 0, 1, ..., each there, got {known}")
    if test_labels.max() >= len(known):
        raise _Unfit(f"expected test_labels below {len(known)}, the classes of train_labels, got {test_labels.max()}")
    return pairs, tuple(map(str, range(len(known))))


_SAFETENSORS = {f"{sign}{8 * size}": np.dtype(f"{sign.lower()}{size}") for sign in "IU" for size in (1, 2, 4, 8)}


class _Unfit(ValueError):
    """Of arrays that can be read, but are not a data set."""


def _array_in_zip(archive, name):
    """(shape, dtype) of a member of a .npz file, which is no larger unpacked than they say."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that numpy does not write")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        promised = file.tell() + math.prod(shape) * dtype.itemsize
    if promised != member.file_size:
        raise ValueError(f"{name} should have {promised} bytes, and has {member.file_size}")
    return shape, dtype


def _check_arrays(kinds):
    """Raises `_Unfit` unless shapes and dtypes are those of a data set that fits into memory: before it is read."""
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds.values())
    if size > memory() / 2:
        raise _Unfit(f"the arrays take {size / 2**30:.1f} GiB, more than half of this machine's {memory() / 2**30:.1f} GiB")
    for name in ("train", "test"):
        (shape, dtype), (labelled, kind) = kinds[f"{name}_images"], kinds[f"{name}_labels"]
        if dtype != np.uint8 or len(shape) != 4:
            raise _Unfit(f"expected {name}_images as uint8 [N, C, H, W], got {dtype} {list(shape)}")
        if kind.kind not in "iu" or labelled != shape[:1]:
            raise _Unfit(f"expected {name}_labels as {shape[0]} integers >= 0, got {kind} {list(labelled)}")
        if not math.prod(shape):
            raise _Unfit(f"expected images in {name}_images, got none: {list(shape)}")
    shape, other = kinds["train_images"][0], kinds["test_images"][0]
    if shape[1:] != other[1:]:
        raise _Unfit(f"expected test_images of the shape of train_images, {shape[1:]}, got {other[1:]}")
    if shape[1] not in (1, 3, 4) and shape[3] in (1, 3, 4):
        raise _Unfit(f"expected train_images as [N, C, H, W], got {list(shape)}, which looks like [N, H, W, C]")


def _with_val(path, name, classes, train, test, val_fraction, flip) -> Splits:
    """Sets part of ``train`` (images, labels) aside as validation, by row number, and keeps ``test`` as it is."""
    images, labels = (torch.from_numpy(array) for array in train)
    rows = split([str(i) for i in range(len(labels))], train[1], val_fraction, None, path)[:2]
    parts = [Part(images[r], labels[r]) for r in rows]
    return Splits(name, classes, *parts, Part(*map(torch.from_numpy, test)), pad=max(1, images.shape[-1] // 8), flip=flip)


def _bytes(file: Path, record: int) -> np.ndarray:
    """A file of fixed-size records as uint8 [N, record]."""
    try:
        content = np.frombuffer(bytearray(read_bytes(file, _LARGEST)), np.uint8)
    except (OSError, ValueError) as error:
        raise ValueError(f"path: cannot read {str(file)!r}: {getattr(error, 'strerror', error)}") from error
    if not len(content) or len(content) % record:
        raise ValueError(f"path: expected records of {record} bytes in {str(file)!r}, got {len(content)} bytes; is it whole?")
    return content.reshape(-1, record)


def _read_binary(file):
    records = _bytes(file, 1 + 3 * 32 * 32)
    return _cifar_batch(file, records[:, 1:], records[:, 0].tolist())


def _read_pickle(file):
    try:
        batch = _unpickled(read_bytes(file, _LARGEST))
        pixels, labels = (batch[key] if key in batch else batch[key.decode()] for key in (b"data", b"labels"))
        pixels = pixels.array()
    except Exception as error:  # a damaged or foreign file raises whatever its opcodes lead to
        reason = f"{type(error).__name__}: {error}"[:300]
        raise ValueError(f"path: {str(file)!r} is not a batch of the pickled CIFAR-10 release: {reason}") from error
    return _cifar_batch(file, pixels, labels)


def _cifar_batch(file, pixels, labels):
    if pixels.ndim != 2 or pixels.shape[1] != 3072 or not isinstance(labels, list) or len(labels) != len(pixels):
        raise ValueError(f"path: expected 3072 bytes and a label for each image in {str(file)!r}, got {list(pixels.shape)}")
    wrong = [label if type(label) is int else type(label).__name__ for label in labels if type(label) is not int or not 0 <= label < 10]
    if wrong:
        raise ValueError(f"path: expected labels 0 .. 9 in {str(file)!r}, got {wrong[:5]}")
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


# ------------------------------------------------------------------------------------------------------------- pickles, but not run
_MOST_OPCODES = 2**20  # the published files have 40,000
_VALUES = {  # opcodes whose argument is the value, as pickletools reads it: Python 2's strings as text of Latin-1
    "BININT", "BININT1", "BININT2", "LONG1", "INT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_GLOBALS = {
    "numpy ndarray", "numpy dtype", "numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct",
    "_codecs encode",  # how Python 3 writes bytes in the old protocols
}  # fmt: skip


def _unpickled(content: bytes) -> object:
    """What a pickle of numbers, strings, lists, dicts and uint8 arrays says. Nothing is imported or called.

    Python's own readers take memory by what a file announces, not by what it holds, and hash and compare what is nested without end. Here
    each opcode takes a bounded time, there are 2^20 of them at most, and keys are strings. Raises ValueError for every other opcode.
    """
    stack, marks, memo, encoded = [], [], {}, 0

    def marked():
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    def put(mapping, pairs):
        if type(mapping) is not dict or not all(type(key) in (bytes, str) for key in pairs[::2]):
            raise ValueError("expected a dict whose keys are strings")
        mapping.update(zip(pairs[::2], pairs[1::2], strict=True))

    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if number == _MOST_OPCODES:
            raise ValueError(f"it has more than {_MOST_OPCODES} opcodes")
        if name in ("PROTO", "FRAME"):
            pass
        elif name in _VALUES:
            stack.append(argument)
        elif name in ("SHORT_BINSTRING", "BINSTRING", "STRING"):
            stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("LIST", "TUPLE"):
            stack.append((list if name == "LIST" else tuple)(marked()))
        elif name == "DICT":
            pairs = marked()
            stack.append({})
            put(stack[-1], pairs)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif name in ("APPEND", "APPENDS"):
            values = marked() if name == "APPENDS" else [stack.pop()]
            if type(stack[-1]) is not list:
                raise ValueError("expected a list to append to")
            stack[-1].extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            value = marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            put(stack[-1], value)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                names = stack[-2:]
                del stack[-2:]
                argument = " ".join(part for part in names if type(part) is str)
            if argument not in _GLOBALS:
                raise ValueError(f"{argument.replace(' ', '.')[:100]} is not allowed")
            stack.append(_Global(argument))
        elif name == "REDUCE":
            arguments = stack.pop()
            encoded += len(arguments[0]) if type(arguments[0]) is str else 0
            if encoded > len(content):  # the same text many times
                raise ValueError("it encodes more than it holds")
            stack.append(_reduced(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            if type(stack[-1]) is not _Pickled:
                raise ValueError("expected an array to build")
            stack[-1].state = state
        elif name == "STOP":
            return stack.pop()
        else:
            raise ValueError(f"the opcode {name} is not allowed")
    raise ValueError("it has no end")


class _Global(str):
    """A function or class that a pickle names."""


class _Pickled:
    """What a pickle says of an array (``state``: version, shape, dtype, whether columns come first, bytes) or of a dtype (``code``)."""

    def __init__(self, code=None):
        self.code, self.state = code, ()

    def array(self) -> np.ndarray:
        _, shape, dtype, columns_first, content = self.state
        if dtype.code not in ("u1", b"u1") or type(content) is not bytes:
            raise ValueError("expected an array of uint8")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if columns_first else "C").copy()


def _reduced(function, arguments):
    if type(function) is not _Global:
        raise ValueError("expected a function's name to call")
    if function == "_codecs encode":
        return arguments[0].encode("latin-1")
    return _Pickled(arguments[0] if function == "numpy dtype" else None)
