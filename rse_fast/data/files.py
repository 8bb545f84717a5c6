"""Files that a reader never sees half written, that no two processes or threads write, and that are read in bounded time and memory."""

import contextlib
import io
import json
import math
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Calls ``write(file)`` on a temporary file beside ``path``, flushes it to disk and renames it: readers see the old or the new file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_through(temporary, write)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_through(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Calls ``write(file)`` on a new file and flushes it to disk. It is locked meanwhile: see `remove_leftovers`."""
    with open(path, "xb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            _lock(file)
        write(file)
        file.flush()
        os.fsync(file.fileno())


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes the temporary files of `write_atomically` whose process was killed; those that another process is writing stay."""
    for path in filter(Path.is_file, Path(folder).glob(f".*.{'[0-9a-f]' * 8}.tmp")):
        with contextlib.suppress(OSError):  # of another process, or one that has been renamed since
            with open(path, "r+b") as file:
                _lock(file)
            path.unlink()


def _lock(file: BinaryIO) -> None:
    """Takes the lock of POSIX, which is not left with the worker processes of one that was killed. OSError where it cannot be had."""
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flushes the names in a folder to disk, so that a rename survives a power cut. Nothing where folders cannot be opened (Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raises ValueError where ``folder`` could not be made or written to; makes nothing."""
    folder = Path(folder)
    there = next((place for place in (folder, *folder.absolute().parents) if os.path.lexists(place)), folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written to" if there.is_dir() else "is no folder"
        raise ValueError(f"out: cannot write in {str(folder)!r}: {str(there)!r} {why}; name another folder")


_held: dict[tuple[int, str], object] = {}  # files that threads of this process write; by process, as a fork inherits them


class _Claimed(io.BufferedRandom):
    key = None

    def close(self):
        super().close()
        _held.pop(self.key, None)


def claim(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file (made where it is missing) to be read and appended to by this thread alone, until it is closed or the process ends.

    Raises ValueError where another process, or another thread of this one, has it so. Other processes are not noticed on Windows and where
    the file system knows no locks.
    """
    key, owner = (os.getpid(), os.path.realpath(path)), object()
    # Asked before it is opened: the locks of POSIX belong to the process, and to close the file again would give up the other thread's.
    if _held.setdefault(key, owner) is not owner:
        raise ValueError(f"out: another thread of this process is writing {os.fspath(path)!r}; wait for it, or name another folder")
    try:
        file = _Claimed(io.FileIO(path, "a+"))
    except BaseException:
        del _held[key]
        raise
    file.key = key
    try:
        _lock(file)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(f"out: another process is writing {os.fspath(path)!r}; wait for it, or name another folder") from None
    except OSError:
        pass
    return file


def append(path: str | os.PathLike[str]) -> BinaryIO:
    """`claim` for a file of lines: a last line that was cut off is gone, and what is written goes behind the others."""
    file = claim(path)
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
    return file


def open_regular(path: str | os.PathLike[str], most: float = math.inf) -> BinaryIO:
    """Opens a file to be read. Raises ValueError for what is none (a pipe would be waited for, a device may never end) and where it has
    more than ``most`` bytes."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{os.fspath(path)!r} is no regular file, but a pipe or a device")
    if (size := os.fstat(file.fileno()).st_size) > most:
        file.close()
        raise ValueError(f"{os.fspath(path)!r} has {size} bytes, more than the {most} that such a file may have")
    return file


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file. Raises ValueError where it has more than ``most`` bytes."""
    with open_regular(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:  # it has grown
        raise ValueError(f"{os.fspath(path)!r} has more than the {most} bytes that such a file may have")
    return content


def read_json(path: str | os.PathLike[str]) -> object:
    """What a JSON file of at most 16 MiB says. Raises OSError, and ValueError for what is no JSON."""
    try:
        return json.loads(read_bytes(path, 2**24))
    except RecursionError:
        raise ValueError(f"{os.fspath(path)!r} has brackets that are nested too deeply") from None
