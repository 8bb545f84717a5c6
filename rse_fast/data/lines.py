"""Lines of results, each with a checksum, so that a bit that changes on disk is noticed before the line is counted."""

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rse_fast.data.files import open_regular

_SEALED = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\Z')
_LONGEST = 2**24  # bytes of a line


def checksum(text: bytes) -> str:
    """CRC-32 in eight hexadecimal digits."""
    return f"{zlib.crc32(text):08x}"


def json_line(row: dict) -> bytes:
    """A row as a line of JSON whose last field, ``crc32``, is the `checksum` of the line without it."""
    text = json.dumps(row, allow_nan=False).encode()
    return text[:-1] + f', "crc32": "{checksum(text)}"}}\n'.encode()


def whole_lines(path: Path, argument: str) -> Iterator[tuple[int, bytes]]:
    """(number, line without its newline) of a file. A last line that was cut off is not there. Raises ValueError, which begins with
    ``argument``, for a line of more than 16 MiB."""
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
            if line.endswith(b"\n"):
                yield number, line[:-1]
            elif len(line) == _LONGEST:
                raise ValueError(f"{argument}: line {number} of {str(path)!r} is damaged (it has more than {_LONGEST} bytes)")


def json_lines(path: Path, fields: Mapping[str, Callable[[object], bool]], optional: Mapping = {}) -> Iterator[dict]:  # noqa: B006
    """The rows that `json_line` wrote to a file, without their checksums. A last line that was cut off is not there.

    fields: what each row holds, and whether a value is one of its kind; optional: what it may hold. Raises ValueError naming file and line
    for a line that is not so, or whose checksum differs or is missing.
    """
    kinds = {**fields, **optional}
    for number, line in whole_lines(path, "out"):
        found = _SEALED.search(line)
        text = line[: found.start()] + b"}" if found else line
        row, problem = {}, None
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"it is no JSON: {str(error)[:100]}"
        if found and checksum(text) != found[1].decode():
            problem = "its checksum differs"
        elif problem is None and not isinstance(row, dict):
            problem = "it is no row"
        elif problem is None and not found:
            problem = "it has no checksum"
        elif problem is None:
            wrong = [name for name in fields if name not in row] + [n for n in row if n in kinds and not kinds[n](row[n])]
            if wrong:
                problem = f"{wrong[0]} is {str(row[wrong[0]])[:50] if wrong[0] in row else 'missing'}"
        if problem is not None:
            raise ValueError(f"out: line {number} of {str(path)!r} is damaged ({problem})")
        yield row


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_index(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32


def is_integer(value: object) -> bool:
    return type(value) is int and abs(value) < 2**64


def is_number(value: object) -> bool:
    """None as well: what is not finite, JSON does not have."""
    return value is None or type(value) in (int, float)


def are_integers(value: object) -> bool:
    return isinstance(value, list) and all(map(is_integer, value))
