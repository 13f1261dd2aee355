"""What online training works on: groups with their prompts, batches of them, evaluations."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from learner.data.prompts import Prompt
from learner.ledger.state import LedgerState
from protocol.messages.arrays import floats_view
from protocol.messages.messages import Group


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and the group of completions that an actor sampled and scored for it."""

    prompt: Prompt
    group: Group


@dataclass(frozen=True)
class TrainBatch:
    """B groups in queue order. `trained_at` is the policy version of the first update."""

    groups: list[PromptGroup]
    trained_at: int


@dataclass(frozen=True)
class EvalResult:
    """The evaluation of one policy version: its groups, and how many rows were dropped."""

    version: int
    groups: list[PromptGroup]
    dropped: int


class OpenContents(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts of the tasks that are not finished, and the groups of those that have one.

    `holders` says which actor was given each attempt.
    """

    prompts: dict[int, Prompt]
    groups: dict[int, Group]
    holders: dict[int, dict[int, str]]


class CoordinatorState(msgspec.Struct, frozen=True, kw_only=True):
    """The coordinator's part of a checkpoint.

    `position` counts the rows that joined; `tasks` holds the data of the ledger's open tasks, by
    number. `journal` is the number of the first journal entry that comes after this state;
    `settings` is the digest of the settings that led to it (`JournalIdentity.settings`).
    """

    ledger: LedgerState
    prompts: bytes
    position: int
    tasks: OpenContents
    journal: int
    settings: str


def reward_matrix(groups: Sequence[PromptGroup]) -> tuple[list[str], np.ndarray]:
    """Return the reward functions' names and the rewards (N, F) float32, NaN for None.

    N counts completions in group order. A group without names (its reward server was never
    reached) has NaN everywhere. If a server was restarted with other functions, those come after
    the rest.
    """
    by_length = sorted((item.group.reward.names for item in groups), key=len, reverse=True)
    names = list(dict.fromkeys(name for group_names in by_length for name in group_names))

    parts: list[np.ndarray] = []
    for item in groups:
        result = item.group.reward
        part = np.full((len(item.group.completions), len(names)), np.nan, np.float32)
        columns = [names.index(name) for name in result.names]
        part[:, columns] = floats_view(result.rewards).reshape(len(part), -1)
        parts.append(part)
    return names, np.concatenate(parts) if parts else np.zeros((0, len(names)), np.float32)
