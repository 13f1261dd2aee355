"""Rows to examples: what cannot be used is left out, and reported by row number and reason."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from learner.data.order import buffered_shuffle, epoch_order
from learner.data.prepare import Preparation
from learner.data.rows import Raw, RawRow, Rows
from learner.data.tokens import RowError
from protocol.config.settings import DataSettings
from protocol.errors import DataError

T = TypeVar("T")

_LISTED = 1000  # rows named in a report; beyond, they are counted only
_LISTED_IN_ERROR = 5  # of each reason, where no row is left
_HELD_OUT_SEED = 0  # fixed, so that runs with different seeds are evaluated on the same rows


@dataclass(frozen=True)
class BadRow:
    """A row, counted from 0, that was dropped or truncated, and why."""

    row: int
    kind: str
    reason: str


@dataclass
class Report:
    """What became of the rows that were read. Counts are complete; lists hold the first 1,000."""

    name: str
    kept: int = 0
    left_out: int = 0  # by the user's prepare function
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_rows: list[BadRow] = field(default_factory=list)
    truncated: int = 0
    truncated_rows: list[int] = field(default_factory=list)
    alike: int = 0
    alike_rows: list[int] = field(default_factory=list)

    def drop(self, row: int, error: RowError) -> None:
        """Note a row that cannot be used."""
        self.dropped[error.kind] += 1
        if len(self.dropped_rows) < _LISTED:
            self.dropped_rows.append(BadRow(row, error.kind, error.reason))

    def truncate(self, row: int) -> None:
        """Note a row that was cut to the limit."""
        self.truncated += 1
        if len(self.truncated_rows) < _LISTED:
            self.truncated_rows.append(row)

    def same(self, row: int) -> None:
        """Note a kept pair whose answers have the same tokens."""
        self.alike += 1
        if len(self.alike_rows) < _LISTED:
            self.alike_rows.append(row)

    def lines(self, listed: int = _LISTED) -> list[str]:
        """Describe the rows for a log: a summary, then lines for `listed` rows of each reason."""
        total = sum(self.dropped.values())
        lines = [f"{self.name}: {self.kept} rows kept, {total} dropped, {self.truncated} truncated"]
        if self.left_out:
            lines.append(f"  {self.left_out} left out by data.prepare")
        for kind, count in sorted(self.dropped.items()):
            lines.append(f"  dropped for {kind}: {count}")
            rows = [b for b in self.dropped_rows if b.kind == kind][:listed]
            lines += [f"    row {b.row}: {b.reason}" for b in rows]
        for words, count, numbers in (
            ("truncated", self.truncated, self.truncated_rows),
            ("nothing to prefer, chosen and rejected are alike", self.alike, self.alike_rows),
        ):
            if count:
                more = " …" if count > _LISTED else ""
                lines.append(f"  {words}: rows {', '.join(map(str, numbers))}{more}")
        return lines


@dataclass
class Sieve(Generic[T]):
    """Builds the example of one row, or notes in `report` why there is none.

    `policies` says, for a kind of RowError, whether the row is dropped or ends the run; other kinds
    follow `on_bad_row`.
    """

    prepare: Preparation
    build: Callable[[int, RawRow, Report], T]
    report: Report
    on_bad_row: Literal["drop", "error"]
    policies: dict[str, Literal["drop", "error"]] = field(default_factory=dict)

    def __call__(self, number: int, raw: Raw) -> T | None:
        try:
            if isinstance(raw, RowError):
                raise raw
            row = self.prepare(raw)
            if row is None:
                self.report.left_out += 1
                return None
            example = self.build(number, row, self.report)
        except RowError as error:
            if self.policies.get(error.kind, self.on_bad_row) == "error":
                setting = "overlong_prompts" if error.kind in self.policies else "on_bad_row"
                raise DataError(
                    f"{self.report.name}: row {number} (counted from 0): {error.reason}; mend it, "
                    f'or set data.{setting} = "drop"'
                ) from error
            self.report.drop(number, error)
            return None
        self.report.kept += 1
        return example


def require_some(report: Report) -> None:
    """Refuse a dataset of which no row is left."""
    if report.kept:
        return
    seen = sum(report.dropped.values()) + report.left_out
    found = "it has no rows" if not seen else f"none of {seen} rows can be used"
    lines = report.lines(listed=_LISTED_IN_ERROR)
    raise DataError("\n".join([f"{report.name}: {found}; nothing to train on", *lines]))


@dataclass(frozen=True)
class Split(Generic[T]):
    """Training examples in the file's order, and held-out ones. `skip`: rows of a stream that the
    held-out examples came from."""

    train: list[T]
    held_out: list[T]
    skip: int = 0


def read_split(
    rows: Rows,
    sieve: Sieve[T],
    settings: DataSettings,
    *,
    seed: int,
    keeping: Sieve[T] | None = None,
) -> Split[T]:
    """Read all rows of a set that has a length: held-out rows first, then the capped rest.

    Held-out rows do not depend on `seed`; `keeping`, if given, builds their examples in place of
    `sieve`, whose report it shares. A cap under a shuffled order takes random rows.
    """
    keeping = keeping or sieve
    if rows.length is None:
        held_out, skip = _first(keeping, enumerate(rows.scan(0)), settings.eval_rows)
        sieve.report.kept = 0  # of the training rows
        return Split([], held_out, skip)
    rest = range(rows.length)
    held_out: list[T] = []
    if settings.eval_rows:
        order = epoch_order("shuffled", rows.length, seed=_HELD_OUT_SEED, epoch=0).tolist()
        held_out, used = _first(keeping, picked(rows, order), settings.eval_rows)
        rest = sorted(order[used:])
        if not rest:
            raise DataError(
                f"{rows.name}: data.eval_rows = {settings.eval_rows} takes all {used} rows, and "
                "leaves none to train on; hold fewer out"
            )
    if settings.max_rows is not None and settings.max_rows < len(rest):
        kind = "sequential" if settings.order == "sequential" else "shuffled"
        order = epoch_order(kind, len(rest), seed=seed, epoch=-1)[: settings.max_rows]
        rest = [rest[index] for index in sorted(order.tolist())]
    sieve.report.kept = 0  # of the training rows
    return Split(list(kept(sieve, picked(rows, rest))), held_out)


def _first(sieve: Sieve[T], numbered: Iterable[tuple[int, Raw]], count: int) -> tuple[list[T], int]:
    """Return the first `count` usable examples, and how many rows they took."""
    examples: list[T] = []
    used = 0
    if count == 0:
        return examples, used
    for number, raw in numbered:
        used += 1
        example = sieve(number, raw)
        if example is not None:
            examples.append(example)
        if len(examples) == count:
            return examples, used
    raise DataError(
        f"{sieve.report.name}: data.eval_rows = {count}, but only {len(examples)} rows can be used"
    )


def picked(rows: Rows, numbers: Iterable[int]) -> Iterator[tuple[int, Raw]]:
    """Rows by number, with their numbers."""
    get = rows.get
    if get is None:
        raise TypeError(f"{rows.name} is a stream: its rows cannot be picked by number")
    return ((number, get(number)) for number in numbers)


def kept(sieve: Sieve[T], numbered: Iterable[tuple[int, Raw]]) -> Iterator[T]:
    """Yield the examples of the rows that can be used."""
    for number, raw in numbered:
        example = sieve(number, raw)
        if example is not None:
            yield example


def stream_epoch(
    rows: Rows, settings: DataSettings, *, skip: int, seed: int, epoch: int
) -> Iterator[tuple[int, Raw]]:
    """One pass over a stream after its held-out rows: capped, then shuffled in a finite buffer."""

    def numbered() -> Iterator[tuple[int, Any]]:
        for taken, raw in enumerate(rows.scan(skip)):
            if settings.max_rows is not None and taken >= settings.max_rows:
                return
            yield skip + taken, raw

    if settings.order == "sequential":
        return numbered()
    if settings.order != "shuffled":
        raise DataError(
            f'data.order = "{settings.order}" needs the whole dataset; for a streamed one use '
            '"shuffled" (in a buffer of data.shuffle_buffer rows) or "sequential"'
        )
    return buffered_shuffle(numbered(), settings.shuffle_buffer, seed=seed, epoch=epoch)
