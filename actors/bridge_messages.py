"""What the actor's main thread and its I/O thread say to each other over the bridge.

                       commands: Send, FetchSnapshot, ScoreGroup, UseRewards
    main thread  ──────────────────────────────────────────────────────────────▶  I/O thread
    (Worker, MLX)                                                                  (ActorIo)
                 ◀──────────────────────────────────────────────────────────────
                       events: MessageReceived, SnapshotFetched, SnapshotFetchFailed,
                               GroupScored, GroupScoreFailed, NotSent

They carry bytes, numbers and text, never MLX arrays, which stay on the main thread.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from protocol.messages.messages import ActorMessage, LearnerMessage, Policy
from protocol.messages.parts import RewardResult, RewardService, TaskId

LeaseKey = tuple[TaskId, int]  # a task and its attempt


# ---- events: I/O thread to main thread ----------------------------------------------------------


@dataclass(frozen=True)
class MessageReceived:
    """A message arrived from the learner."""

    message: LearnerMessage


@dataclass(frozen=True)
class SnapshotFetched:
    """A snapshot arrived; `data` are the bytes of its file."""

    policy: Policy
    data: bytes


@dataclass(frozen=True)
class SnapshotFetchFailed:
    """A snapshot could not be fetched."""

    policy: Policy
    reason: str


@dataclass(frozen=True)
class GroupScored:
    """A group has its rewards; scoring took `elapsed_s`."""

    key: LeaseKey
    reward: RewardResult
    elapsed_s: float


@dataclass(frozen=True)
class GroupScoreFailed:
    """A group could not be scored, through no fault of the reward functions."""

    key: LeaseKey
    reason: str


@dataclass(frozen=True)
class NotSent:
    """A group was not sent because it is larger than a message may be."""

    key: LeaseKey
    reason: str


Event = (
    MessageReceived
    | SnapshotFetched
    | SnapshotFetchFailed
    | GroupScored
    | GroupScoreFailed
    | NotSent
)


# ---- commands: main thread to I/O thread --------------------------------------------------------


@dataclass(frozen=True)
class Send:
    """Send this message to the learner."""

    message: ActorMessage


@dataclass(frozen=True)
class FetchSnapshot:
    """Fetch this policy's snapshot."""

    policy: Policy


@dataclass(frozen=True)
class ScoreGroup:
    """Score a group. `completions` are G strings, or G lists of messages."""

    key: LeaseKey
    row: bytes
    completions: list[Any]
    completion_ids: list[list[int]]
    trainer_state: dict[str, Any]


@dataclass(frozen=True)
class UseRewards:
    """Score with these services from now on."""

    services: list[RewardService]


Command = Send | FetchSnapshot | ScoreGroup | UseRewards


class IoThread(Protocol):
    """The I/O thread as the main thread sees it. Both methods raise what it raised."""

    def poll(self) -> Iterable[Event]:
        """Return the events that have come, without waiting."""
        ...

    def put(self, command: Command) -> None:
        """Hand over a command."""
        ...
