"""The rows of an evaluation on disk: one JSON line an image and case, with a checksum, in a file for each process, whole lines only.

The lines of a batch are written, flushed and synced before the next batch begins, so a process that is killed loses one batch at most.
"""

import os
from pathlib import Path

from rse_fast.data import append, lines

_FIELDS = {
    "case": lines.is_text, "index": lines.is_index, "target": lines.is_integer, "answers": lines.are_integers, "l2": lines.is_number,
    "linf": lines.is_number, "verdict": lambda value: isinstance(value, bool), "queries": lines.is_number, "seconds": lines.is_number,
    "seeds": lines.are_integers,
}  # fmt: skip
_OPTIONAL = {
    "by_draws": lambda value: isinstance(value, dict) and all(map(lines.is_integer, value.values())),
    "parts": lambda value: isinstance(value, dict) and all(map(lines.are_integers, value.values())),
    "example": lines.is_text,
}


def read(folder: Path) -> dict[tuple[str, int], dict]:
    """All rows in ``folder`` by (case, image index), whichever process wrote them. A line cut off in the middle is passed over; ValueError
    for a damaged one, see `rse_fast.data.lines`."""
    found = {}
    for path in sorted(folder.glob("rows-*.jsonl")):
        found |= {(row["case"], row["index"]): row for row in lines.json_lines(path, _FIELDS, _OPTIONAL)}
    return found


class Writer:
    """Appends rows to the file of one process; what a killed process left half-written there is cut off."""

    def __init__(self, folder: Path, rank: int):
        self._file = append(folder / f"rows-{rank}.jsonl")

    def write(self, rows: list[dict]) -> None:
        self._file.write(b"".join(map(lines.json_line, rows)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
