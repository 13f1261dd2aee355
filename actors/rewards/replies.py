"""Checks the replies of reward services and merges them into a group's result."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.rewards.loader import unique_names
from protocol.messages.arrays import floats_bytes
from protocol.messages.parts import RewardResult
from protocol.messages.rewards import ScoreReply

_MAX_FLOAT32 = float(np.finfo(np.float32).max)


def reply_error(reply: ScoreReply, names: list[str], count: int) -> str:
    """Return what is wrong with a reply that could be decoded, or ""."""
    if names and reply.names != names:
        return f"answered for the functions {reply.names}, which were {names}; restart the run"
    if not reply.names or len(set(reply.names)) != len(reply.names):
        return f"answered with the names {reply.names}; required at least one, all different"
    if len(reply.rewards) != len(reply.names):
        return f"answered with {len(reply.rewards)} lists of rewards for {len(reply.names)} names"
    for name, column in zip(reply.names, reply.rewards, strict=True):
        if len(column) != count:
            return f"gave {len(column)} rewards of {name!r} for {count} completions"
        for value in column:
            if value is not None and not abs(value) <= _MAX_FLOAT32:
                return f"gave the reward {value} of {name!r}, which float32 cannot hold"
    return ""


def merge_replies(replies: Sequence[ScoreReply], count: int, elapsed_s: float) -> RewardResult:
    """Join the functions of all services, in order; a name that occurs again gets `_2`.

    While the names of any service are unknown, the columns cannot be told apart: the result has
    none, and the group counts as None for every function.
    """
    complete = all(reply.names for reply in replies)
    columns = [c for r in replies for c in r.rewards] if complete else []
    table = np.full((count, len(columns)), np.nan, np.float32)
    for place, column in enumerate(columns):
        table[:, place] = [np.nan if value is None else value for value in column]

    extra: dict[str, list[Any]] = {}
    metrics: dict[str, list[float]] = {}
    for reply in replies:
        for column, values in reply.log_extra.items():
            extra.setdefault(column, []).extend(values)
        for name, value in reply.log_metric.items():
            metrics.setdefault(name, []).append(value)

    return RewardResult(
        names=unique_names([n for r in replies for n in r.names]) if complete else [],
        rewards=floats_bytes(table.reshape(-1)),
        log_extra=extra,
        log_metric={name: sum(v / len(values) for v in values) for name, values in metrics.items()},
        faults=[fault for reply in replies for fault in reply.faults],
        elapsed_s=elapsed_s,
    )
