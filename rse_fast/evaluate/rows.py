"""The rows of an evaluation on disk: one JSON line an image and case, in a file for each process, whole lines only.

The lines of a batch are written, flushed and synced before the next batch begins, so a process that is killed loses one batch at most.
"""

import json
import os
from pathlib import Path

from rse_fast.data import append


def read(folder: Path) -> dict[tuple[str, int], dict]:
    """All rows in ``folder`` by (case, image index), whichever process wrote them. A line cut off in the middle is passed over."""
    found = {}
    for path in sorted(folder.glob("rows-*.jsonl")):
        content = path.read_bytes()
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
            try:
                row = json.loads(line)
                found[row["case"], row["index"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"out: line {number} of {str(path)!r} is no row of an evaluation ({error})") from error
    return found


class Writer:
    """Appends rows to the file of one process; what a killed process left half-written there is cut off."""

    def __init__(self, folder: Path, rank: int):
        self._file = append(folder / f"rows-{rank}.jsonl")

    def write(self, rows: list[dict]) -> None:
        self._file.write(b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
