"""The trainer's view of offline batches, and the evaluation of held-out examples."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import mlx.core as mx
import mlx.nn as nn
import msgspec

from learner.data.examples import E
from learner.interfaces import Objective, Prepared
from learner.losses.metrics import number
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
        parts: dict[str, float] = {}
        total = 0.0
        for start in range(0, len(self.examples), self.batch_size):
            batch = list(self.examples[start : start + self.batch_size])
            loss, found = self._batch(batch)
            total += loss * len(batch)
            for name, value in found.items():
                parts[name] = parts.get(name, 0.0) + value
        figures = self.objective.finish({name: mx.array(value) for name, value in parts.items()})
        metrics = {f"eval/{name}": value for name, value in figures.items()}
        metrics["eval/loss"] = total / max(len(self.examples), 1)
        metrics["eval/rows"] = float(len(self.examples))
        lines: list[dict[str, Any]] = []
        if self.answers is not None:
            lengths, lines = self.answers(self.examples, version)
            metrics |= lengths
        self._result = (version, metrics, lines)

    def _batch(self, batch: list[E]) -> tuple[float, dict[str, float]]:
        """Return a batch's loss, and its metrics as sums and counts."""
        prepared: Prepared = self.objective.prepare(batch)
        loss = 0.0
        merged: dict[str, mx.array] = {}
        for arrays in prepared.micro:
            value, metrics = self.objective.loss(self.model, arrays)
            loss += number(value)
            merged = self.objective.merge(merged, metrics)
        values = {name: number(value) for name, value in merged.items()}
        return loss, _means(values, float(len(batch)))

    def poll(self) -> tuple[int, dict[str, float], list[dict[str, Any]]] | None:
        """Return what `start` found."""
        result, self._result = self._result, None
        return result


def _means(parts: Mapping[str, float], rows: float) -> dict[str, float]:
    """Return parts (see `learner/losses/metrics.py`) of which all are sums and counts, so that
    those of batches add up to means over all that was counted.

    What a batch gives as one value (a share of its loss, an extreme) counts once a row. What has
    no value in this batch counts nothing.
    """
    found: dict[str, float] = {}
    for key, value in parts.items():
        kind, name = key.split(":", 1)
        counted = kind == "count" or f"count:{name}" in parts
        if counted:
            found[key] = value
        elif not math.isinf(value):
            found |= {f"sum:{name}": value * rows, f"count:{name}": rows}
    return found
