"""Finds, opens and checks the CPU library, once, at first use; importing this module opens nothing."""

import ctypes
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from .build import PROBLEM_FILE, library_name

ABI_VERSION = 8  # rse_abi_version() of the library that this Python code goes with

UNIT_VARIABLE = "RSE_FAST_CPU_UNIT"
LIBRARY_VARIABLE = "RSE_FAST_CPU_LIBRARY"


@dataclass(frozen=True)
class Library:
    """The opened library, or why there is none.

    handle: the ctypes.CDLL, None if there is no usable library.
    path: where it is, or was looked for.
    units: instruction-set units compiled in that this processor can run, best first; empty without a library.
    unit: the unit in use, one of `units`; None without a library.
    problem: None, or one sentence: why there is no library and what to do.
    """

    handle: ctypes.CDLL | None
    path: Path
    units: tuple[str, ...] = ()
    unit: str | None = None
    problem: str | None = None


_lock = threading.Lock()
_library: Library | None = None


def load() -> Library:
    """The library, opened at the first call and then the same object for every caller and thread.

    Without a usable library the result has a `problem`, and the first call warns with it once. Environment: RSE_FAST_CPU_LIBRARY
    is the library's path, RSE_FAST_CPU_UNIT the unit to use. Raises ValueError if RSE_FAST_CPU_UNIT names a unit that is not there:
    a named unit never falls back.
    """
    global _library
    if _library is None:
        with _lock:
            if _library is None:
                library = _open(_path())
                if library.problem is not None:
                    warnings.warn(f"rse-fast: {library.problem}", RuntimeWarning, stacklevel=2)
                _library = library
    return _library


def _path() -> Path:
    return Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).parent / library_name())


def _open(path: Path) -> Library:
    forced = os.environ.get(UNIT_VARIABLE)
    library = _open_any_unit(path)
    if not forced:
        return library
    if forced not in library.units:
        available = f"available here: {', '.join(library.units)}" if library.units else f"none is available: {library.problem}"
        raise ValueError(f"{UNIT_VARIABLE}={forced!r} names no unit of the CPU library that this processor can run; {available}")
    if library.handle.rse_select_unit(forced.encode()) != 0:
        raise ValueError(f"{UNIT_VARIABLE}={forced!r} was refused by the CPU library {path}; it offers {', '.join(library.units)}")
    return Library(library.handle, path, library.units, forced)


def _open_any_unit(path: Path) -> Library:
    if not path.exists():
        return Library(None, path, problem=_why_missing(path))
    # torch first: it makes its OpenMP runtime's symbols global, and our library's OpenMP calls then bind to that runtime. The other
    # way round the process would hold two thread pools that fight over the cores and do not follow torch.set_num_threads.
    import torch  # noqa: F401

    try:
        handle = ctypes.CDLL(str(path))
        handle.rse_abi_version.restype = ctypes.c_int
        version = handle.rse_abi_version()
    except (OSError, AttributeError) as error:
        return Library(None, path, problem=f"the CPU library {path} could not be opened ({error}); reinstall rse-fast.")
    if version != ABI_VERSION:
        problem = f"the CPU library {path} has ABI version {version}, expected {ABI_VERSION}; reinstall rse-fast to rebuild it."
        return Library(None, path, problem=problem)
    for name in ("rse_units", "rse_active_unit"):
        getattr(handle, name).restype = ctypes.c_char_p
        getattr(handle, name).argtypes = ()
    handle.rse_select_unit.argtypes = (ctypes.c_char_p,)
    units = tuple(handle.rse_units().decode().split(","))
    return Library(handle, path, units, handle.rse_active_unit().decode())


def _why_missing(path: Path) -> str:
    if os.environ.get(LIBRARY_VARIABLE):
        return f"{LIBRARY_VARIABLE}={path} does not exist; give the path of a built library, or unset the variable."
    try:
        return path.with_name(PROBLEM_FILE).read_text().strip()  # written by setup.py
    except OSError:
        return f"there is no CPU library at {path}; install rse-fast (pip install .) on a machine with a C++17 compiler to build it."
