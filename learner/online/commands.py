"""What the trainer's thread and the learner's I/O thread send each other through the bridge.

    trainer's thread (source.py)               I/O thread (service.py)

    RequestBatch        ──────────────────▶    waits until the next batch has all its groups
                        ◀──────────────────    QueueMetrics and TrainBatch, or NoMoreBatches
    PublishPolicy       ──────────────────▶    tells the actors to fetch the snapshot
    RestorePolicy       ──────────────────▶    serves a snapshot that was published before
    StartEvaluation     ──────────────────▶    queues the held-out rows
                        ◀──────────────────    EvalResult, when all are answered or dropped
    RequestState        ──────────────────▶
                        ◀──────────────────    EncodedState
    ReturnBatch         ──────────────────▶    queues the rows of the batch in training again
    EndRun              ──────────────────▶    tells the actors to stop, and ends

They carry bytes, numbers and paths, never MLX arrays, which stay on the trainer's thread.
"""

from dataclasses import dataclass
from pathlib import Path

from learner.online.experience import EvalResult, TrainBatch
from protocol.messages.messages import Policy


@dataclass(frozen=True)
class RequestBatch:
    """The trainer is free: send the next batch as soon as it is complete."""


@dataclass(frozen=True)
class PublishPolicy:
    """A snapshot can be fetched; a new version also says that the batch in training is consumed.

    `path` None: the policy is on the shelf of an actor in this process, and in no file. `tensors`
    are the digests of its tensors, for the journal.
    """

    policy: Policy
    path: Path | None
    tensors: bytes


@dataclass(frozen=True)
class RestorePolicy:
    """Actors can fetch this policy, of a version that was published before a recovery."""

    policy: Policy
    path: Path


@dataclass(frozen=True)
class StartEvaluation:
    """Evaluate the policy of this version on the held-out rows."""

    version: int


@dataclass(frozen=True)
class RequestState:
    """Send the state of ledger and prompts, for a checkpoint."""


@dataclass(frozen=True)
class ReturnBatch:
    """The batch in training cannot be trained on; `reason` says why."""

    reason: str


@dataclass(frozen=True)
class EndRun:
    """The run is over: tell the actors, then end."""

    reason: str


@dataclass(frozen=True)
class EncodedState:
    """A `CoordinatorState` as msgpack."""

    data: bytes


@dataclass(frozen=True)
class QueueMetrics:
    """Metrics of actors, queue and wire, sent before every batch."""

    values: dict[str, float]


@dataclass(frozen=True)
class NoMoreBatches:
    """No batch will come: the rows have ended."""


Command = (
    RequestBatch
    | PublishPolicy
    | RestorePolicy
    | StartEvaluation
    | RequestState
    | ReturnBatch
    | EndRun
)
Reply = TrainBatch | EvalResult | EncodedState | QueueMetrics | NoMoreBatches
