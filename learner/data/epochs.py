"""Examples in order, epoch after epoch, from memory or from a stream, with exact resume."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from learner.data.filter import Sieve, require_some, stream_epoch
from learner.data.order import IndexArray, epoch_order
from learner.data.rows import Raw, Rows
from protocol.config.settings import DataSettings
from protocol.errors import CheckpointError, DataError

log = logging.getLogger("pippin.data")

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class FeedState(msgspec.Struct, frozen=True, kw_only=True):
    """Where a feed stands: `taken` rows into `epoch`. `given`: examples of the rows from there on
    that were given already. What guards against other data ("" in older checkpoints, which are
    not checked for it): `size` (-1: a stream), `rows`, a digest of the examples in the file's
    order, and `order`, in words, all that decides the order."""

    epoch: int = 0
    taken: int = 0
    size: int = -1
    given: int = 0
    rows: str = ""
    order: str = ""


class Feed(Protocol[T_co]):
    """Examples epoch after epoch; `next` gives None once at the end of each epoch."""

    size: int

    def next(self) -> T_co | None: ...
    def state(self) -> FeedState: ...
    def restore(self, state: FeedState) -> None: ...


class ListFeed(Generic[T]):
    """A feed over examples in memory.

    `batch_size` serves the order "length_grouped", and "torch_randperm" with `repeat_sampler`: as
    TRL's RepeatSampler (GRPO), one generator for all epochs, and no row that does not fill a batch.
    """

    def __init__(
        self,
        examples: list[T],
        settings: DataSettings,
        *,
        seed: int,
        batch_size: int,
        length: Callable[[T], int],
        repeat_sampler: bool = False,
    ) -> None:
        self.examples = examples
        self.size = len(examples)
        self._repeat_sampler = repeat_sampler and settings.order == "torch_randperm"
        if self._repeat_sampler:
            self.size -= len(examples) % batch_size
            if not self.size:
                raise DataError(
                    f'data.order = "torch_randperm" leaves out rows that do not fill a batch, as '
                    f"TRL does: {len(examples)} rows are fewer than train.batch_size = "
                    f'{batch_size}; lower it, or use "shuffled"'
                )
        self._settings = settings
        self._seed = seed
        self._batch_size = batch_size
        self._lengths = [length(example) for example in examples]
        self._rows = _digest(examples)
        self._words = f"{settings.order}, run.seed {seed}"
        if settings.order == "length_grouped" or self._repeat_sampler:
            self._words += f", train.batch_size {batch_size}"
        self._epoch = 0
        self._taken = 0
        self._orders: dict[int, IndexArray] = {}

    def order(self, epoch: int) -> IndexArray:
        """Return the places in `examples` that an epoch visits, in its order."""
        if epoch not in self._orders:
            self._orders = {
                epoch: epoch_order(
                    self._settings.order,
                    len(self.examples),
                    seed=self._seed,
                    epoch=epoch,
                    lengths=self._lengths,
                    batch_size=self._batch_size,
                    one_generator=self._repeat_sampler,
                )[: self.size]
            }
        return self._orders[epoch]

    def at(self, epoch: int, place: int) -> T:
        """Return the example at a place of an epoch."""
        return self.examples[int(self.order(epoch)[place])]

    def next(self) -> T | None:
        """Return the next example, or None at the end of an epoch."""
        if self._taken == self.size:
            self._epoch, self._taken = self._epoch + 1, 0
            return None
        self._taken += 1
        return self.at(self._epoch, self._taken - 1)

    def state(self) -> FeedState:
        """Where the next example comes from."""
        return FeedState(
            epoch=self._epoch,
            taken=self._taken,
            size=self.size,
            rows=self._rows,
            order=self._words,
        )

    def restore(self, state: FeedState) -> None:
        """Go on from `state`; raises CheckpointError if it is of another dataset."""
        if state.size != self.size:
            raise CheckpointError(
                f"the checkpoint was made with {state.size} usable rows, the dataset now has "
                f"{self.size}; give the same data to resume (-1 stands for a stream)"
            )
        if state.rows not in ("", self._rows):
            raise CheckpointError(
                f"the checkpoint was made with {state.size} other rows, or with these in another "
                "order or cut otherwise; give the same data and data settings to resume"
            )
        _require_order(state, self._words)
        self._epoch, self._taken = state.epoch, state.taken


def _digest(examples: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(msgspec.msgpack.encode(example))
    return digest.hexdigest()


def _require_order(state: FeedState, words: str) -> None:
    """Refuse another order: rows would be trained on twice, and others never."""
    if state.order not in ("", words):
        raise CheckpointError(
            f"the checkpoint is in the midst of rows in this order: {state.order}; this run's is: "
            f"{words}; resume with the same data.order and the same settings that decide it"
        )


class StreamFeed(Generic[T]):
    """A feed over a stream: rows are read, shuffled in a finite buffer and tokenised as needed.

    Resuming reads the rows before the place again, without tokenising them. The report's counts
    start anew. Rows that are dropped are logged as they come, in the first pass.
    """

    size = -1

    def __init__(
        self, rows: Rows, sieve: Sieve[T], settings: DataSettings, *, seed: int, skip: int
    ) -> None:
        self._rows = rows
        self._sieve = sieve
        self._settings = settings
        self._seed = seed
        self._skip = skip
        self._words = f"{settings.order}, after {skip} held-out rows"
        if settings.order == "shuffled":
            self._words += f", run.seed {seed}, data.shuffle_buffer {settings.shuffle_buffer}"
        self._epoch = 0
        self._taken = 0
        self._resumed = False  # in the midst of this pass
        self._source: Iterator[tuple[int, Raw]] | None = None

    def next(self) -> T | None:
        """Return the next example, or None at the end of an epoch; refuse an empty stream."""
        if self._source is None:
            self._source = islice(self._open(), self._taken, None)
        report = self._sieve.report
        for number, raw in self._source:
            self._taken += 1
            said = len(report.dropped_rows)
            example = self._sieve(number, raw)
            if self._epoch == 0:  # nothing of a stream is known at the start
                for bad in report.dropped_rows[said:]:
                    log.info("    row %d: %s; dropped from the stream", bad.row, bad.reason)
            if example is not None:
                return example
        if not self._resumed:  # the report is of less than a pass then, or of nothing
            require_some(self._sieve.report)
        self._resumed = False
        if self._taken == 0:
            raise DataError(
                f"{self._rows.name}: the stream gave no row in pass {self._epoch + 1}, though it "
                "did before; make it one that can be read again, or lower train.max_steps"
            )
        self._epoch, self._taken, self._source = self._epoch + 1, 0, None
        return None

    def _open(self) -> Iterator[tuple[int, Any]]:
        return stream_epoch(
            self._rows, self._settings, skip=self._skip, seed=self._seed, epoch=self._epoch
        )

    def state(self) -> FeedState:
        """Where the next example comes from."""
        return FeedState(epoch=self._epoch, taken=self._taken, order=self._words)

    def restore(self, state: FeedState) -> None:
        """Go on from `state`; raises CheckpointError if it is of another dataset."""
        if state.size != -1:
            raise CheckpointError(
                f"the checkpoint was made with {state.size} rows in memory, but data.streaming "
                "is on; resume with the same data settings"
            )
        _require_order(state, self._words)
        self._epoch, self._taken, self._source = state.epoch, state.taken, None
        self._resumed = state.taken > 0
