"""Files that a reader never sees half written, and that no two processes write."""

import os
import secrets
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
    """Calls ``write(file)`` on a new file and flushes it to disk."""
    with open(path, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flushes the names in a folder to disk, so that a rename survives a power cut. Nothing where folders cannot be opened (Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def claim(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file (made where it is missing) to be read and appended to by this process alone, until it is closed or the process ends.

    Raises ValueError where another process has it so. Nothing is guarded on Windows and where the file system knows no locks.
    """
    file = open(path, "a+b")
    try:
        if fcntl is not None:  # this kind of lock is not left with the worker processes of one that was killed
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    return file
