"""The trainer's view of offline batches, and the evaluation of held-out examples."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import mlx.core as mx
import mlx.nn as nn
import msgspec

from learner.data.examples import E
from learner.interfaces import Objective
from learner.losses.metrics import Metrics, finish_batches, merge_metrics, number
from learner.offline.batches import OfflineSource, OfflineState

log = logging.getLogger("pippin.data")


@dataclass
class StoredSource(Generic[E]):
    """Adapts `OfflineSource` to the trainer: nothing is waited for, nothing is published."""

    batches: OfflineSource[E]
    exhausted: bool = False

    def poll(self, timeout_s: float = 0.0) -> list[E] | None:
        """Return the next batch; None after the last."""
        batch = None if self.exhausted else self.batches.next_batch()
        self.exhausted = batch is None
        return batch

    def stepped(self, version: int) -> None:
        """Nothing to publish; after the last batch of a stream, say what became of its rows."""
        if version == self.batches.total_steps and self.batches.streamed:
            for line in self.batches.report.lines(listed=0):
                log.info(line)

    def figures(self) -> dict[str, float]:
        """Return the epochs that the batches have come to; of a stream, the whole ones."""
        feed = self.batches.state().feed
        return {"epoch": feed.epoch + (feed.taken / feed.size if feed.size > 0 else 0.0)}

    def state(self) -> bytes:
        """Return the position in the dataset."""
        return msgspec.msgpack.encode(self.batches.state())

    def restore(self, data: bytes) -> None:
        """Go on from a checkpoint's position."""
        self.batches.restore(msgspec.msgpack.decode(data, type=OfflineState))


@dataclass
class StoredEvaluator(Generic[E]):
    """Runs the objective over held-out examples, without a gradient, as training would.

    Metrics are means over all that was counted, as one batch of all examples would have them; the
    loss is the mean of the batches', weighted by rows, as TRL's.

    `answers`, if given, also answers their prompts: metrics and lines for rollouts.jsonl.
    """

    model: nn.Module
    objective: Objective[list[E], Any]
    examples: Sequence[E]
    batch_size: int
    answers: Callable[[Sequence[E], int], tuple[dict[str, float], list[dict[str, Any]]]] | None = (
        None
    )
    pending: bool = False
    _result: tuple[int, dict[str, float], list[dict[str, Any]]] | None = field(default=None)

    def start(self, version: int) -> None:
        """Evaluate at once."""
        found: list[tuple[Metrics, int]] = []
        total = 0.0
        for start in range(0, len(self.examples), self.batch_size):
            batch = list(self.examples[start : start + self.batch_size])
            loss, merged = self._batch(batch)
            total += loss * len(batch)
            found.append((merged, len(batch)))
        figures = finish_batches(found)
        metrics = {f"eval/{name}": value for name, value in figures.items()}
        metrics["eval/loss"] = total / max(len(self.examples), 1)
        metrics["eval/rows"] = float(len(self.examples))
        lines: list[dict[str, Any]] = []
        if self.answers is not None:
            lengths, lines = self.answers(self.examples, version)
            metrics |= lengths
        self._result = (version, metrics, lines)

    def _batch(self, batch: list[E]) -> tuple[float, Metrics]:
        """Return a batch's loss and its metrics, evaluated."""
        prepared = self.objective.prepare(batch)
        loss = 0.0
        merged = Metrics()
        for arrays in prepared.micro:
            value, metrics = self.objective.loss(self.model, arrays)
            loss += number(value)
            merged = merge_metrics(merged, metrics)
        mx.eval(merged)
        return loss, merged

    def poll(self) -> tuple[int, dict[str, float], list[dict[str, Any]]] | None:
        """Return what `start` found."""
        result, self._result = self._result, None
        return result
