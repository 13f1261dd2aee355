"""Batches of examples until the run's end: what online prompts and offline examples share."""

import math
from typing import Generic

import msgspec

from learner.data.epochs import EpochIterator, EpochState, T
from learner.data.filter import Report


class BatchesState(msgspec.Struct, frozen=True, kw_only=True):
    """Where the next batch comes from: the place in the epochs, and how many were given."""

    place: EpochState
    given: int


class Batches(Generic[T]):
    """Batches of `batch_size` examples in a deterministic order, with exact resume.

    The last batch of an epoch holds what is left. Ends after `max_batches`, else after `num_epochs`
    (a fraction of an epoch: that part of its batches, rounded up; of a stream, a whole one), else
    never. `report` says which rows were left out; that of a stream grows as it is read.
    """

    def __init__(
        self,
        epochs: EpochIterator[T],
        report: Report,
        *,
        batch_size: int,
        num_epochs: float | None,
        max_batches: int | None = None,
    ) -> None:
        self.report = report
        self.epochs = epochs
        self.batch_size = batch_size
        self._num_epochs = num_epochs
        self._max_batches = max_batches
        self._given = 0

    @property
    def streamed(self) -> bool:
        """Whether rows are read as they are needed, so that their number is not known."""
        return self.epochs.size is None

    @property
    def total(self) -> int | None:
        """Batches in all; None without an end, or where only the stream's end would tell."""
        if self._max_batches is not None:
            return self._max_batches
        if self._num_epochs is None or self.epochs.size is None:
            return None
        return math.ceil(self._num_epochs * math.ceil(self.epochs.size / self.batch_size))

    def next_batch(self) -> list[T] | None:
        """Return the next batch, or None after the last."""
        while not self._over():
            batch = self._collect()  # empty at the end of an epoch
            if batch:
                self._given += 1
                return batch
        return None

    def _over(self) -> bool:
        total = self.total
        if total is not None:
            return self._given >= total
        return self._num_epochs is not None and self.epochs.state().epoch >= self._num_epochs

    def _collect(self) -> list[T]:
        """Return up to a batch of one epoch; nothing at its end."""
        batch: list[T] = []
        while len(batch) < self.batch_size:
            example = self.epochs.next()
            if example is None:
                break
            batch.append(example)
        return batch

    def state(self) -> bytes:
        """Return what a resume needs."""
        return msgspec.msgpack.encode(BatchesState(place=self.epochs.state(), given=self._given))

    def restore(self, data: bytes) -> None:
        """Continue from `state`; raises CheckpointError if it belongs to other data."""
        state = msgspec.msgpack.decode(data, type=BatchesState)
        self.epochs.restore(state.place)
        self._given = state.given
