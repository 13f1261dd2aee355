"""Batches of examples from datasets: pairs, judged answers, or plain sequences."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, overload

import msgspec

from learner.data.dataset import open_rows
from learner.data.epochs import Feed, FeedState, ListFeed, StreamFeed
from learner.data.examples import AnswerBuild, Build, E, UnpairedExample, with_rows
from learner.data.filter import Report, Sieve, kept, read_split, require_some
from learner.data.prepare import PAIR_COLUMNS, column_notes, preparation
from learner.data.rows import Rows
from learner.data.unpaired import UnpairedFeed, in_blocks, in_file_blocks
from protocol.config.settings import ExampleData
from protocol.errors import ConfigError

log = logging.getLogger("pippin.data")


class OfflineState(msgspec.Struct, frozen=True, kw_only=True):
    """Position of an OfflineSource, for a checkpoint."""

    feed: FeedState
    steps: int


class OfflineSource(Generic[E]):
    """Batches of `batch_size` examples in a deterministic order, with exact resume.

    The last batch of an epoch holds what is left. Ends after `max_steps` batches if positive, else
    after `epochs` (part of an epoch: that part of its batches, rounded up).
    """

    def __init__(
        self,
        feed: Feed[E],
        report: Report,
        *,
        batch_size: int,
        epochs: float,
        max_steps: int,
    ) -> None:
        if feed.size < 0 and max_steps <= 0 and epochs != int(epochs):
            raise ConfigError(
                f"train.num_train_epochs = {epochs} of a streamed dataset, whose length is "
                "unknown; give a whole number, or train.max_steps"
            )
        self.report = report
        self._feed = feed
        self._batch_size = batch_size
        self._epochs = epochs
        self._max_steps = max_steps
        self._steps = 0

    @property
    def streamed(self) -> bool:
        """Whether rows are read as they are needed, so that their number is not known."""
        return self._feed.size < 0

    @property
    def total_steps(self) -> int | None:
        """Batches over the whole run; None for a stream without `max_steps`."""
        if self._max_steps > 0:
            return self._max_steps
        if self._feed.size < 0:
            return None
        return math.ceil(self._epochs * math.ceil(self._feed.size / self._batch_size))

    def next_batch(self) -> list[E] | None:
        """Return the next batch, or None after the last."""
        while not self._over():
            batch = self._collect()
            if batch:
                self._steps += 1
                return batch
        return None

    def first_batches(self) -> list[list[E]]:
        """Return the batches of the first epoch, as far as the run goes.

        Raises ConfigError for a stream, whose batches are not known before they are read.
        """
        feed, places = self._first_places()
        examples = [feed.examples[place] for place in places]
        size = self._batch_size
        return [examples[start : start + size] for start in range(0, len(examples), size)]

    def replace_first(self, batches: Sequence[Sequence[E]]) -> None:
        """Put `batches` in the place of `first_batches`, example for example."""
        feed, places = self._first_places()
        examples = [example for batch in batches for example in batch]
        for place, example in zip(places, examples, strict=True):
            feed.examples[place] = example

    def _first_places(self) -> tuple[ListFeed[E], list[int]]:
        if not isinstance(self._feed, ListFeed):
            raise ConfigError(
                "data.streaming: the rows of a stream are not known before they are read; load the "
                "dataset whole, or leave objective.precompute_ref_log_probs out"
            )
        count = (self.total_steps or 0) * self._batch_size
        return self._feed, self._feed.order(0)[:count].tolist()

    def _collect(self) -> list[E]:
        """Up to a batch of one epoch; empty at its end."""
        batch: list[E] = []
        while len(batch) < self._batch_size:
            example = self._feed.next()
            if example is None:
                break
            batch.append(example)
        return batch

    def _over(self) -> bool:
        total = self.total_steps
        if total is not None:
            return self._steps >= total
        return self._feed.state().epoch >= self._epochs

    def state(self) -> OfflineState:
        """Return where the next batch comes from."""
        return OfflineState(feed=self._feed.state(), steps=self._steps)

    def restore(self, state: OfflineState) -> None:
        """Go on from `state`; raises CheckpointError if it is of another dataset."""
        self._feed.restore(state.feed)
        self._steps = state.steps


@dataclass(frozen=True)
class OfflineSets(Generic[E]):
    """Batches to train on, and held-out examples, which are never trained on."""

    train: OfflineSource[E]
    evaluation: list[E]


@overload
def open_offline(
    settings: ExampleData,
    build: AnswerBuild,
    *,
    seed: int,
    batch_size: int,
    epochs: float = 1.0,
    max_steps: int = -1,
    reads: Sequence[str] = ...,
) -> OfflineSets[UnpairedExample]: ...


@overload
def open_offline(
    settings: ExampleData,
    build: Build[E],
    *,
    seed: int,
    batch_size: int,
    epochs: float = 1.0,
    max_steps: int = -1,
    reads: Sequence[str] = ...,
) -> OfflineSets[E]: ...


def open_offline(
    settings: ExampleData,
    build: Build[Any] | AnswerBuild,
    *,
    seed: int,
    batch_size: int,
    epochs: float = 1.0,
    max_steps: int = -1,
    reads: Sequence[str] = PAIR_COLUMNS,
) -> OfflineSets[Any]:
    """Open the examples that `settings` name and `build` makes: `pairs`, `answers` or
    `sequences` of `learner/data/examples.py`. Columns beyond those that it `reads` are told.

    Held-out examples hold their rows; streams are tokenised as they are read. What was dropped or
    truncated is logged at the start and kept in the sources' `report`. Raises DataError, as
    `open_prompts` does.
    """
    rows = open_rows(settings)
    for note in column_notes(settings, rows, reads):
        log.info(note)
    sieve = _sieve(settings, rows, build)
    evaluation = _evaluation(settings, build)
    own = evaluation is not None
    split = read_split(
        rows,
        sieve,
        msgspec.structs.replace(settings, eval_rows=0) if own else settings,
        seed=seed,
        keeping=dataclasses.replace(sieve, build=with_rows(build)),
    )
    judged = isinstance(build, AnswerBuild)  # several examples a row
    feed: Any
    if rows.length is None:
        feed = StreamFeed(rows, sieve, settings, seed=seed, skip=split.skip)
        feed = UnpairedFeed(feed, settings, seed=seed) if judged else feed
    else:
        require_some(sieve.report)
        train = in_file_blocks(split.train) if judged else split.train
        feed = ListFeed(
            train, settings, seed=seed, batch_size=batch_size, length=lambda e: e.length
        )
        for line in sieve.report.lines():
            log.info(line)
    source = OfflineSource(
        feed, sieve.report, batch_size=batch_size, epochs=epochs, max_steps=max_steps
    )
    held_out = split.held_out if evaluation is None else evaluation
    return OfflineSets(source, in_blocks(held_out) if judged else held_out)


def _sieve(settings: ExampleData, rows: Rows, build: Build[Any] | AnswerBuild) -> Sieve[Any]:
    prepare = preparation(settings, rows)
    return Sieve(prepare, build, Report(rows.name), settings.on_bad_row)


def _evaluation(settings: ExampleData, build: Build[Any] | AnswerBuild) -> list[Any] | None:
    """Return what the rows of `eval_path` or `eval_split` make, at most `eval_rows` of them if set;
    None without either."""
    if not settings.eval_path and not settings.eval_split:
        return None
    split = settings.eval_split or "train"
    rows = open_rows(settings, path=settings.eval_path, split=split)
    sieve = _sieve(settings, rows, with_rows(build))
    examples: list[Any] = []
    for example in kept(sieve, enumerate(rows.scan(0))):
        examples.append(example)
        if len(examples) == settings.eval_rows:
            break
    require_some(sieve.report)
    for line in sieve.report.lines():
        log.info(line)
    return examples
