"""What every command does around its work: errors become one line and an exit status, signals end it cleanly, progress is a bar."""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


class _Terminated(BaseException):
    """SIGTERM has come. No ``except Exception`` holds it up, and every ``finally`` runs."""


def run(command: str, action: Callable[[], int | None], out: Path | None = None, results: tuple[str, ...] = ()) -> int:
    """Runs ``action`` and returns the exit status of the command.

    Args:
        command: its name, such as "certify".
        action: what it does; returns an exit status, or None for 0.
        out: the folder it writes into, if the same command continues there.
        results: patterns of the files in it that hold results.

    Returns:
        What ``action`` returns; 1 where a file cannot be written; 2 for a ValueError or TypeError, which is bad input; 130 after Ctrl-C.
        After SIGTERM the process ends by that signal.
    """
    continues = "" if out is None else f"; the same command continues in {out}"
    try:
        with _termination_raises():
            return action() or 0
    except (ValueError, TypeError) as error:
        print(f"rse-fast {command}: {named(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"rse-fast {command}: {error if out is None else unwritten(error, out, *results)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted{continues}", file=sys.stderr)
        return 130
    except _Terminated:
        print(f"terminated{continues}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)  # its handler is the default again: whoever waits for the process sees how it ended
        raise SystemExit(128 + signal.SIGTERM) from None


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM raises `_Terminated` within, where it would end the process otherwise. A handler of somebody else's is left alone."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    own = os.getpid()

    def terminate(number, frame):
        if os.getpid() == own:
            raise _Terminated
        os._exit(128 + number)  # a forked worker, which has nothing to say

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def progress(total: int, unit: str = "image", done: int = 0, shown: bool = True):
    """A tqdm bar on stderr where that is a terminal. shown: False for all processes of a run but one."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit=unit, disable=None if shown else True)


def named(error: Exception) -> str:
    """The message of an error, a data set named as on the command line."""
    return re.sub(r"^(path|out): ", lambda found: {"path": "--data", "out": "--out"}[found[1]] + ": ", str(error))


def unwritten(error: OSError, out: Path, *results: str) -> str:
    """What to say where a folder cannot be written, and of what is there: files that are not empty, of names like ``results``."""
    if any(file.stat().st_size for pattern in results for file in out.glob(pattern)):
        return f"{error}; what was saved before is in {out}"
    return f"cannot write in {str(out)!r} ({error.strerror or error}); name another folder with --out"
