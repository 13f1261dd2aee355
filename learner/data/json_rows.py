"""Local JSON and JSONL files as rows, one by one, read without Arrow.

Arrow fills missing columns, unifies types and drops lone surrogates: a bad row would be repaired
in silence instead of being reported. A line of a JSONL file that is no JSON object is a bad row
like any other; a .json file is one document, which is whole or is refused.
"""

import json
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from learner.data.rows import Raw, Rows, columns_of
from learner.data.tokens import RowError
from protocol.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"


def open_json(path: Path, *, streaming: bool) -> Rows:
    """Open a file: an array of objects, or one object a line.

    Raises DataError for one that is no text, is empty, or is a .json file and not JSON.
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
    items = [_row(row, f"row {number}") for number, row in enumerate(rows)]
    return Rows(
        str(path),
        columns_of(items),
        lambda start: (_copied(item) for item in islice(items, start, None)),
        lambda index: _copied(items[index]),
        len(items),
    )


def _document(path: Path, *, required: bool) -> list[Any] | None:
    """Return the array that the whole file is; None if it is something else, unless `required`."""
    try:
        found = json.loads(path.read_bytes().removeprefix(_BOM).decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        if required:
            raise DataError(f"{path}: malformed JSON: {error}; mend the file") from error
        return None
    lone = not required and not all(isinstance(item, dict) for item in found)
    return None if lone else found  # of a JSONL file it is a line, and a bad one


def _copied(row: Raw) -> Raw:
    return dict(row) if isinstance(row, dict) else row


def _lines(path: Path, *, streaming: bool, strict: bool) -> Rows:
    """Open one object a line; `strict` refuses the file at a line that is none."""

    def parsed(number: int, line: bytes) -> Raw:
        row = _line(f"{path.name}, line {number}", line)
        if strict and isinstance(row, RowError):
            raise DataError(
                f"{path.parent / row.reason}; every line must be one object, or the file one array"
            )
        return row

    def scan(start: int) -> Iterator[Raw]:
        with path.open("rb") as file:
            filled = ((number, line) for number, line in enumerate(file, 1) if _filled(line))
            for number, line in islice(filled, start, None):
                yield parsed(number, line)

    columns = columns_of(scan(0))
    if streaming:
        return Rows(str(path), columns, scan)
    offsets, numbers = _line_index(path)

    def get(index: int) -> Raw:
        with path.open("rb") as file:
            file.seek(offsets[index])
            return parsed(numbers[index], file.readline())

    return Rows(str(path), columns, scan, get, len(offsets))


def _line_index(path: Path) -> tuple["array[int]", "array[int]"]:
    """Byte offsets and line numbers (from 1) of the lines that hold something."""
    offsets, numbers = array("Q"), array("Q")
    at = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if _filled(line):
                offsets.append(at)
                numbers.append(number)
            at += len(line)
    return offsets, numbers


def _filled(line: bytes) -> bool:
    return bool(line.removeprefix(_BOM).strip())


def _line(where: str, line: bytes) -> Raw:
    try:
        text = line.removeprefix(_BOM).decode("utf-8", "surrogatepass")
        return _row(json.loads(text.rstrip("\r\n")), where)
    except json.JSONDecodeError as error:
        reason = f"{where} is malformed JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # not UTF-8; too many digits or brackets
        reason = f"{where} is malformed JSON: {error}"
    return RowError("malformed", reason)


def _row(value: Any, where: str) -> Raw:  # noqa: ANN401 - what JSON can hold
    if isinstance(value, dict):
        return value
    return RowError("malformed", f"{where} is {type(value).__name__}; it must be an object")
