"""What online training works on: groups with their prompts, batches of them, evaluations."""

from dataclasses import dataclass

from learner.sources.prompts import Prompt
from protocol.messages import Group


@dataclass(frozen=True)
class TrainedGroup:
    """A group with the prompt that it answers; `attempt` is the one that counted."""

    prompt: Prompt
    group: Group


@dataclass(frozen=True)
class TrainBatch:
    """B groups in queue order. `trained_at` is the policy version of the first update."""

    groups: list[TrainedGroup]
    trained_at: int


@dataclass(frozen=True)
class EvalResult:
    """The evaluation of one policy version: its groups, and how many rows were dropped."""

    version: int
    groups: list[TrainedGroup]
    dropped: int
