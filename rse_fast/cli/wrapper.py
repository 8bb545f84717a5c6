"""What every command does around its work: errors become one line and an exit status, signals end it cleanly, progress is shown."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TOLD_EVERY = 30  # seconds between lines of progress where no terminal shows a bar


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


class Progress:
    """How far a command is: a bar where stderr is a terminal; elsewhere a line on stdout every half minute, and one at the end.

    Args:
        name: what begins the bar and each line.
        total: how many units there are.
        unit: their name.
        done: how many of them were done before.
        shown: False for all processes of a run but one.
    """

    def __init__(self, name: str, total: int, unit: str = "image", done: int = 0, shown: bool = True) -> None:
        from tqdm import tqdm

        self._name, self._total, self._unit, self._done, self._text = name, total, unit, done, ""
        self._bar = tqdm(desc=name, total=total, unit=unit, initial=done, disable=None if shown else True)
        self._prints = shown and self._bar.disable
        self._began = self._told = time.perf_counter()
        self._untold = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, error, *_) -> None:
        self._bar.close()
        if error is None and self._untold:
            self._tell()

    def update(self, count: int, text: str = "") -> None:
        """``count`` more units are done. text: what is known by now; "" leaves what was known before."""
        self._done, self._text, self._untold = self._done + count, text or self._text, True
        self._bar.set_postfix_str(self._text, refresh=False)
        self._bar.update(count)
        if time.perf_counter() - self._told > TOLD_EVERY:
            self._tell()

    def _tell(self) -> None:
        self._told, self._untold = time.perf_counter(), False
        if self._prints:
            parts = [f"{self._name}: {self._done} of {self._total} {self._unit}s", self._text, f"{self._told - self._began:.0f} s"]
            print(", ".join(filter(None, parts)), flush=True)


def named(error: Exception) -> str:
    """The message of an error, a data set named as on the command line."""
    return re.sub(r"^(path|out): ", lambda found: {"path": "--data", "out": "--out"}[found[1]] + ": ", str(error))


def unwritten(error: OSError, out: Path, *results: str) -> str:
    """What to say where a folder cannot be written, and of what is there: files that are not empty, of names like ``results``."""
    if any(file.stat().st_size for pattern in results for file in out.glob(pattern)):
        return f"{error}; what was saved before is in {out}"
    return f"cannot write in {str(out)!r} ({error.strerror or error}); name another folder with --out"
