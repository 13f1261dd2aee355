"""The messages of the reward wire, as JSON, with their own version; see protocol/REWARDS.md.

    actor ── ScoreRequest ──▶ reward server
          ◀── ScoreProgress (while it works), then ScoreReply; or ScoreRefusal ──

Unknown fields are ignored, because reward servers may be written in any language.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import structs

from protocol.messages.limits import NAME_CHARS, printable

REWARD_PROTOCOL_VERSION = 1


class RewardFault(msgspec.Struct, frozen=True, kw_only=True):
    """A reward function that gave no rewards for a group, and the reason; both cut to a bound."""

    function: str
    kind: Literal["timeout", "exception", "contract", "unreachable", "died"]
    message: str

    def __post_init__(self) -> None:
        structs.force_setattr(self, "function", printable(self.function, NAME_CHARS))
        # An exception's last line says most, and alone reaches the terminal.
        structs.force_setattr(self, "message", printable(self.message, keep="\n"))


class RewardMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of the reward wire's messages: unknown fields are ignored."""


class ScoreRequest(RewardMessage, frozen=True, kw_only=True, tag="score"):
    """Actor → server: score the N completions of one group.

    `columns` holds every other dataset column, each a list of N values. `prompts` and
    `completions` are strings, or lists of messages.
    """

    reward_protocol_version: int = REWARD_PROTOCOL_VERSION
    id: str
    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]] = {}
    trainer_state: dict[str, Any] = {}
    timeout_s: float = 60.0


class ScoreReply(RewardMessage, frozen=True, kw_only=True, tag="rewards"):
    """Server → actor: `rewards[f][n]` is function f's reward of completion n, or null."""

    reward_protocol_version: int = REWARD_PROTOCOL_VERSION
    id: str
    names: list[str]
    rewards: list[list[float | None]]
    log_extra: dict[str, list[Any]] = {}
    log_metric: dict[str, float] = {}
    faults: list[RewardFault] = []
    elapsed_s: float = 0.0


class ScoreProgress(RewardMessage, frozen=True, kw_only=True, tag="progress"):
    """Server → actor: the request is being handled; `ahead` others are scored before it."""

    reward_protocol_version: int = REWARD_PROTOCOL_VERSION
    id: str
    ahead: int = 0


class ScoreRefusal(RewardMessage, frozen=True, kw_only=True, tag="refused"):
    """Server → actor: the request was not accepted; with `retry`, it may be later or elsewhere."""

    reward_protocol_version: int = REWARD_PROTOCOL_VERSION
    id: str = ""
    reason: str
    retry: bool = False

    def __post_init__(self) -> None:
        structs.force_setattr(self, "reason", printable(self.reason))


def unique_names(names: Sequence[str]) -> list[str]:
    """Return the names in order; one that occurs again gets `_2`, then `_3`."""
    result: list[str] = []
    for name in names:
        candidate, count = name, 1
        while candidate in result:
            count += 1
            candidate = f"{name}_{count}"
        result.append(candidate)
    return result
