"""What an actor's session wants done: the actions that its worker carries out, in order."""

from collections.abc import Hashable
from dataclasses import dataclass

from actors.engine.base import GenerationRequest, GenerationResult
from protocol.messages.messages import ActorMessage, Policy, Task, Welcome


@dataclass(frozen=True)
class Say:
    """Send this message."""

    message: ActorMessage


@dataclass(frozen=True)
class Sample:
    """Give this request to the engine."""

    request: GenerationRequest


@dataclass(frozen=True)
class Abandon:
    """Cancel this request in the engine."""

    key: Hashable


@dataclass(frozen=True)
class HaveScored:
    """Have this group's completions scored."""

    task: Task
    result: GenerationResult


@dataclass(frozen=True)
class Announced:
    """A policy can be fetched."""

    policy: Policy


@dataclass(frozen=True)
class Joined:
    """The learner accepted; its terms. `anew`: another incarnation, whose versions begin anew."""

    welcome: Welcome
    anew: bool


@dataclass(frozen=True)
class Leave:
    """The run is over."""

    reason: str


Action = Say | Sample | Abandon | HaveScored | Announced | Joined | Leave
