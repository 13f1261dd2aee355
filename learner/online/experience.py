"""What online training works on: groups with their prompts, batches of them, evaluations."""

from dataclasses import dataclass

import msgspec

from learner.data.prompts import Prompt
from learner.ledger.state import LedgerState
from protocol.messages.messages import Group


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


class CoordinatorState(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint keeps of the coordinator.

    `outstanding`: the prompts of tasks in the queue and in training, by number. `events` of this
    incarnation were journalled before.
    """

    ledger: LedgerState
    prompts: bytes
    position: int
    outstanding: dict[int, Prompt]
    events: int = 0
