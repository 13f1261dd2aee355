"""What the trainer's thread and the learner's I/O thread say to each other.

Commands come from the trainer; beside what is here, it is sent `TrainBatch` and `EvalResult`. They
carry bytes, numbers and paths, never MLX arrays, which stay on the trainer's thread.
"""

from dataclasses import dataclass
from pathlib import Path

from protocol.messages.messages import Policy


@dataclass(frozen=True)
class WantBatch:
    """The trainer is free: hand over the next batch as soon as its groups are there."""


@dataclass(frozen=True)
class Publish:
    """A policy can be fetched; one of a new version says that the batch in training is consumed."""

    policy: Policy
    path: Path


@dataclass(frozen=True)
class Evaluate:
    """Evaluate the policy of this version on the held-out rows."""

    version: int


@dataclass(frozen=True)
class WantState:
    """Hand over the state of ledger and prompts, for a checkpoint."""


@dataclass(frozen=True)
class Finish:
    """The run is over: tell the actors, then end."""

    reason: str


@dataclass(frozen=True)
class SourceState:
    """An encoded `CoordinatorState`."""

    data: bytes


@dataclass(frozen=True)
class Rates:
    """Figures of actors, queue and wire, sent with every batch."""

    figures: dict[str, float]


@dataclass(frozen=True)
class Exhausted:
    """No batch will come: the rows are used up."""


Command = WantBatch | Publish | Evaluate | WantState | Finish
