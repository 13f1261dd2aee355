"""Examples of a stream, epoch after epoch."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Generic

from learner.data.epochs import EpochState, T
from learner.data.filter import RowFilter, require_some, row_log
from learner.data.order import Places, buffered_shuffle, by_place, permuted
from learner.data.rows import ReadRow, Rows
from protocol.config.settings import DataSettings
from protocol.errors import CheckpointError, DataError


class StreamEpochs(Generic[T]):
    """Epochs over a stream: rows are read, shuffled in a finite buffer and tokenised as needed.

    `skip` rows at the start are held out. Examples are built per block of rows (see `in_blocks`).
    With data.order = "shuffled" the examples of a block are shuffled too, so that KTO's good and
    bad answers are mixed. The first pass logs each row that it drops.

    Resuming rereads the rows before its block without tokenising them, and the report's counts
    start from zero. `next` raises DataError if a whole pass yields no example.
    """

    size = None
    longest = None

    def __init__(
        self, rows: Rows, row_filter: RowFilter[T], settings: DataSettings, *, seed: int, skip: int
    ) -> None:
        if settings.order not in ("sequential", "shuffled"):
            raise DataError(
                f'data.order = "{settings.order}" needs the whole dataset; for a streamed one use '
                '"shuffled" (in a buffer of data.shuffle_buffer rows) or "sequential"'
            )

        self._rows = rows
        self._filter = row_filter
        self._settings = settings
        self._seed = seed
        self._skip = skip
        self._rows_per_block = row_filter.builder.rows_per_block
        self._order_words = f"{settings.order}, after {skip} held-out rows"
        if settings.order == "shuffled":
            self._order_words += f", run.seed {seed}, data.shuffle_buffer {settings.shuffle_buffer}"

        self._epoch = 0
        self._read = 0  # rows of this epoch
        self._block_start = 0
        self._block: deque[T] = deque()
        self._given = 0  # examples of the block
        self._resumed = False  # in the middle of this epoch
        self._numbered: Iterator[tuple[int, ReadRow]] | None = None

    def next(self) -> T | None:
        while not self._block:
            if not self._read_block():
                self._end_epoch()
                return None
        self._given += 1
        return self._block.popleft()

    def _read_block(self) -> bool:
        """Read the next block; return whether the epoch still had rows."""
        if self._numbered is None:
            self._numbered = islice(self._pass(), self._read, None)

        size = self._rows_per_block
        self._block_start, self._given = self._read, 0
        kept: list[Places[T]] = []
        # Blocks begin at multiples of their size, also after rows were dropped.
        for number, read in islice(self._numbered, size - self._read % size):
            self._read += 1
            examples = self._examples(number, read)
            if examples is not None:
                kept.append(examples)

        found = by_place(kept)
        if self._settings.order == "shuffled" and size > 1:
            block = self._block_start // size + 1
            found = permuted(found, self._seed, self._epoch, 2, block)
        self._block.extend(found)
        return self._read > self._block_start

    def _examples(self, number: int, read: ReadRow) -> Places[T] | None:
        report = self._filter.report
        before = len(report.dropped_rows)
        examples = self._filter(number, read)
        if self._epoch == 0:  # later passes drop the same rows
            for bad in report.dropped_rows[before:]:
                row_log.info("    row %d: %s; dropped from the stream", bad.row, bad.reason)
        return examples

    def _end_epoch(self) -> None:
        if not self._resumed:  # otherwise the report covers a part of the pass, or nothing
            require_some(self._filter.report)
        self._resumed = False
        if self._read == 0:
            raise DataError(
                f"{self._rows.name}: the stream gave no row in pass {self._epoch + 1}, though it "
                "did before; make it one that can be read again, or lower train.max_steps"
            )
        self._epoch, self._read, self._numbered = self._epoch + 1, 0, None

    def _pass(self) -> Iterator[tuple[int, ReadRow]]:
        """Return one pass over the rows after the held-out ones, numbered."""
        rows = enumerate(self._rows.scan(self._skip), self._skip)
        capped = islice(rows, self._settings.max_rows)
        if self._settings.order == "sequential":
            return capped
        size = self._settings.shuffle_buffer
        return buffered_shuffle(capped, size, seed=self._seed, epoch=self._epoch)

    def state(self) -> EpochState:
        taken, given = (self._block_start, self._given) if self._block else (self._read, 0)
        return EpochState(epoch=self._epoch, taken=taken, given=given, order=self._order_words)

    def restore(self, state: EpochState) -> None:
        if state.size is not None:
            raise CheckpointError(
                f"the checkpoint was made with {state.size} rows in memory, but data.streaming "
                "is on; resume with the same data settings"
            )
        state.require_order(self._order_words)

        self._epoch, self._read, self._numbered = state.epoch, state.taken, None
        self._resumed = state.taken > 0
        self._block.clear()
        if state.given:
            self._read_block()
            for _ in range(state.given):
                self._block.popleft()
            self._given = state.given
