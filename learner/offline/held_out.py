"""Evaluates held-out examples during offline training."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from learner.data.examples import E
from learner.interfaces import Objective
from learner.losses.metrics import Metrics, finish_batches, merge_metrics, number

Evaluated = tuple[int, dict[str, float], list[dict[str, Any]]]  # version, metrics, rollouts
Answer: TypeAlias = Callable[[Sequence[E], int], tuple[dict[str, float], list[dict[str, Any]]]]


@dataclass
class HeldOutEvaluator(Generic[E]):
    """Runs the objective over held-out examples, without a gradient, as training would.

    Metrics are those of one batch that holds all examples. The loss is, as in TRL, the mean of the
    batches' losses weighted by their examples. `answers`, if given, answers the prompts, and
    returns metrics and lines for rollouts.jsonl.
    """

    model: nn.Module
    objective: Objective[list[E], Any]
    examples: Sequence[E]
    batch_size: int
    answers: Answer[E] | None = None
    pending: bool = False
    _result: Evaluated | None = field(default=None)

    def start(self, version: int) -> None:
        """Evaluate at once."""
        found: list[tuple[Metrics, int]] = []
        total = 0.0
        for start in range(0, len(self.examples), self.batch_size):
            batch = list(self.examples[start : start + self.batch_size])
            loss = 0.0
            merged = Metrics()
            for arrays in self.objective.prepare(batch).micro:
                value, metrics = self.objective.loss(self.model, arrays)
                loss += number(value)
                merged = merge_metrics(merged, metrics)

            mx.eval(merged)
            total += loss * len(batch)
            found.append((merged, len(batch)))

        figures = finish_batches(found)
        result = {f"eval/{name}": value for name, value in figures.items()}
        result["eval/loss"] = total / max(len(self.examples), 1)
        result["eval/rows"] = float(len(self.examples))

        lines: list[dict[str, Any]] = []
        if self.answers is not None:
            lengths, lines = self.answers(self.examples, version)
            result |= lengths
        self._result = (version, result, lines)

    def poll(self) -> Evaluated | None:
        """Return what `start` found, once."""
        result, self._result = self._result, None
        return result
