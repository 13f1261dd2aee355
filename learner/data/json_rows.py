"""Local JSON and JSONL files as rows, read one by one without Arrow.

Arrow fills in missing columns, unifies types and drops lone surrogates: a bad row would be repaired
silently instead of being reported. A line of a JSONL file that is not a JSON object is a bad row
like any other; a .json file is one document, and is refused as a whole.
"""

import json
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import cast

from learner.data.rows import Json, ReadRow, Row, RowError, Rows, columns_of, in_memory
from protocol.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"


def open_json(path: Path, *, streaming: bool) -> Rows:
    """Open a file that holds an array of objects, or one object per line.

    Raises DataError for a file that is not text or is empty, and for a .json file that is not JSON.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error

    if b"\0" in head:
        raise DataError(f"{path}: holds NUL bytes, as UTF-16 does; save it as UTF-8 text")
    head = head.lstrip(_BOM + b" \t\r\n")
    if not head:
        raise DataError(f"{path}: the file is empty; it must hold rows")

    document = path.suffix.lower() == ".json"
    rows = _document(path, required=document) if head.startswith(b"[") else None
    if rows is None:
        return _lines(path, streaming=streaming, strict=document)

    return in_memory(str(path), [_row(row, f"row {number}") for number, row in enumerate(rows)])


def _document(path: Path, *, required: bool) -> list[Json] | None:
    """Return the array that the whole file is; None if it is something else, unless `required`."""
    try:
        found = json.loads(path.read_bytes().removeprefix(_BOM).decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        if required:
            raise DataError(f"{path}: malformed JSON: {error}; fix the file") from error
        return None

    # In a JSONL file, an array of anything but objects is one line, and so a bad row.
    if not required and not all(isinstance(item, dict) for item in found):
        return None
    return found


def _lines(path: Path, *, streaming: bool, strict: bool) -> Rows:
    """Open a file of one object per line; `strict` refuses the file at a line that is not one."""

    def parsed(number: int, line: bytes) -> ReadRow:
        row = _line(f"{path.name}, line {number}", line)
        if strict and isinstance(row, RowError):
            raise DataError(
                f"{path.parent / row.reason}; every line must be one object, or the file one array"
            )
        return row

    def scan(start: int) -> Iterator[ReadRow]:
        with path.open("rb") as file:
            filled = ((number, line) for number, line in enumerate(file, 1) if _filled(line))
            for number, line in islice(filled, start, None):
                yield parsed(number, line)

    columns = columns_of(scan(0))
    if streaming:
        return Rows(str(path), columns, scan)

    offsets, numbers = array("Q"), array("Q")  # bytes, lines from 1
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if _filled(line):
                offsets.append(offset)
                numbers.append(number)
            offset += len(line)

    def get(index: int) -> ReadRow:
        with path.open("rb") as file:
            file.seek(offsets[index])
            return parsed(numbers[index], file.readline())

    return Rows(str(path), columns, scan, get, len(offsets))


def _filled(line: bytes) -> bool:
    return bool(line.removeprefix(_BOM).strip())


def _line(where: str, line: bytes) -> ReadRow:
    try:
        text = line.removeprefix(_BOM).decode("utf-8", "surrogatepass")
        return _row(json.loads(text.rstrip("\r\n")), where)
    except json.JSONDecodeError as error:
        reason = f"{where} is malformed JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # not UTF-8; too many digits or brackets
        reason = f"{where} is malformed JSON: {error}"
    return RowError("malformed", reason)


def _row(value: Json, where: str) -> ReadRow:
    if isinstance(value, dict):
        return cast("Row", value)
    return RowError("malformed", f"{where} is {type(value).__name__}; it must be an object")
