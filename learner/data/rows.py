"""The rows of a dataset: how they are read, and the error of a row that cannot be used."""

import datetime
import decimal
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Any, TypeAlias, cast

import numpy as np

from protocol.errors import DataError

Json: TypeAlias = Any  # a cell: whatever JSON, Arrow or the user's function puts there
Row: TypeAlias = dict[str, Any]

_SAMPLED_ROWS = 100  # rows whose keys are taken as the columns


class RowError(DataError):
    """One row that cannot be used; `kind` groups the reasons in a report."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


ReadRow: TypeAlias = Row | RowError  # a row, or why there is none in its place


@dataclass(frozen=True)
class Rows:
    """The rows of one split, in file order, counted from 0; bad rows count too.

    `scan(start)` reads lazily from row `start`. `get` and `length` are None for streams.
    `columns` are the names known without reading the whole set.
    """

    name: str
    columns: list[str]
    scan: Callable[[int], Iterator[ReadRow]]
    get: Callable[[int], ReadRow] | None = None
    length: int | None = None

    def pick(self, numbers: Iterable[int]) -> Iterator[tuple[int, ReadRow]]:
        """Yield rows by number, with their numbers; raises TypeError for a stream."""
        get = self.get
        if get is None:
            raise TypeError(f"{self.name} is a stream: its rows cannot be picked by number")
        return ((number, get(number)) for number in numbers)


def columns_of(rows: Iterable[ReadRow]) -> list[str]:
    """Return the columns of the first rows, in the order in which they appear."""
    sampled = (row for row in islice(rows, _SAMPLED_ROWS) if not isinstance(row, RowError))
    return list(dict.fromkeys(key for row in sampled for key in row))


def in_memory(name: str, items: Sequence[ReadRow]) -> Rows:
    """Return rows that are all loaded."""
    return Rows(
        name,
        columns_of(items),
        lambda start: islice(items, start, None),
        items.__getitem__,
        len(items),
    )


def joined(name: str, parts: Sequence[Rows]) -> Rows:
    """Return the rows of several files as one set; a stream if any part is one."""
    columns = list(dict.fromkeys(column for part in parts for column in part.columns))

    def scan(start: int) -> Iterator[ReadRow]:
        return islice(chain.from_iterable(part.scan(0) for part in parts), start, None)

    getters = [part.get for part in parts if part.get is not None]
    if len(getters) < len(parts):
        return Rows(name, columns, scan)

    starts = [0, *accumulate(part.length or 0 for part in parts)]

    def get(index: int) -> ReadRow:
        part = bisect_right(starts, index) - 1
        return getters[part](index - starts[part])

    return Rows(name, columns, scan, get, starts[-1])


def check_text(text: str, where: str) -> str:
    """Return `text`; raise RowError for lone surrogates, which no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "invalid_text",
            f"{where} holds the lone surrogate {text[error.start]!r} at character {error.start}; "
            "text must be valid Unicode",
        ) from None
    return text


def json_row(row: Row) -> Row:
    """Return the row as JSON values: dates as ISO text, numpy values as Python's, NaN as null.

    Raises RowError naming the column that has no such form or holds a lone surrogate.
    """
    return {str(column): _json_value(value, str(column)) for column, value in row.items()}


def _json_value(value: Json, where: str) -> Json:
    match value:
        case None | bool() | int():
            return value
        case str():
            return check_text(value, where)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            items = cast("Mapping[Any, Any]", value).items()
            return {check_text(str(k), where): _json_value(v, f"{where}.{k}") for k, v in items}
        case list() | tuple():
            items = enumerate(cast("Sequence[Any]", value))
            return [_json_value(item, f"{where}[{index}]") for index, item in items]

        # What Arrow and the user's function give beyond JSON's own types.
        case np.ndarray() | np.generic():
            return _json_value(cast("np.generic", value).tolist(), where)
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal():
            return float(value)
        case datetime.timedelta():
            return value.total_seconds()
        case _:
            raise RowError(
                "unsupported",
                f"column {where} holds {type(value).__name__}, which is not JSON; convert it in "
                "data.prepare, or leave the column out there",
            )
