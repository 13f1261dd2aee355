"""The events of the ledger, each with the change that it makes to the state.

`apply_to` is the only way a `LedgerState` changes, so applying a journal of events to the state
that they began with gives the same state again. `ledger.py` decides which events happen.
`apply_to` raises LedgerError if the event is impossible in that state.
"""

from itertools import islice

import msgspec

from learner.ledger.state import Lease, LedgerState, RowKey, TaskRecord, require
from protocol.errors import LedgerError
from protocol.messages.messages import TaskKind


class LedgerEvent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the events; numbers are `TaskId.number`, times are the caller's `now`.

    An event's tag is its `type` in the journal.
    """


class IncarnationBegan(LedgerEvent, frozen=True, kw_only=True, tag="Began"):
    """A learner began whose actors know nothing of earlier ones; see `LedgerState.begin`.

    `keep_groups`: what was received stays, and is not sampled again.
    """

    incarnation: str
    keep_groups: bool

    def apply_to(self, state: LedgerState) -> None:
        state.begin(self.incarnation, keep_groups=self.keep_groups)


class TaskJoined(LedgerEvent, frozen=True, kw_only=True, tag="Joined"):
    """A task was added to the end of the queue, or to the evaluation round."""

    number: int
    row_key: RowKey
    kind: TaskKind
    pinned_version: int | None
    at: float

    def apply_to(self, state: LedgerState) -> None:
        require(self.number == state.next_number, f"task {self.number} joined out of order")
        state.next_number += 1
        state.counters.joined += 1

        tasks = state.queue if self.kind == "train" else state.evals
        tasks[self.number] = TaskRecord(
            number=self.number,
            row_key=self.row_key,
            kind=self.kind,
            pinned_version=self.pinned_version,
        )


class TaskLeased(LedgerEvent, frozen=True, kw_only=True, tag="Leased"):
    """An actor was given an attempt at a task."""

    number: int
    attempt: int
    actor: str
    min_policy_version: int
    at: float

    def apply_to(self, state: LedgerState) -> None:
        record = _find(state, self.number, "lease")
        require(record.waiting, f"task {self.number} was leased while it is leased or done")
        attempt = len(record.floors) + 1
        require(self.attempt == attempt, f"attempt {self.attempt} leased, next is {attempt}")

        record.floors.append(self.min_policy_version)
        record.lease = Lease(attempt=attempt, actor=self.actor, leased_at=self.at)
        state.counters.leased += 1
        state.counters.retried += attempt > 1


class GroupReceived(LedgerEvent, frozen=True, kw_only=True, tag="Received"):
    """The group of this attempt was accepted; the task's open lease ends, whichever it is."""

    number: int
    attempt: int
    actor: str
    at: float

    def apply_to(self, state: LedgerState) -> None:
        record = _find(state, self.number, "group")
        require(not record.ended, f"task {self.number} got a second group")
        record.taken = self.attempt
        record.lease = None
        state.counters.received += 1


class GroupDiscarded(LedgerEvent, frozen=True, kw_only=True, tag="Discarded"):
    """A group was not accepted: "duplicate", "dropped", "stale" or "unknown"."""

    number: int
    attempt: int
    actor: str
    reason: str
    at: float

    def apply_to(self, state: LedgerState) -> None:
        if self.reason == "duplicate":
            state.counters.duplicates += 1
        else:
            _count(state.counters.discarded, self.reason)


class LeaseClosed(LedgerEvent, frozen=True, kw_only=True, tag="Closed"):
    """A lease ended without a group.

    `cause`: "failed", "expired" (no progress), "overdue" (too old), "withdrawn" (from an actor that
    does not work), "gone" or "stale". `blamed`: the attempt counts towards `max_attempts`.
    """

    number: int
    attempt: int
    cause: str
    detail: str
    blamed: bool
    at: float

    def apply_to(self, state: LedgerState) -> None:
        record = _find(state, self.number, "end of lease")
        open_attempt = None if record.lease is None else record.lease.attempt
        require(
            open_attempt == self.attempt,
            f"attempt {self.attempt} of task {self.number} ended, open is {open_attempt}",
        )
        record.lease = None
        record.failures += self.blamed
        state.counters.expired += self.cause in ("expired", "overdue")


class TaskDropped(LedgerEvent, frozen=True, kw_only=True, tag="Dropped"):
    """A task was given up; it leaves the queue."""

    number: int
    cause: str
    detail: str
    at: float

    def apply_to(self, state: LedgerState) -> None:
        record = _find(state, self.number, "drop")
        require(record.waiting, f"task {self.number} was dropped while it is leased or done")
        if record.kind == "train":
            del state.queue[self.number]
        else:
            record.dropped = self.detail
        state.dropped[self.number] = self.detail
        _count(state.counters.dropped, self.cause)


class RowsEnded(LedgerEvent, frozen=True, kw_only=True, tag="RowsEnded"):
    """There are no more rows: no further training task will join."""

    at: float

    def apply_to(self, state: LedgerState) -> None:
        state.rows_ended = True


class BatchFormed(LedgerEvent, frozen=True, kw_only=True, tag="Formed"):
    """The tasks at the head of the queue went into training as a batch, in order."""

    numbers: list[int]
    version: int
    at: float

    def apply_to(self, state: LedgerState) -> None:
        require(not state.training, "a batch was formed while one is in training")
        head = list(islice(state.queue, len(self.numbers)))
        require(bool(head) and head == self.numbers, "a batch must be the head of the queue")
        for number in self.numbers:
            require(state.queue[number].taken is not None, f"task {number} trains without a group")
            state.training[number] = state.queue.pop(number)


class BatchReturned(LedgerEvent, frozen=True, kw_only=True, tag="Returned"):
    """The batch in training cannot be trained on: its tasks are queued again, without groups.

    Nor can the groups of the queued tasks `also`, which they lose.
    """

    detail: str
    at: float
    also: list[int] = []

    def apply_to(self, state: LedgerState) -> None:
        require(bool(state.training), "a batch was returned while none is in training")
        for record in (*state.training.values(), *(state.queue[n] for n in self.also)):
            record.taken = None
        state.queue = {**state.training, **state.queue}
        state.training = {}


class BatchConsumed(LedgerEvent, frozen=True, kw_only=True, tag="Consumed"):
    """The batch in training was consumed; `version` is the new policy version."""

    version: int

    def apply_to(self, state: LedgerState) -> None:
        require(bool(state.training), "a batch was consumed while none is in training")
        require(
            self.version == state.version + 1, f"version {self.version} follows {state.version}"
        )
        state.version = self.version
        state.counters.trained += len(state.training)
        state.training.clear()


class PolicyPublished(LedgerEvent, frozen=True, kw_only=True, tag="Published"):
    """Actors can fetch this version from now on.

    `digest` is that of all trainable tensors, `tensors` those of each (`TensorDigests.short`).
    """

    version: int
    digest: str
    tensors: bytes = b""

    def apply_to(self, state: LedgerState) -> None:
        oldest = 0 if state.published is None else state.published
        require(
            oldest <= self.version <= state.version,
            f"version {self.version} was published; required {oldest} to {state.version}",
        )
        state.published = self.version
        state.digest = self.digest


class EvaluationTaken(LedgerEvent, frozen=True, kw_only=True, tag="EvalTaken"):
    """The results of the evaluation round were handed over."""

    numbers: list[int]

    def apply_to(self, state: LedgerState) -> None:
        require(list(state.evals) == self.numbers, "an evaluation round is taken whole")
        state.counters.evaluated += sum(r.taken is not None for r in state.evals.values())
        state.evals.clear()


AnyEvent = (
    IncarnationBegan
    | TaskJoined
    | TaskLeased
    | GroupReceived
    | GroupDiscarded
    | LeaseClosed
    | TaskDropped
    | RowsEnded
    | BatchFormed
    | BatchReturned
    | BatchConsumed
    | PolicyPublished
    | EvaluationTaken
)


def _find(state: LedgerState, number: int, event: str) -> TaskRecord:
    record = state.queue.get(number) or state.evals.get(number)
    if record is None:
        raise LedgerError(f"{event} of task {number}: it is not queued")
    return record


def _count(table: dict[str, int], key: str) -> None:
    table[key] = table.get(key, 0) + 1
