"""The evaluation of held-out examples during offline training."""

# pyright: reportMissingTypeStubs=false

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import mlx.core as mx
import mlx.nn as nn

from learner.data.examples import E
from learner.interfaces import Objective
from learner.losses.metrics import number

Evaluated = tuple[int, dict[str, float], list[dict[str, Any]]]  # version, metrics, rollouts


@dataclass
class HeldOutEvaluator(Generic[E]):
    """Runs the objective over held-out examples, without a gradient, as training would.

    Metrics are means over all that was counted, as one batch of all examples would have them; the
    loss is the mean of the batches' losses, weighted by examples, as TRL's.

    `answers`, if given, also answers their prompts: it returns metrics and lines for
    rollouts.jsonl.
    """

    model: nn.Module
    objective: Objective[list[E]]
    examples: Sequence[E]
    batch_size: int
    answers: Callable[[Sequence[E], int], tuple[dict[str, float], list[dict[str, Any]]]] | None = (
        None
    )
    pending: bool = False
    _result: Evaluated | None = field(default=None)

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
        loss = 0.0
        merged: dict[str, mx.array] = {}
        for arrays in self.objective.prepare(batch).micro:
            value, metrics = self.objective.loss(self.model, arrays)
            loss += number(value)
            merged = self.objective.merge(merged, metrics)
        values = {name: number(value) for name, value in merged.items()}
        return loss, _sums_and_counts(values, len(batch))

    def poll(self) -> Evaluated | None:
        """Return what `start` found, once."""
        result, self._result = self._result, None
        return result


def _sums_and_counts(parts: Mapping[str, float], examples: int) -> dict[str, float]:
    """Return parts (see `learner/losses/metrics.py`) that are all sums and counts.

    Those of several batches add up to means over all that was counted. What a batch gives as one
    value (a share of its loss, an extreme) counts once per example. A metric without a value in
    this batch (infinite) does not count.
    """
    found: dict[str, float] = {}
    for key, value in parts.items():
        kind, name = key.split(":", 1)
        counted = kind == "count" or f"count:{name}" in parts
        if counted:
            found[key] = value
        elif not math.isinf(value):
            found |= {f"sum:{name}": value * examples, f"count:{name}": float(examples)}
    return found
