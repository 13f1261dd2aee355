"""Decodes and checks the replies of reward services, and merges them into a group's result."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, TypeVar

import msgspec
import numpy as np

from protocol.messages.arrays import floats_bytes
from protocol.messages.limits import FUNCTIONS, LOG_EXTRA_BYTES, LOG_METRICS, Name, printable
from protocol.messages.parts import RewardResult
from protocol.messages.rewards import (
    RewardFault,
    RewardMessage,
    ScoreProgress,
    ScoreRefusal,
    unique_names,
)

log = logging.getLogger("pippin.rewards")

T = TypeVar("T")
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


class ServiceReply(RewardMessage, frozen=True, kw_only=True, tag="rewards"):
    """A `ScoreReply` as it is read here: bounded, and what was logged is kept as JSON text."""

    id: str
    names: Annotated[list[Name], msgspec.Meta(max_length=FUNCTIONS)]
    rewards: list[list[float | None]]
    log_extra: msgspec.Raw = msgspec.Raw(b"{}")
    log_metric: Annotated[dict[Name, float], msgspec.Meta(max_length=LOG_METRICS)] = msgspec.field(
        default_factory=dict[str, float]
    )
    faults: Annotated[list[RewardFault], msgspec.Meta(max_length=FUNCTIONS)] = msgspec.field(
        default_factory=list[RewardFault]
    )


Reply = ServiceReply | ScoreRefusal | ScoreProgress


class _ReplyId(msgspec.Struct):
    """The request that an unreadable reply belongs to."""

    id: str


def decode_reply(address: str, data: bytes) -> Reply | None:
    """Decode a message; an invalid one counts as a refusal of the request that it names."""
    try:
        return msgspec.json.decode(data, type=Reply)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        log.warning("%s sent something that is not a reply: %s", address, printable(str(error)))
        try:
            named = msgspec.json.decode(data, type=_ReplyId)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return None
        return ScoreRefusal(id=named.id, reason=f"it sent an invalid reply: {error}")


def reply_error(reply: ServiceReply, names: list[str], count: int) -> str:
    """Return what is wrong with a reply that could be decoded, or ""."""
    if names and reply.names != names:
        return f"answered for the functions {reply.names}, earlier for {names}; restart the run"
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


def merge_replies(replies: Sequence[ServiceReply], count: int, elapsed_s: float) -> RewardResult:
    """Join the functions of all services, in order; a name that occurs again gets `_2`.

    While the names of any service are unknown, the columns cannot be told apart: the result has
    none, and the group counts as None for every function.
    """
    complete = all(reply.names for reply in replies)
    columns = [c for r in replies for c in r.rewards] if complete else []
    table = np.full((count, len(columns)), np.nan, np.float32)
    for place, column in enumerate(columns):
        table[:, place] = [np.nan if value is None else value for value in column]

    logged, too_much = _join_logged(replies)
    metrics = join_lists({name: [v] for name, v in r.log_metric.items()} for r in replies)
    return RewardResult(
        names=unique_names([n for r in replies for n in r.names]) if complete else [],
        rewards=floats_bytes(table.reshape(-1)),
        log_extra=logged,
        log_metric={name: sum(v / len(values) for v in values) for name, values in metrics.items()},
        faults=[*(fault for reply in replies for fault in reply.faults), *too_much],
        elapsed_s=elapsed_s,
    )


def _join_logged(replies: Sequence[ServiceReply]) -> tuple[bytes, list[RewardFault]]:
    """Return what all services logged as one JSON object, or none of it and the fault.

    It is decoded only if there is something to join, and no further than the columns' entries.
    """
    filled = [reply for reply in replies if bytes(reply.log_extra) not in (b"", b"{}", b"null")]
    size = sum(len(bytes(reply.log_extra)) for reply in filled)
    problem = f"{size} bytes were logged for one group; at most {LOG_EXTRA_BYTES} are kept"

    if size <= LOG_EXTRA_BYTES:
        try:
            return _joined_json([bytes(reply.log_extra) for reply in filled]), []
        except msgspec.MsgspecError as error:
            problem = f"what was logged is no object of lists: {error}"
    names = [name for reply in filled for name in reply.names[:1]]
    faults = [RewardFault(function=name, kind="contract", message=problem) for name in names]
    return b"{}", faults[:1]


def _joined_json(parts: Sequence[bytes]) -> bytes:
    if len(parts) == 1:
        return msgspec.json.format(parts[0], indent=-1)
    columns = [msgspec.json.decode(part, type=dict[str, list[msgspec.Raw]]) for part in parts]
    return msgspec.json.format(msgspec.json.encode(join_lists(columns)), indent=-1)


def join_lists(parts: Iterable[Mapping[str, Sequence[T]]]) -> dict[str, list[T]]:
    """Return what the parts hold under each name, one after the other."""
    joined: dict[str, list[T]] = {}
    for part in parts:
        for name, values in part.items():
            joined.setdefault(name, []).extend(values)
    return joined
