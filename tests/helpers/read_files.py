"""Reads files that may be hostile, in a process of its own: ``python -m read_files`` answers each line ``KIND PATH`` of its standard input.

An answer is a line of JSON: ``error`` (type and text, or null), ``seconds``, ``forbidden`` (what was called that no reader may call).
Memory is limited, and who waits too long is interrupted. `READERS` says what reads a kind of file.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

from rse_fast import certify_cli, data, predict_cli, run_inputs
from rse_fast.evaluate import rows
from rse_fast.train import Config, load_model, log

MEMORY, SECONDS = 800 * 2**20, 20  # beside what the process has when it begins

READERS = {
    "folder": data.load,
    "cifar10": data.cifar10,
    "stl10": data.stl10,
    "arrays": data.arrays,
    "config": Config.load,
    "best": lambda run: load_model(run, trust=True),  # the configuration is whole, and the test's own
    "last": lambda run: load_model(run, "last", trust=True),
    "log": log.read,
    "rows": rows.read,
    "predictions": predict_cli.read,
    "certified": certify_cli.read_table,
    "settings": lambda folder: run_inputs.open_folder(folder, "predict.json", {}, None),
}
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "shutil.",
    "ctypes.dlopen",
    "pickle.find_class",
)


def main() -> None:
    called = []
    sys.addaudithook(lambda event, arguments: called.append(f"{event} {arguments}"[:200]) if event.startswith(FORBIDDEN) else None)
    signal.signal(signal.SIGALRM, _interrupt)
    limited = False
    for line in sys.stdin:
        kind, path = line.rstrip("\n").split(" ", 1)
        if kind == "limit":  # what the readers import is there by now
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
            limited = True
        error = None
        begin = time.monotonic()
        called.clear()
        signal.alarm(SECONDS)
        try:
            if kind != "limit":
                READERS[kind](Path(path))
        except BaseException as caught:
            error = [type(caught).__name__, isinstance(caught, ValueError), str(caught)[:2000]]
        signal.alarm(0)
        answer = {"error": error, "seconds": time.monotonic() - begin, "forbidden": called if limited else []}
        print(json.dumps(answer), flush=True)


def _interrupt(number, frame):
    raise TimeoutError(f"no answer within {SECONDS} seconds")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
