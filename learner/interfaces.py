"""The trainer's interfaces: a source of batches, an objective, an evaluator, a batch as arrays.

The trainer knows nothing else about them, and they know nothing about the trainer.
"""

# pyright: reportMissingTypeStubs=false

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn

from learner.losses.metrics import Metrics

BatchOut = TypeVar("BatchOut", covariant=True)
BatchIn = TypeVar("BatchIn", contravariant=True)
ArraysT = TypeVar("ArraysT")  # the arrays of a micro-batch: a TypedDict per objective


@dataclass
class Prepared(Generic[ArraysT]):
    """A batch as arrays, one set per micro-batch, and what is known before the step.

    `step` False: nothing can be learned from the batch, so the optimiser does not move. `micro` may
    leave out examples that contribute nothing, but normalisers count them. `refresh` brings
    `micro` up to date with the policy before each further pass over the batch.
    """

    micro: list[ArraysT]
    metrics: dict[str, float]
    step: bool = True
    rollouts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    refresh: Callable[[], None] | None = None


class Source(Protocol[BatchOut]):
    """Where batches come from."""

    exhausted: bool

    def poll(self, timeout_s: float = 0.0) -> BatchOut | None:
        """Return the next batch, or None if it is not ready within `timeout_s`."""
        ...

    def publish(self, version: int) -> None:
        """React to a step: the policy has now been trained on `version` batches."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return what the source measured for this batch."""
        ...

    def state(self) -> bytes:
        """Return what a resume needs."""
        ...


class Objective(Protocol[BatchIn, ArraysT]):
    """What is optimised."""

    @property
    def num_iterations(self) -> int:
        """How often a batch is trained on."""
        ...

    def prepare(self, batch: BatchIn) -> Prepared[ArraysT]:
        """Turn a batch into arrays; may run the policy or its reference without a gradient."""
        ...

    def loss(self, model: nn.Module, arrays: ArraysT) -> tuple[mx.array, Metrics]:
        """Return a micro-batch's share of the loss, and its metrics."""
        ...


class Evaluator(Protocol):
    """Evaluates the policy on held-out examples: `start` begins, `poll` returns the result."""

    pending: bool

    def start(self, version: int) -> None:
        """Begin the evaluation of the policy as it is."""
        ...

    def poll(self) -> tuple[int, dict[str, float], list[dict[str, Any]]] | None:
        """Return (version, metrics, rollouts) of a finished evaluation."""
        ...
