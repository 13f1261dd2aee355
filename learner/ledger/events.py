"""What can happen to the ledger, and how it changes the ledger's state.

`apply` is the only place that changes a `LedgerState`, so a journal of events replays to the same
state. The decisions (who gets which task, what a group counts for) are in
`learner/ledger/ledger.py`.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from learner.ledger.state import Lease, LedgerState, RowKey, TaskRecord, require
from protocol.errors import LedgerError
from protocol.messages.messages import TaskKind


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of the events; numbers are `TaskId.number`, times are the caller's `now`."""


class Joined(Event, frozen=True, kw_only=True):
    """A task came to the end of its queue."""

    number: int
    row_key: RowKey
    kind: TaskKind
    pinned_version: int | None
    at: float


class Leased(Event, frozen=True, kw_only=True):
    """An actor got an attempt of a task."""

    number: int
    attempt: int
    actor: str
    min_policy_version: int
    expires_at: float
    at: float


class Renewed(Event, frozen=True, kw_only=True):
    """An actor made progress: all its leases run until `expires_at`."""

    actor: str
    expires_at: float
    at: float


class Received(Event, frozen=True, kw_only=True):
    """The group of this attempt counts; an open lease of another attempt ends with it."""

    number: int
    attempt: int
    actor: str
    at: float


class Discarded(Event, frozen=True, kw_only=True):
    """A group that does not count: "duplicate", "dropped", "stale" or "unknown"."""

    number: int
    attempt: int
    actor: str
    reason: str
    at: float


class Closed(Event, frozen=True, kw_only=True):
    """A lease ended without a group ("failed", "expired", "gone", "stale"); `blamed`: it counts
    towards `max_attempts`."""

    number: int
    attempt: int
    cause: str
    detail: str
    blamed: bool
    at: float


class Dropped(Event, frozen=True, kw_only=True):
    """A task was given up; it leaves the queue."""

    number: int
    cause: str
    detail: str
    at: float


class RowsEnded(Event, frozen=True, kw_only=True):
    """No further row will join."""

    at: float


class Formed(Event, frozen=True, kw_only=True):
    """The batch that trains next, in order."""

    numbers: list[int]
    version: int
    at: float


class Consumed(Event, frozen=True, kw_only=True):
    """The batch was consumed; `version` is the new policy version."""

    version: int


class Published(Event, frozen=True, kw_only=True):
    """From now on this version can be fetched."""

    version: int
    digest: str


class EvalTaken(Event, frozen=True, kw_only=True):
    """The results of the evaluation round were handed over."""

    numbers: list[int]


AnyEvent = (
    Joined
    | Leased
    | Renewed
    | Received
    | Discarded
    | Closed
    | Dropped
    | RowsEnded
    | Formed
    | Consumed
    | Published
    | EvalTaken
)


def apply(state: LedgerState, event: AnyEvent) -> None:
    """Change `state` by one event.

    Raises:
        LedgerError: the event is impossible in this state.

    """
    _APPLY[type(event)](state, event)


def _live(state: LedgerState, number: int, event: str) -> TaskRecord:
    record = state.queue.get(number) or state.evals.get(number)
    if record is None:
        raise LedgerError(f"{event} of task {number}: it is in no queue")
    return record


def _joined(state: LedgerState, event: Joined) -> None:
    require(event.number == state.next_number, f"task {event.number} joined out of order")
    state.next_number += 1
    state.counters.joined += 1
    table = state.queue if event.kind == "train" else state.evals
    table[event.number] = TaskRecord(
        number=event.number,
        row_key=event.row_key,
        kind=event.kind,
        pinned_version=event.pinned_version,
    )


def _leased(state: LedgerState, event: Leased) -> None:
    record = _live(state, event.number, "lease")
    require(record.waiting, f"task {event.number} was leased while it is out or done")
    attempt = len(record.floors) + 1
    require(event.attempt == attempt, f"attempt {event.attempt} leased, next is {attempt}")
    record.floors.append(event.min_policy_version)
    record.lease = Lease(attempt=attempt, actor=event.actor, expires_at=event.expires_at)
    state.counters.leased += 1
    state.counters.retried += attempt > 1


def _renewed(state: LedgerState, event: Renewed) -> None:
    for table in (state.queue, state.evals):
        for record in table.values():
            if record.lease is not None and record.lease.actor == event.actor:
                record.lease.expires_at = event.expires_at


def _received(state: LedgerState, event: Received) -> None:
    record = _live(state, event.number, "group")
    require(not record.ended, f"task {event.number} got a second group")
    record.taken = event.attempt
    record.lease = None
    state.counters.received += 1


def _discarded(state: LedgerState, event: Discarded) -> None:
    if event.reason == "duplicate":
        state.counters.duplicates += 1
    else:
        _count(state.counters.discarded, event.reason)


def _closed(state: LedgerState, event: Closed) -> None:
    record = _live(state, event.number, "end of lease")
    open_attempt = None if record.lease is None else record.lease.attempt
    require(
        open_attempt == event.attempt,
        f"attempt {event.attempt} of task {event.number} ended, open is {open_attempt}",
    )
    record.lease = None
    record.failures += event.blamed
    state.counters.expired += event.cause == "expired"


def _dropped(state: LedgerState, event: Dropped) -> None:
    record = _live(state, event.number, "drop")
    require(record.waiting, f"task {event.number} was dropped while it is out or done")
    if record.kind == "train":
        del state.queue[event.number]
    else:
        record.dropped = event.detail
    state.dropped[event.number] = event.detail
    _count(state.counters.dropped, event.cause)


def _rows_ended(state: LedgerState, event: RowsEnded) -> None:
    state.rows_ended = True


def _formed(state: LedgerState, event: Formed) -> None:
    require(not state.training, "a batch was formed while one is in training")
    head = list(state.queue)[: len(event.numbers)]
    require(bool(head) and head == event.numbers, "a batch must be the head of the queue")
    for number in event.numbers:
        require(state.queue[number].taken is not None, f"task {number} trains without a group")
        state.training[number] = state.queue.pop(number)


def _consumed(state: LedgerState, event: Consumed) -> None:
    require(bool(state.training), "a batch was consumed while none is in training")
    require(event.version == state.version + 1, f"version {event.version} follows {state.version}")
    state.version = event.version
    state.counters.trained += len(state.training)
    state.training.clear()


def _published(state: LedgerState, event: Published) -> None:
    oldest = 0 if state.published is None else state.published
    require(
        oldest <= event.version <= state.version,
        f"version {event.version} was published; required {oldest} to {state.version}",
    )
    state.published = event.version
    state.digest = event.digest


def _eval_taken(state: LedgerState, event: EvalTaken) -> None:
    require(list(state.evals) == event.numbers, "an evaluation round is taken whole")
    state.counters.evaluated += sum(r.taken is not None for r in state.evals.values())
    state.evals.clear()


def _count(table: dict[str, int], key: str) -> None:
    table[key] = table.get(key, 0) + 1


_APPLY: dict[type[Event], Callable[[LedgerState, Any], None]] = {
    Joined: _joined,
    Leased: _leased,
    Renewed: _renewed,
    Received: _received,
    Discarded: _discarded,
    Closed: _closed,
    Dropped: _dropped,
    RowsEnded: _rows_ended,
    Formed: _formed,
    Consumed: _consumed,
    Published: _published,
    EvalTaken: _eval_taken,
}
