"""The rows of a dataset, wherever they come from: by number, or one after the other."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Any, TypeAlias

from learner.data.tokens import RowError

RawRow = dict[str, Any]
Raw: TypeAlias = RawRow | RowError  # a row, or why there is none in its place

_SAMPLED_ROWS = 100  # rows whose keys stand for the columns


@dataclass(frozen=True)
class Rows:
    """The rows of one split, in the file's order, counted from 0; bad ones count too.

    `scan(start)` reads lazily from row `start`. `get` and `length` are None for streams.
    `columns` are the names known without reading the whole set.
    """

    name: str
    columns: list[str]
    scan: Callable[[int], Iterator[Raw]]
    get: Callable[[int], Raw] | None = None
    length: int | None = None


def columns_of(rows: Iterable[Raw]) -> list[str]:
    """Return the columns of the first rows, in the order in which they appear."""
    known = (row for row in islice(rows, _SAMPLED_ROWS) if not isinstance(row, RowError))
    return list(dict.fromkeys(key for row in known for key in row))


def joined(name: str, parts: Sequence[Rows]) -> Rows:
    """Return the rows of several files as one set; a stream if any of them is one."""
    columns = list(dict.fromkeys(column for part in parts for column in part.columns))

    def scan(start: int) -> Iterator[Raw]:
        return islice(chain.from_iterable(part.scan(0) for part in parts), start, None)

    getters = [part.get for part in parts if part.get is not None]
    if len(getters) < len(parts):
        return Rows(name, columns, scan)
    starts = [0, *accumulate(part.length or 0 for part in parts)]

    def get(index: int) -> Raw:
        part = bisect_right(starts, index) - 1
        return getters[part](index - starts[part])

    return Rows(name, columns, scan, get, starts[-1])
