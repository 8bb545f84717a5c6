"""Image folders, decoded once into one cached uint8 array, or file by file in worker processes where that would be too large."""

import hashlib
import json
import math
import os
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rse_fast.data.files import claim, open_regular, write_atomically
from rse_fast.data.parts import Part, Splits, split

_COMPANIONS = frozenset({"thumbs.db", "desktop.ini"})  # that systems put beside images
_IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow would hand others to programs: PostScript to Ghostscript
_DECODABLE_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa"})
_LARGEST = 2**30  # bytes of a file: the decoders of some formats read all of it before they look
_FILES_PER_TASK = 64
_PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
_LAYOUTS = "understood are train/CLASS/* with test/CLASS/* and, where there is one, val/CLASS/* (or training, valid, validation, testing, \
in capitals too), or CLASS/* alone"
_ORIENTATION = 0x0112  # the EXIF tag; below, what makes the pixels of each of its values upright
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
_THREADS_PAY_FROM_BYTES = 128 * 128 * 3  # below, Pillow holds the interpreter lock most of the time and threads only contend for it


def image_folder(
    path: str | os.PathLike[str],
    *,
    resize: tuple[int, int] | int | None = None,
    channels: int = 3,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    workers: int | None = None,
    progress: bool = False,
    lazy: bool = False,
) -> Splits:
    """Images in folders named by class: ``train/CLASS/*.jpg`` with ``test/CLASS/*.jpg`` and perhaps ``val/CLASS/*.jpg``, or plain
    ``CLASS/*.jpg``. The parts may also be called training, valid, validation and testing, in capitals too.

    Files are decoded once and kept in one uint8 array file in the user's cache folder, ``rse-fast`` in XDG_CACHE_HOME or ``~/.cache`` (the
    variable RSE_FAST_CACHE names another place). It is used again while names, sizes and modification times of all image files and the
    arguments that shape the pixels are unchanged. The split depends on the file names alone. A photo is turned upright by the orientation
    in its EXIF data, if they can be read.

    Args:
        path: the folder. Hidden entries are passed over. A warning names other folders and files that are not read.
        resize: (height, width), or one number for both; images are cropped at the centre to this aspect and resampled. None: as they are,
            and then all must have one size.
        channels: 3 (RGB) or 1 (grey).
        val_fraction: share of each class of the training images set aside as ``val`` where there is no ``val/`` folder; in (0, 1).
        test_fraction: share of each class set aside as ``test`` where there are no parts; in (0, 1).
        workers: decoding threads; None: one per CPU (at most 8), or one in all for small images, which threads only slow down.
        progress: show a tqdm bar while decoding, where stderr is a terminal.
        lazy: for folders that do not fit in memory (ImageNet): nothing is decoded now or cached; the parts are `FilePart`, whose
            ``workers`` (processes; None: one per CPU, at most 8; 0: none) decode batches ahead of time. Needs ``resize``.

    Returns:
        A `Splits`, whose parts hold uint8 images [N, C, H, W].

    Raises:
        ValueError: the layout is unknown, classes differ between the parts, a class has too few images to split, images have several sizes,
            or a file is no image or cannot be decoded (the message names it).

    Warns:
        UserWarning: there are no parts, so the images are split; images or folders are passed over; images cannot be cached.

    Examples:
        >>> splits = rse_fast.data.image_folder("photos", resize=64)
        >>> splits.train.images.shape, splits.classes
    """
    root = Path(path)
    height_width = _check_resize(resize)
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels!r}")
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < fraction < 1:
            raise ValueError(f"{name}: expected a number in (0, 1), got {fraction!r}")
    if workers is not None and workers < (0 if lazy else 1):
        raise ValueError(f"workers: expected at least {0 if lazy else 1}, got {workers!r}")
    if lazy and height_width is None:
        raise ValueError("resize: expected a size where lazy=True, got None")
    if not root.is_dir():
        raise ValueError(f"path: expected a folder of images, got {str(root)!r}, which is {'a file' if root.exists() else 'not there'}")

    try:
        parts = _find_parts(root)
        names = list(parts) or ["train"]
        found = [_list_classes(parts.get(name, root)) for name in names]
    except OSError as error:
        raise ValueError(f"path: cannot read the folder {str(error.filename)!r}: {error.strerror}") from error
    classes = found[0][2]
    for name, (_, _, others) in zip(names, found, strict=True):
        if others != classes:
            first, other = parts["train"].name, parts[name].name
            raise ValueError(f"path: classes of {first}/ and {other}/ differ in {str(root)!r}: {sorted(set(classes) ^ set(others))}")
    if not parts:
        text = f"{str(root)!r} has no train/ and test/: of each class, {test_fraction:.0%} of the images are set aside for testing and "
        warnings.warn(f"{text}{val_fraction:.0%} for validation, chosen by a hash of their names", stacklevel=2)

    files = [file for listed, _, _ in found for file in listed]
    labels = np.concatenate([listed for _, listed, _ in found])
    starts = np.cumsum([0, *(len(listed) for _, listed, _ in found)])
    own = {name: np.arange(start, stop) for name, start, stop in zip(names, starts[:-1], starts[1:], strict=True)}
    if "val" in parts:
        rows = [own["train"], own["val"], own["test"]]
    else:
        keys = [file.relative_to(root).as_posix() for file in found[0][0]]
        rows = split(keys, found[0][1], val_fraction, None if parts else test_fraction, root)
        rows[2] = own.get("test", rows[2])
    if lazy:
        workers = min(8, os.cpu_count() or 1) if workers is None else workers
        parts = [FilePart(tuple(files[i] for i in r), torch.from_numpy(labels[r]), (channels, *height_width), workers) for r in rows]
    else:
        images = torch.from_numpy(_load_cached(root, files, height_width, channels, workers, progress))
        parts = [Part(images[r], torch.from_numpy(labels[r])) for r in rows]
    # The paper's recipe pads 32x32 images by 4; keep that proportion, so that small images do not lose their motif.
    all_jpeg = all(file.suffix.lower() in (".jfif", ".jpg", ".jpeg") for file in files)
    name = root.resolve().name + (" (JPEG)" if all_jpeg else "")  # lossy copies of a known data set are not that data set
    return Splits(name, classes, *parts, pad=max(1, parts[0].shape[-1] // 8), flip=True)


@dataclass(frozen=True)
class FilePart:
    """Image files with labels int64 [N], decoded to uint8 [C, H, W] of one ``shape`` when a batch is fetched, by ``workers`` processes."""

    files: tuple[Path, ...]
    labels: Tensor
    shape: tuple[int, int, int]
    workers: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Tensor:
        channels, *height_width = self.shape
        return torch.from_numpy(np.ascontiguousarray(_decode(self.files[row], tuple(height_width), channels)))

    def fetch(self, selections: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yields the images uint8 [B, C, H, W] of each selection of rows (int64 [B]). Raises ValueError for a file that is no image."""
        rows = [selection.tolist() for selection in selections]
        generator = torch.Generator()  # of the workers' seeds, which nothing reads: the default generator is left alone
        pinned = torch.cuda.is_available()
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=rows, num_workers=self.workers, generator=generator, pin_memory=pinned, worker_init_fn=_leave_signals
        )
        try:
            yield from loader
        except ValueError as error:  # a worker's comes with its traceback
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


def _leave_signals(worker: int) -> None:
    """A signal to the whole process group, as torchrun sends it, is for the parent, which saves and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _check_resize(resize: tuple[int, int] | int | None) -> tuple[int, int] | None:
    if resize is None:
        return None
    pair = tuple(resize) if isinstance(resize, Sequence) else (resize, resize)
    if len(pair) != 2 or not all(type(n) is int and n >= 1 for n in pair):
        raise ValueError(f"resize: expected a positive number or (height, width), got {resize!r}")
    return pair


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones. ValueError for a link that leads nowhere, where it may stand for one."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found.append(folder / entry.name)
            elif entry.is_symlink() and not os.path.exists(entry) and not Path(entry.name).suffix:
                raise ValueError(f"path: {entry.path!r} is a link to what is not there")
    return sorted(found)


def _find_parts(root: Path) -> dict[str, Path]:
    """The folders of train, val (where there is one) and test, in this order; nothing where the folders are classes."""
    folders = _folders(root)
    named = {name: [folder for folder in folders if _PARTS.get(folder.name.lower()) == name] for name in ("train", "val", "test")}
    named = {name: found for name, found in named.items() if found}
    others = [folder for folder in folders if folder.name.lower() not in _PARTS]
    # A class may be called "train", too: then it lies beside others and holds no folders.
    if others and not {"train", "test"} <= named.keys() and not any(_folders(folder) for found in named.values() for folder in found):
        for folder in others:
            if {"train", "test"} <= {_PARTS.get(inner.name.lower()) for inner in _folders(folder)}:
                raise ValueError(f"path: {str(root)!r} holds no data set, but {str(folder)!r} seems to; name that")
        return {}
    if not named:
        return {}
    for found in named.values():
        if len(found) > 1:
            raise ValueError(f"path: {str(root)!r} holds both {found[0].name}/ and {found[1].name}/; which of them is meant?")
    there = ", ".join(f"{found[0].name}/" for found in named.values())
    if missing := [f"{name}/" for name in ("train", "test") if name not in named]:
        hint = ""
        if missing == ["test/"] and "val" in named:
            hint = f". To test on the images of {named['val'][0].name}/, call it test/; validation images are then taken from train/"
        raise ValueError(f"path: found {there} in {str(root)!r}, but no {' and no '.join(missing)}; {_LAYOUTS}{hint}")
    if others:
        names = ", ".join(repr(folder.name) for folder in others)
        warnings.warn(f"of {str(root)!r} {there} are read; passed over: {names}", stacklevel=3)
    return {name: found[0] for name, found in named.items()}


def _list_classes(folder: Path) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """Image files sorted by class and name, their labels int64 [N], and the class names."""
    classes = [_utf8(entry) for entry in _folders(folder)]
    with os.scandir(folder) as entries:
        loose = sum(_is_image_name(entry.name) and entry.is_file() for entry in entries)
    if len(classes) < 2:
        found = f"{[entry.name for entry in classes]}" + (f" and {loose} images that lie in none" if loose else "")
        raise ValueError(f"path: expected at least two class folders in {str(folder)!r}, found {found}; {_LAYOUTS}")
    if loose:
        warnings.warn(f"{loose} images in {str(folder)!r} lie in no class folder and are passed over", stacklevel=3)
    files: list[Path] = []
    labels: list[int] = []
    passed: list[str] = []
    for label, within in enumerate(classes):
        found: list[Path] = []
        with os.scandir(within) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_dir():
                    text = f"path: expected images in the class folder {str(within)!r}, found the folder {entry.name!r}; {_LAYOUTS}"
                    raise ValueError(text)
                if not _is_image_name(entry.name):
                    if not entry.name.startswith(".") and entry.name.lower() not in _COMPANIONS:
                        passed.append(entry.path)
                    continue
                if not entry.is_file():
                    there = os.path.exists(entry)
                    what = "no regular file, but a pipe or a device" if there else "a link to what is not there"
                    raise ValueError(f"path: expected images in the class folder {str(within)!r}, found {entry.name!r}, which is {what}")
                found.append(_utf8(within / entry.name))
        if not found:
            raise ValueError(f"path: no images in the class folder {str(within)!r}")
        files += sorted(found)
        labels += [label] * len(found)
    if passed:
        kinds = ", ".join(sorted(_IMAGE_SUFFIXES))
        warnings.warn(
            f"files that are passed over: {len(passed)}, such as {min(passed)!r}; images are read by their names: {kinds}", stacklevel=3
        )
    return files, np.array(labels, dtype=np.int64), tuple(entry.name for entry in classes)


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _IMAGE_SUFFIXES


def _utf8(entry: Path) -> Path:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"path: the name {os.fsencode(entry.name)!r} in {str(entry.parent)!r} is not UTF-8; rename it") from None
    return entry


def _load_cached(
    root: Path, files: list[Path], resize: tuple[int, int] | None, channels: int, workers: int | None, progress: bool
) -> np.ndarray:
    """The images of ``files`` as uint8 [N, C, H, W], from the cache or decoded and then cached."""
    try:
        listing = [(file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    except OSError as error:
        raise ValueError(f"path: cannot read the image {str(error.filename)!r}: {error.strerror}") from error
    key = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:32]
    kind = f"images-v1-{'x'.join(map(str, resize)) if resize else 'native'}-{channels}"
    try:
        folder = _cache_folder(root)
    except RuntimeError as error:  # a user without a home
        warnings.warn(f"decoded images are not cached ({error}); RSE_FAST_CACHE names a folder for them", stacklevel=3)
        return _decode_all(files, resize, channels, workers, progress)
    cached = folder / f"{kind}-{key}.npy"
    if cached.is_file():
        try:
            with open_regular(cached) as file:
                images = np.lib.format.read_array(file, allow_pickle=False)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:2] != (len(files), channels):
                raise ValueError(f"it holds {images.dtype} {list(images.shape)}")
            return images
        except (OSError, ValueError, EOFError) as error:
            warnings.warn(f"the image cache {str(cached)!r} is damaged and will be made anew ({error})", stacklevel=3)
    images = _decode_all(files, resize, channels, workers, progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = claim(folder / ".lock")
    except ValueError:  # another process is writing what it has decoded
        return images
    except OSError as error:
        warnings.warn(f"decoded images could not be cached in {str(folder)!r} ({error}); they are decoded again next time", stacklevel=3)
        return images
    with lock:
        try:
            for old in [*folder.glob(f"{kind}-*.npy"), *folder.glob(".*.tmp")]:  # of other files; of a process that was killed
                if old != cached:
                    old.unlink(missing_ok=True)
            write_atomically(cached, lambda file: np.save(file, images, allow_pickle=False))
        except OSError as error:
            text = f"decoded images could not be cached in {str(folder)!r} ({error}); they are decoded again next time"
            warnings.warn(text, stacklevel=3)
    return images


def _cache_folder(root: Path) -> Path:
    """A folder of this one's own in the user's cache, where `rse_fast.kernels.triton.config` keeps what it has found, too."""
    chosen = os.environ.get("RSE_FAST_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "rse-fast"
    resolved = root.resolve()
    return base / "images" / f"{resolved.name}-{hashlib.sha256(os.fsencode(resolved)).hexdigest()[:12]}"


def memory() -> float:
    """Bytes of this machine's memory; infinite where it does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def _decode_all(files: list[Path], resize: tuple[int, int] | None, channels: int, workers: int | None, progress: bool) -> np.ndarray:
    first = _decode(files[0], resize, channels)
    size = len(files) * first.size
    if size > memory() / 2:
        raise ValueError(
            f"resize: {len(files)} images of {_size(first)} take {size / 2**30:.1f} GiB as one array, more than half of this machine's "
            f"{memory() / 2**30:.1f} GiB; give a smaller size"
        )
    images = np.empty((len(files), *first.shape), np.uint8)
    if workers is None:
        workers = 1 if first.size < _THREADS_PAY_FROM_BYTES else min(8, os.cpu_count() or 1)

    def decode_from(start: int) -> int:
        stop = min(start + _FILES_PER_TASK, len(files))
        for i in range(start, stop):
            image = _decode(files[i], resize, channels)
            if image.shape != first.shape:
                raise ValueError(
                    f"resize: images have mixed sizes ({str(files[0])!r} {_size(first)}, {str(files[i])!r} {_size(image)}); "
                    "give a resize: one number, or height and width (--resize N or HxW)"
                )
            images[i] = image
        return stop - start

    bar = None
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=len(files), desc="decoding images", unit="image", disable=None)
    pool = ThreadPoolExecutor(workers)
    try:
        for count in pool.map(decode_from, range(0, len(files), _FILES_PER_TASK)):
            if bar is not None:
                bar.update(count)
    finally:
        pool.shutdown(cancel_futures=True)
        if bar is not None:
            bar.close()
    return images


def _decode(file: Path, resize: tuple[int, int] | None, channels: int) -> np.ndarray:
    """One image as uint8 [C, H, W], upright. ValueError naming the file if that cannot be had."""
    from PIL import Image, ImageOps

    try:
        with open_regular(file, _LARGEST) as opened, Image.open(opened, formats=_FORMATS) as image:
            if image.mode not in _DECODABLE_MODES:
                raise ValueError(f"pixels of mode {image.mode!r} (more than 8 bits) are not supported; convert it to 8-bit grey or RGB")
            upright = image.convert("RGB" if channels == 3 else "L")
            if (turn := _UPRIGHT.get(_orientation(image))) is not None:
                upright = upright.transpose(Image.Transpose[turn])
            if resize is not None:
                upright = ImageOps.fit(upright, (resize[1], resize[0]), Image.Resampling.BICUBIC)
            pixels = np.asarray(upright)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others on damaged files
        raise ValueError(f"path: cannot read the image {str(file)!r}: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def _orientation(image) -> int | None:
    """The EXIF entry that pixels depend on. No other entry is read, so an image with other damaged entries is accepted."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # as many kinds as there are ways to damage them
        return None
    return value if type(value) is int else None


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[2]}"
