"""What the actor's main thread and its I/O thread say to each other.

Events come to the main thread, commands leave it. They carry bytes, numbers and text, never MLX
arrays, which stay on the main thread.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from protocol.messages.messages import ActorMessage, LearnerMessage, Policy
from protocol.messages.parts import RewardResult, RewardService, TaskId

LeaseKey = tuple[TaskId, int]  # a task and its attempt


@dataclass(frozen=True)
class Received:
    """The learner said something."""

    message: LearnerMessage


@dataclass(frozen=True)
class Fetched:
    """A snapshot is here, as the bytes of its file."""

    policy: Policy
    data: bytes


@dataclass(frozen=True)
class FetchFailed:
    """A snapshot could not be had."""

    policy: Policy
    reason: str


@dataclass(frozen=True)
class Scored:
    """The rewards of a group, and the seconds that they took."""

    key: LeaseKey
    reward: RewardResult
    elapsed_s: float


@dataclass(frozen=True)
class ScoreFailed:
    """A group could not be scored, for a reason that is not the reward functions'."""

    key: LeaseKey
    reason: str


@dataclass(frozen=True)
class NotSent:
    """A group is larger than a message may be."""

    key: LeaseKey
    reason: str


Event = NotSent | Received | Fetched | FetchFailed | Scored | ScoreFailed


@dataclass(frozen=True)
class Send:
    """Say this to the learner."""

    message: ActorMessage


@dataclass(frozen=True)
class Fetch:
    """Get this snapshot."""

    policy: Policy


@dataclass(frozen=True)
class Score:
    """Have a group scored. `completions` are G strings, or G lists of messages."""

    key: LeaseKey
    row: bytes
    completions: list[Any]
    completion_ids: list[list[int]]
    trainer_state: dict[str, Any]


@dataclass(frozen=True)
class UseRewards:
    """Score with these services from now on."""

    services: list[RewardService]


Command = Send | Fetch | Score | UseRewards


class Port(Protocol):
    """The main thread's end. Errors of the I/O thread are raised by both methods."""

    def poll(self) -> Iterable[Event]:
        """Return what has come, without waiting."""
        ...

    def put(self, command: Command) -> None:
        """Hand over a command."""
        ...
