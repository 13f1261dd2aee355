"""Turns rows into examples; unusable rows are left out, and reported by number and reason."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from learner.data.order import Places
from learner.data.prepare import Preparation
from learner.data.rows import ReadRow, Row, RowError
from protocol.errors import DataError

log = logging.getLogger("pippin.data")
row_log = logging.getLogger("pippin.data.rows")  # one line per row: a display may show only a few

T = TypeVar("T")
Policy = Literal["drop", "error"]  # for rows that cannot be used

_LISTED = 1000  # rows named in a report; beyond that they are only counted
_LISTED_IN_ERROR = 5  # per reason, if no row is left


@dataclass(frozen=True)
class BadRow:
    """A row, counted from 0, that was dropped, and why."""

    row: int
    kind: str
    reason: str


@dataclass
class Report:
    """What became of the rows that were read. Counts are complete; lists hold the first 1,000."""

    name: str
    kept: int = 0
    left_out: int = 0  # by the user's prepare function
    dropped: Counter[str] = field(default_factory=Counter[str])
    dropped_rows: list[BadRow] = field(default_factory=list[BadRow])
    truncated: int = 0
    truncated_rows: list[int] = field(default_factory=list[int])
    identical: int = 0  # kept pairs whose two answers have the same tokens
    identical_rows: list[int] = field(default_factory=list[int])

    def note_dropped(self, row: int, error: RowError) -> None:
        """Count a row that cannot be used."""
        self.dropped[error.kind] += 1
        if len(self.dropped_rows) < _LISTED:
            self.dropped_rows.append(BadRow(row, error.kind, error.reason))

    def note_truncated(self, row: int) -> None:
        """Count a row that was cut to data.max_length."""
        self.truncated += 1
        if len(self.truncated_rows) < _LISTED:
            self.truncated_rows.append(row)

    def note_identical(self, row: int) -> None:
        """Count a kept pair whose two answers have the same tokens."""
        self.identical += 1
        if len(self.identical_rows) < _LISTED:
            self.identical_rows.append(row)

    def log(self, *, listed: int = _LISTED) -> None:
        """Log the summary, and a line for `listed` of the rows dropped for each reason."""
        for logger, line in self._lines(listed):
            logger.info(line)

    def lines(self, *, listed: int = _LISTED) -> list[str]:
        """Return the lines that `log` writes."""
        return [line for _, line in self._lines(listed)]

    def _lines(self, listed: int) -> Iterator[tuple[logging.Logger, str]]:
        counts = f"{self.kept} rows kept, {sum(self.dropped.values())} dropped"
        yield log, f"{self.name}: {counts}, {self.truncated} truncated"
        if self.left_out:
            yield log, f"  {self.left_out} left out by data.prepare"

        for kind, count in sorted(self.dropped.items()):
            yield log, f"  dropped for {kind}: {count}"
            for bad in [bad for bad in self.dropped_rows if bad.kind == kind][:listed]:
                yield row_log, f"    row {bad.row}: {bad.reason}"

        for words, count, numbers in (
            ("truncated", self.truncated, self.truncated_rows),
            ("chosen and rejected are identical", self.identical, self.identical_rows),
        ):
            if count:
                more = " …" if count > _LISTED else ""
                yield log, f"  {words}: rows {', '.join(map(str, numbers))}{more}"


@dataclass(frozen=True)
class Builder(Generic[T]):
    """How the examples of one row are built, for one kind of example.

    `build(number, row, report)` returns the row's examples, with None in place of one that cannot
    be used, and raises RowError if none can. `columns`: those that it reads; None: any.
    `rows_per_block`: see `in_blocks`. `policies`: for kinds of RowError that `on_bad_row` does not
    govern, the key of `[data]` that does, and its value.
    """

    build: Callable[[int, Row, Report], Places[T]]
    columns: tuple[str, ...] | None = None
    rows_per_block: int = 1
    policies: Mapping[str, tuple[str, Policy]] = field(
        default_factory=dict[str, tuple[str, Policy]]
    )


@dataclass
class RowFilter(Generic[T]):
    """Prepares rows and builds their examples; notes in `report` what is left out."""

    prepare: Preparation
    builder: Builder[T]
    report: Report
    on_bad_row: Policy

    def __call__(self, number: int, read: ReadRow) -> Places[T] | None:
        """Return a row's examples; None if it is left out or dropped.

        Raises DataError for a bad row if the settings say "error".
        """
        try:
            if isinstance(read, RowError):
                raise read
            row = self.prepare(read)
            if row is None:
                self.report.left_out += 1
                return None
            examples = self.builder.build(number, row, self.report)
        except RowError as error:
            default = ("on_bad_row", self.on_bad_row)
            key, policy = self.builder.policies.get(error.kind, default)
            if policy == "error":
                raise DataError(
                    f"{self.report.name}: row {number} (counted from 0): {error.reason}; fix it, "
                    f'or set data.{key} = "drop"'
                ) from error
            self.report.note_dropped(number, error)
            return None

        self.report.kept += 1
        return examples

    def keep(self, numbered: Iterable[tuple[int, ReadRow]]) -> Iterator[tuple[int, Places[T]]]:
        """Yield the numbers and the examples of the rows that can be used."""
        for number, read in numbered:
            examples = self(number, read)
            if examples is not None:
                yield number, examples


def require_some(report: Report) -> None:
    """Raise DataError if no row can be used."""
    if report.kept:
        return

    seen = sum(report.dropped.values()) + report.left_out
    found = "it has no rows" if not seen else f"none of {seen} rows can be used"
    lines = report.lines(listed=_LISTED_IN_ERROR)
    raise DataError("\n".join([f"{report.name}: {found}; nothing to train on", *lines]))
