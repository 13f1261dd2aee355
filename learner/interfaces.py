"""What the loop runs: a source of batches, an objective, an evaluator, and a batch as arrays.

`learner/trainer.py` knows no more of them than this, and they know nothing of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn

BatchOut = TypeVar("BatchOut", covariant=True)
BatchIn = TypeVar("BatchIn", contravariant=True)
Arrays = dict[str, mx.array]


@dataclass
class Prepared:
    """A batch as arrays: one mapping a micro-batch, and what is known before the step.

    `step` False: nothing can be learned from it, so the optimiser does not move. `micro` may
    leave out rows that contribute nothing; normalisers count them all the same. `again` brings
    `micro` up to date with the policy before each further pass over the batch.
    """

    micro: list[Arrays]
    metrics: dict[str, float]
    step: bool = True
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    again: Callable[[], None] | None = None


class Source(Protocol[BatchOut]):
    """Where batches come from."""

    exhausted: bool

    def poll(self, timeout_s: float = 0.0) -> BatchOut | None:
        """Return the next batch, if it is there."""
        ...

    def stepped(self, version: int) -> None:
        """Take note that a batch was consumed: `version` batches are, in all."""
        ...

    def figures(self) -> dict[str, float]:
        """Return what the source measured for this batch."""
        ...

    def state(self) -> bytes:
        """Return what a resume needs."""
        ...


class Objective(Protocol[BatchIn]):
    """What is optimised."""

    @property
    def num_iterations(self) -> int:
        """How often a batch is trained on."""
        ...

    def prepare(self, batch: BatchIn) -> Prepared:
        """Turn a batch into arrays; may run the policy or its reference without a gradient."""
        ...

    def loss(self, model: nn.Module, arrays: Arrays) -> tuple[mx.array, Arrays]:
        """Return a micro-batch's share of the loss, and metrics that merge over micro-batches."""
        ...

    def merge(self, first: Arrays, second: Arrays) -> Arrays:
        """Merge the metrics of two micro-batches."""
        ...

    def finish(self, metrics: Arrays) -> dict[str, float]:
        """Turn merged metrics into logged ones."""
        ...


class Evaluator(Protocol):
    """Held-out rows. `start` begins, `poll` returns metrics when they are there."""

    pending: bool

    def start(self, version: int) -> None:
        """Begin the evaluation of the policy as it is."""
        ...

    def poll(self) -> tuple[int, dict[str, float], list[dict[str, Any]]] | None:
        """Return (version, metrics, rollouts) of a finished evaluation."""
        ...
