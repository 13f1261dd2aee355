"""Actions: what a `Session` asks its worker to do, in order."""

from collections.abc import Hashable
from dataclasses import dataclass

from actors.engine.base import GenerationRequest, GenerationResult
from protocol.messages.messages import ActorMessage, Policy, Task, Welcome


@dataclass(frozen=True)
class SendToLearner:
    """Send this message to the learner."""

    message: ActorMessage


@dataclass(frozen=True)
class Sample:
    """Add this request to the engine."""

    request: GenerationRequest


@dataclass(frozen=True)
class CancelSampling:
    """Cancel this request in the engine."""

    key: Hashable


@dataclass(frozen=True)
class RequestScores:
    """Have this group's completions scored."""

    task: Task
    result: GenerationResult


@dataclass(frozen=True)
class NotePolicy:
    """Note that this policy can be fetched."""

    policy: Policy


@dataclass(frozen=True)
class JoinRun:
    """Join the run that the learner describes.

    `new_incarnation`: the learner was restarted, so its earlier requests and policies are dropped.
    """

    welcome: Welcome
    new_incarnation: bool


@dataclass(frozen=True)
class LeaveRun:
    """Stop, because the run is over."""

    reason: str


Action = SendToLearner | Sample | CancelSampling | RequestScores | NotePolicy | JoinRun | LeaveRun
