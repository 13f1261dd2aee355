"""The trainer's view of offline batches, and the evaluation of held-out examples."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import mlx.nn as nn
import msgspec

from learner.interfaces import Objective, Prepared
from learner.objectives.metrics import number
from learner.sources.examples import E
from learner.sources.offline import OfflineSource, OfflineState

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

    `answers`, if given, also answers their prompts: metrics and lines for rollouts.jsonl.
    """

    model: nn.Module
    objective: Objective[list[E]]
    examples: Sequence[E]
    batch_size: int
    answers: Callable[[Sequence[E], int], tuple[dict[str, float], list[dict[str, Any]]]] | None = (
        None
    )
    pending: bool = False
    _result: tuple[int, dict[str, float], list[dict[str, Any]]] | None = field(default=None)

    def start(self, version: int) -> None:
        """Evaluate at once."""
        totals: dict[str, float] = {}
        weight = 0.0
        for start in range(0, len(self.examples), self.batch_size):
            batch = list(self.examples[start : start + self.batch_size])
            prepared: Prepared = self.objective.prepare(batch)
            loss, merged = 0.0, None
            for arrays in prepared.micro:
                value, metrics = self.objective.loss(self.model, arrays)
                loss += number(value)
                merged = metrics if merged is None else self.objective.merge(merged, metrics)
            figures = {"loss": loss, **self.objective.finish(merged or {})}
            share = prepared.metrics.get("eval_weight", float(len(batch)))
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + value * share
            weight += share
        metrics = {f"eval/{name}": total / max(weight, 1.0) for name, total in totals.items()}
        metrics["eval/rows"] = float(len(self.examples))
        lines: list[dict[str, Any]] = []
        if self.answers is not None:
            lengths, lines = self.answers(self.examples, version)
            metrics |= lengths
        self._result = (version, metrics, lines)

    def poll(self) -> tuple[int, dict[str, float], list[dict[str, Any]]] | None:
        """Return what `start` found."""
        result, self._result = self._result, None
        return result
