"""Opens a dataset: reads and filters its rows, holds some out, and puts the rest in batches.

Prompts and every kind of offline example are opened by `open_sets`; a `Builder` says what is built
from a row.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Generic

import msgspec

from learner.data.dataset import open_rows
from learner.data.epochs import EpochIterator, EpochState, ListEpochs, T
from learner.data.filter import Builder, Report, RowFilter, log, require_some
from learner.data.order import Places, epoch_order, in_blocks
from learner.data.prepare import column_notes, preparation
from learner.data.rows import ReadRow, Rows
from learner.data.streams import StreamEpochs
from protocol.config.settings import DataSettings, ExampleData, GrpoData
from protocol.errors import DataError

_HELD_OUT_SEED = 0  # fixed, so that runs with different seeds are evaluated on the same rows


@dataclass(frozen=True)
class Sets(Generic[T]):
    """Training examples in order, epoch after epoch, and held-out ones, never trained on.

    `report` is about the rows that are trained on.
    """

    train: EpochIterator[T]
    held_out: list[T]
    report: Report


class BatchesState(msgspec.Struct, frozen=True, kw_only=True):
    """Where the next batch comes from: the place in the epochs, and the batches before it."""

    place: EpochState
    given: int


class Batches(Generic[T]):
    """Batches of `batch_size` examples in a deterministic order, with exact resume.

    The last batch of an epoch may be smaller. Ends after `max_batches`, else after `num_epochs`
    (part of an epoch means that part of its batches, rounded up; of a stream, all of them), else
    never. `evaluation`: the held-out examples. `report` says which rows were left out; that of a
    stream grows as it is read.
    """

    def __init__(
        self,
        sets: Sets[T],
        *,
        batch_size: int,
        num_epochs: float | None,
        max_batches: int | None = None,
    ) -> None:
        self.report = sets.report
        self.epochs = sets.train
        self.evaluation = sets.held_out
        self.batch_size = batch_size
        self._num_epochs = num_epochs
        self._max_batches = max_batches
        self._returned = 0

    @property
    def total(self) -> int | None:
        """Number of batches; None if endless, or unknown before a stream ends."""
        if self._max_batches is not None:
            return self._max_batches
        if self._num_epochs is None or self.epochs.size is None:
            return None
        return math.ceil(self._num_epochs * math.ceil(self.epochs.size / self.batch_size))

    def next_batch(self) -> list[T] | None:
        """Return the next batch, or None after the last."""
        while not self._over():
            # At the end of an epoch `next` returns None, so that a batch is of one epoch.
            batch = list(islice(iter(self.epochs.next, None), self.batch_size))
            if batch:
                self._returned += 1
                return batch
        return None

    def _over(self) -> bool:
        total = self.total
        if total is not None:
            return self._returned >= total
        return self._num_epochs is not None and self.epochs.state().epoch >= self._num_epochs

    def state(self) -> bytes:
        """Return what a resume needs."""
        return msgspec.msgpack.encode(BatchesState(place=self.epochs.state(), given=self._returned))

    def restore(self, data: bytes) -> None:
        """Continue from `state`; raises CheckpointError if it belongs to other data."""
        state = msgspec.msgpack.decode(data, type=BatchesState)
        self.epochs.restore(state.place)
        self._returned = state.given


def open_sets(
    settings: DataSettings,
    builder: Builder[T],
    *,
    seed: int,
    batch_size: int,
    held_out_builder: Builder[T] | None = None,
    repeat_sampler: bool = False,
) -> Sets[T]:
    """Open the examples that `settings` name and `builder` makes; log what was dropped, and why.

    `held_out_builder`, if given, makes the held-out examples instead. For `batch_size` and
    `repeat_sampler` see `ListEpochs`. Streams are built as they are read. Raises DataError: see
    `open_rows`, for bad rows if the settings refuse them, and if no usable row is left.
    """
    rows = open_rows(settings)
    for note in column_notes(settings, rows, builder.columns):
        log.info(note)
    row_filter = _filter(settings, rows, builder)
    held_out_filter = replace(row_filter, builder=held_out_builder or builder)  # the same report

    # Held-out examples come from another dataset or split, or from the training rows.
    held_out = _from_other_rows(settings, held_out_builder or builder)
    count = settings.eval_rows if held_out is None else 0
    if rows.length is None:
        taken, skip = _first(held_out_filter, enumerate(rows.scan(0)), count)
        train = StreamEpochs(rows, row_filter, settings, seed=seed, skip=skip)
        row_filter.report.kept = 0  # count training rows only
    else:
        taken, numbers = _hold_out(held_out_filter, rows, count)
        row_filter.report.kept = 0
        numbered = rows.pick(_capped(numbers, settings, seed))
        examples = in_blocks(row_filter.keep(numbered), builder.rows_per_block)
        require_some(row_filter.report)
        train = ListEpochs(
            examples, settings, seed=seed, batch_size=batch_size, repeat_sampler=repeat_sampler
        )
        row_filter.report.log()

    places = taken if held_out is None else held_out
    return Sets(train, in_blocks(enumerate(places), builder.rows_per_block), row_filter.report)


def _filter(settings: DataSettings, rows: Rows, builder: Builder[T]) -> RowFilter[T]:
    prepare = preparation(settings, rows)
    return RowFilter(prepare, builder, Report(rows.name), settings.on_bad_row)


def _from_other_rows(settings: DataSettings, builder: Builder[T]) -> list[Places[T]] | None:
    """Return the examples of `eval_path` or `eval_split`, of `eval_rows` rows at most if set.

    None if neither is set.
    """
    # launch/pairs.py evaluates nothing, so its settings have neither.
    if not isinstance(settings, GrpoData | ExampleData):
        return None
    if not settings.eval_path and not settings.eval_split:
        return None

    rows = open_rows(settings, path=settings.eval_path, split=settings.eval_split or "train")
    row_filter = _filter(settings, rows, builder)
    kept = row_filter.keep(enumerate(rows.scan(0)))
    places = [examples for _, examples in islice(kept, settings.eval_rows or None)]

    require_some(row_filter.report)
    row_filter.report.log()
    return places


def _hold_out(
    row_filter: RowFilter[T], rows: Rows, count: int
) -> tuple[list[Places[T]], Sequence[int]]:
    """Return `count` held-out rows' examples, and the numbers of the other rows."""
    length = rows.length or 0
    if count == 0:
        return [], range(length)

    order = epoch_order("shuffled", length, seed=_HELD_OUT_SEED, epoch=0).tolist()
    held_out, used = _first(row_filter, rows.pick(order), count)
    if used == length:
        raise DataError(
            f"{rows.name}: data.eval_rows = {count} takes all {used} rows, and leaves none to "
            "train on; hold fewer out"
        )
    return held_out, sorted(order[used:])


def _first(
    row_filter: RowFilter[T], numbered: Iterable[tuple[int, ReadRow]], count: int
) -> tuple[list[Places[T]], int]:
    """Return the examples of the first `count` usable rows, and how many rows were read."""
    found: list[Places[T]] = []
    if count == 0:
        return found, 0

    for used, (number, read) in enumerate(numbered, 1):
        examples = row_filter(number, read)
        if examples is not None:
            found.append(examples)
        if len(found) == count:
            return found, used
    raise DataError(
        f"{row_filter.report.name}: data.eval_rows = {count}, but only {len(found)} rows can be "
        "used"
    )


def _capped(numbers: Sequence[int], settings: DataSettings, seed: int) -> Sequence[int]:
    """Return at most `max_rows` of the numbers: random ones, unless the order is sequential."""
    if settings.max_rows is None or settings.max_rows >= len(numbers):
        return numbers
    kind = "sequential" if settings.order == "sequential" else "shuffled"
    order: list[int] = epoch_order(kind, len(numbers), seed=seed, epoch=-1).tolist()
    return [numbers[index] for index in sorted(order[: settings.max_rows])]
