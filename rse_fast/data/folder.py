"""Image folders, decoded once into one cached uint8 array, or file by file in worker processes where that would be too large."""

import hashlib
import json
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

from rse_fast.data.files import write_atomically
from rse_fast.data.parts import Part, Splits, split

_IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_DECODABLE_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa"})
_FILES_PER_TASK = 64
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
    """Images in folders named by class: ``train/CLASS/*.jpg`` with ``test/CLASS/*.jpg``, or plain ``CLASS/*.jpg``.

    Files are decoded once and kept in one uint8 array file, in ``.rse-fast`` inside the folder if that is writable, else under
    ``~/.cache/rse-fast`` (the variable RSE_FAST_CACHE names another place). It is used again while names, sizes and modification times of
    all image files and the arguments that shape the pixels are unchanged.

    path: the folder. Hidden entries and files that do not end like an image are passed over.
    resize: (height, width), or one number for both; images are cropped at the centre to this aspect and resampled. None: as they are,
        and then all must have one size.
    channels: 3 (RGB) or 1 (grey).
    val_fraction: share of each class of the training images set aside as ``val``; in (0, 1).
    test_fraction: share of each class set aside as ``test`` where there is no ``test/`` folder; in (0, 1).
    workers: decoding threads; None: one per CPU (at most 8), or one in all for small images, which threads only slow down.
    progress: show a tqdm bar while decoding, where stderr is a terminal.
    lazy: for folders that do not fit in memory (ImageNet): nothing is decoded now or cached; the parts are `FilePart`, whose ``workers``
        (processes; None: one per CPU, at most 8; 0: none) decode batches ahead of time. Needs ``resize``.

    The split depends on the file names alone. Raises ValueError for an unknown layout, classes that differ between train and test, too few
    images to split, images of mixed sizes, and for files that cannot be decoded (it names the file).
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

    has_test = (root / "train").is_dir() and (root / "test").is_dir()
    files, labels, classes = _list_classes(root / "train" if has_test else root)
    train_count = len(files)
    if has_test:
        test_files, test_labels, test_classes = _list_classes(root / "test")
        if test_classes != classes:
            raise ValueError(f"path: classes of train/ and test/ differ in {str(root)!r}: {sorted(set(classes) ^ set(test_classes))}")
        files, labels = files + test_files, np.concatenate([labels, test_labels])

    keys = [file.relative_to(root).as_posix() for file in files]
    rows = split(keys[:train_count], labels[:train_count], val_fraction, None if has_test else test_fraction)
    if has_test:
        rows[2] = np.arange(train_count, len(files))
    if lazy:
        workers = min(8, os.cpu_count() or 1) if workers is None else workers
        parts = [FilePart(tuple(files[i] for i in r), torch.from_numpy(labels[r]), (channels, *height_width), workers) for r in rows]
    else:
        images = torch.from_numpy(_load_cached(root, files, height_width, channels, workers, progress))
        parts = [Part(images[r], torch.from_numpy(labels[r])) for r in rows]
    # The paper's recipe pads 32x32 images by 4; keep that proportion, so that small images do not lose their motif.
    all_jpeg = all(file.suffix.lower() in (".jpg", ".jpeg") for file in files)
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


def _list_classes(folder: Path) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """Image files sorted by class and name, their labels int64 [N], and the class names."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"path: expected at least two class folders in {str(folder)!r}, found {classes}")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found: list[Path] = []
        for entry in (folder / name).iterdir():
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                raise ValueError(f"path: expected images in the class folder {str(folder / name)!r}, found the folder {entry.name!r}")
            if entry.suffix.lower() in _IMAGE_SUFFIXES:
                found.append(entry)
        if not found:
            raise ValueError(f"path: no images in the class folder {str(folder / name)!r}")
        files += sorted(found)
        labels += [label] * len(found)
    return files, np.array(labels, dtype=np.int64), tuple(classes)


def _load_cached(
    root: Path, files: list[Path], resize: tuple[int, int] | None, channels: int, workers: int | None, progress: bool
) -> np.ndarray:
    """The images of ``files`` as uint8 [N, C, H, W], from the cache or decoded and then cached."""
    listing = [(file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    key = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:32]
    kind = f"images-v1-{'x'.join(map(str, resize)) if resize else 'native'}-{channels}"
    folder = _cache_folder(root)
    cached = folder / f"{kind}-{key}.npy"
    if cached.is_file():
        try:
            images = np.load(cached, allow_pickle=False)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:2] != (len(files), channels):
                raise ValueError(f"it holds {images.dtype} {list(images.shape)}")
            return images
        except (OSError, ValueError, EOFError) as error:
            warnings.warn(f"the image cache {str(cached)!r} is damaged and will be made anew ({error})", stacklevel=3)
    images = _decode_all(files, resize, channels, workers, progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, lambda file: np.save(file, images, allow_pickle=False))
        for old in folder.glob(f"{kind}-*.npy"):
            if old != cached:
                old.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"decoded images could not be cached in {str(folder)!r} ({error}); they are decoded again next time", stacklevel=3)
    return images


def _cache_folder(root: Path) -> Path:
    chosen = os.environ.get("RSE_FAST_CACHE")
    if not chosen and os.access(root, os.W_OK | os.X_OK):
        return root / ".rse-fast"
    home = Path(chosen) if chosen else Path.home() / ".cache" / "rse-fast"
    resolved = root.resolve()
    return home / f"{resolved.name}-{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}"


def _decode_all(files: list[Path], resize: tuple[int, int] | None, channels: int, workers: int | None, progress: bool) -> np.ndarray:
    first = _decode(files[0], resize, channels)
    size = len(files) * first.size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else size
    if size > memory / 2:
        raise ValueError(
            f"resize: {len(files)} images of {_size(first)} take {size / 2**30:.1f} GiB as one array, more than half of this machine's "
            f"{memory / 2**30:.1f} GiB; give a smaller size"
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
                    "give resize=(height, width)"
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
        with Image.open(file) as image:
            if image.mode not in _DECODABLE_MODES:
                raise ValueError(f"pixels of mode {image.mode!r} (more than 8 bits) are not supported; convert it to 8-bit grey or RGB")
            upright = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
            if resize is not None:
                upright = ImageOps.fit(upright, (resize[1], resize[0]), Image.Resampling.BICUBIC)
            pixels = np.asarray(upright)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others on damaged files
        raise ValueError(f"path: cannot read the image {str(file)!r}: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[2]}"
