"""Who owes what: task leases, staleness admission, dedupe and order, as a pure state machine.

    rows ─ join ─▶ queue ─ lease ─▶ actor ─ received ─▶ queue ─ form_batch ─▶ training ─ consumed
                     ▲                 │ failed, expire, actor_gone
                     └── same place ───┘ (after max_attempts: dropped)

The proof of the staleness bound and the rules of the last batch are in `ledger_admission.py`,
those of leases in `ledger_leases.py`.
`finished` says that nothing is left. The caller drains the events, for its journal or the bin.
"""

from collections.abc import Iterable, Sequence
from typing import Self

from learner.ledger.admission import done, head, needed, window
from learner.ledger.events import (
    AnyEvent,
    Closed,
    Consumed,
    Discarded,
    Dropped,
    EvalTaken,
    Formed,
    Joined,
    Leased,
    Published,
    Received,
    Renewed,
    RowsEnded,
    apply,
)
from learner.ledger.leases import (
    cancelled,
    fits,
    generations,
    granted,
    held,
    is_open,
    leasable,
    leased,
    outcome_of,
)
from learner.ledger.resume import resume
from learner.ledger.state import Counters, LedgerState, RowKey, TaskRecord, require
from learner.ledger.types import (
    Batch,
    Cancelled,
    EvalRound,
    Grant,
    LedgerSettings,
    LostReport,
    Receipt,
)
from protocol.errors import LedgerError
from protocol.messages.messages import TaskKind
from protocol.messages.parts import TaskId


class Ledger:
    """The ledger of one learner incarnation. Times are seconds of any one clock."""

    def __init__(self, settings: LedgerSettings, run: str, incarnation: str) -> None:
        self.settings = settings
        self._state = LedgerState(run=run, incarnation=incarnation)
        self._events: list[AnyEvent] = []

    # ---- what is known ------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Batches consumed."""
        return self._state.version

    @property
    def counters(self) -> Counters:
        """Totals; not to be changed."""
        return self._state.counters

    @property
    def queued(self) -> int:
        """Training tasks in the queue, with or without a group."""
        return len(self._state.queue)

    @property
    def in_training(self) -> int:
        """Training tasks of the batch that trains."""
        return len(self._state.training)

    @property
    def finished(self) -> bool:
        """Whether no training task is left and none can join."""
        state = self._state
        exhausted = not state.queue and needed(self.settings, state) <= 0
        return not state.training and (exhausted or done(self.settings, state))

    def leases_held(self, actor: str) -> list[Grant]:
        """Return the open leases of an actor as they were granted, to be told again."""
        return [granted(self._state, r) for r in held(self._state, actor)]

    # ---- tasks join ---------------------------------------------------------------------------

    def room(self) -> int:
        """How many training tasks may join now."""
        free = window(self.settings, self._state) - self.queued
        return max(0, min(free, needed(self.settings, self._state)))

    def join(self, row_key: RowKey, now: float) -> TaskId:
        """Put a row at the end of the queue."""
        require(self.room() > 0, f"row {row_key!r} joined without room; ask room() first")
        return self._join(row_key, "train", None, now)

    def end_of_rows(self, now: float) -> None:
        """Say that no further row will join: the last batch may be short."""
        if not self._state.rows_ended:
            self._emit(RowsEnded(at=now))

    def join_eval(self, rows: Sequence[RowKey], version: int, now: float) -> list[TaskId]:
        """Open an evaluation round, or add rows to the one that is open at the same version."""
        evals = self._state.evals
        pinned = {record.pinned_version for record in evals.values()}
        require(pinned <= {version}, f"evaluation of {version} joined while {pinned} is open")
        total, limit = len(evals) + len(rows), self.settings.max_eval_tasks
        require(total <= limit, f"{total} evaluation tasks; max_eval_tasks allows {limit}")
        return [self._join(row, "eval", version, now) for row in rows]

    # ---- leases -------------------------------------------------------------------------------

    def lease(self, actor: str, free_completions: int, now: float) -> list[Grant]:
        """Give tasks to an actor with room for `free_completions` completions.

        Tasks leased before come first, then evaluation, then new ones; each in queue order. A
        group larger than `free_completions` goes only to an actor that has room and holds no lease.
        """
        published = self._state.published
        if published is None or free_completions <= 0:
            return []
        idle = not held(self._state, actor)
        grants: list[Grant] = []
        for record in leasable(self.settings, self._state):
            rows = generations(self.settings, record)
            if rows > free_completions and not (idle and not grants):
                break
            free_completions -= rows
            pinned = record.pinned_version
            floor = published if pinned is None else pinned
            grants.append(self._grant(record, actor, floor, now))
        return grants

    def progressed(self, actor: str, now: float) -> None:
        """Renew an actor's leases: its main thread moved."""
        if held(self._state, actor):
            self._emit(Renewed(actor=actor, expires_at=now + self.settings.lease_s, at=now))

    def expire(self, now: float) -> list[Cancelled]:
        """End the leases that ran out."""
        due = [r for r in leased(self._state) if r.lease is not None and r.lease.expires_at <= now]
        detail = f"no progress for {self.settings.lease_s:g} s"
        return [self._close(r, "expired", detail, now) for r in due]

    def actor_gone(self, actor: str, now: float, *, blamed: bool = True) -> list[Cancelled]:
        """End an actor's leases. `blamed` False (an orderly leave) spares `max_attempts`."""
        detail = f"actor {actor} {'was lost' if blamed else 'left'}"
        return [
            self._close(r, "gone", detail, now, blamed=blamed) for r in held(self._state, actor)
        ]

    # ---- what comes back ----------------------------------------------------------------------

    def received(
        self, task: TaskId, attempt: int, actor: str, now: float, versions: Iterable[int] = ()
    ) -> Receipt:
        """Take a group; `versions` are those of its policy spans, checked against the lease."""
        outcome = outcome_of(self._state, task, attempt)
        record = self._state.find(task.number)
        if outcome == "accepted" and record is not None:
            if fits(self._state, record, attempt, versions):
                return self._accept(record, attempt, actor, now)
            outcome = "stale"
        self._emit(
            Discarded(number=task.number, attempt=attempt, actor=actor, reason=outcome, at=now)
        )
        if outcome == "stale" and record is not None and is_open(record, attempt):
            closed = self._close(record, "stale", "sampled by a policy outside the lease", now)
            return Receipt(outcome=outcome, dropped=closed.dropped)
        return Receipt(outcome=outcome)

    def failed(self, task: TaskId, attempt: int, reason: str, now: float) -> Receipt:
        """Take note that an attempt gave no group; news of a lease that ended changes nothing."""
        outcome = outcome_of(self._state, task, attempt)
        record = self._state.find(task.number)
        if outcome != "accepted" or record is None:
            return Receipt(outcome=outcome)
        if not is_open(record, attempt):
            return Receipt(outcome="duplicate")
        closed = self._close(record, "failed", reason, now)
        return Receipt(outcome="accepted", dropped=closed.dropped)

    # ---- batches and versions -----------------------------------------------------------------

    def batch_ready(self) -> bool:
        """Whether `form_batch` may be called."""
        return bool(head(self.settings, self._state))

    def form_batch(self, now: float) -> Batch:
        """Move the first B tasks of the queue, all with groups, into training."""
        require(self.batch_ready(), "form_batch without a full batch; ask batch_ready() first")
        records, version = head(self.settings, self._state), self._state.version
        self._emit(Formed(numbers=[r.number for r in records], version=version, at=now))
        return Batch(tasks=[self._id(r) for r in records], version=version)

    def consumed(self) -> int:
        """Say that the batch in training is consumed; returns the new version."""
        self._emit(Consumed(version=self._state.version + 1))
        return self._state.version

    def published(self, version: int, digest: str) -> None:
        """Say that a version can be fetched; nothing is leased before the first."""
        self._emit(Published(version=version, digest=digest))

    def eval_open(self) -> bool:
        """Whether an evaluation round is under way or waits to be taken."""
        return bool(self._state.evals)

    def eval_ready(self) -> bool:
        """Whether every task of the evaluation round has a group or was dropped."""
        evals = self._state.evals
        return bool(evals) and all(record.ended for record in evals.values())

    def take_eval(self) -> EvalRound:
        """Close the evaluation round and return what came of it."""
        require(self.eval_ready(), "take_eval before the round ended; ask eval_ready() first")
        records = list(self._state.evals.values())
        self._emit(EvalTaken(numbers=[r.number for r in records]))
        return EvalRound(
            version=records[0].pinned_version or 0,
            tasks=[self._id(r) for r in records if r.taken is not None],
            dropped={r.row_key: r.dropped for r in records if r.dropped is not None},
        )

    # ---- durability ---------------------------------------------------------------------------

    def drain_events(self) -> list[AnyEvent]:
        """Return the events since the last drain; replayed on the state of then, they give now."""
        events, self._events = self._events, []
        return events

    def state(self) -> LedgerState:
        """Return a copy of the state, for a checkpoint."""
        return self._state.copy()

    @classmethod
    def replay(
        cls, settings: LedgerSettings, state: LedgerState, events: Iterable[AnyEvent]
    ) -> Self:
        """Return the ledger that `events` lead to from `state`, in the same incarnation."""
        ledger = cls(settings, state.run, state.incarnation)
        ledger._state = state.copy()
        for event in events:
            apply(ledger._state, event)
        return ledger

    @classmethod
    def restore(
        cls, settings: LedgerSettings, state: LedgerState, incarnation: str
    ) -> tuple[Self, LostReport]:
        """Resume from a checkpoint as a new incarnation.

        Training tasks that had not been consumed join again, in order, as new tasks. Evaluation
        rows do not: their version may be gone. Nothing is leased until `published` is said.
        """
        ledger = cls(settings, state.run, incarnation)
        ledger._state, lost = resume(state, incarnation)
        return ledger, lost

    # ---- parts --------------------------------------------------------------------------------

    def _emit(self, event: AnyEvent) -> None:
        apply(self._state, event)
        self._events.append(event)

    def _id(self, record: TaskRecord) -> TaskId:
        return self._state.task_id(record.number)

    def _join(self, row_key: RowKey, kind: TaskKind, pinned: int | None, now: float) -> TaskId:
        number = self._state.next_number
        self._emit(Joined(number=number, row_key=row_key, kind=kind, pinned_version=pinned, at=now))
        return self._state.task_id(number)

    def _grant(self, record: TaskRecord, actor: str, floor: int, now: float) -> Grant:
        self._emit(
            Leased(
                number=record.number,
                attempt=len(record.floors) + 1,
                actor=actor,
                min_policy_version=floor,
                expires_at=now + self.settings.lease_s,
                at=now,
            )
        )
        return granted(self._state, record)

    def _accept(self, record: TaskRecord, attempt: int, actor: str, now: float) -> Receipt:
        lease, needless = record.lease, None
        if lease is not None and lease.attempt != attempt:
            needless = cancelled(self._state, record, lease, f"attempt {attempt} came first")
        self._emit(Received(number=record.number, attempt=attempt, actor=actor, at=now))
        return Receipt(outcome="accepted", cancelled=needless)

    def _close(
        self, record: TaskRecord, cause: str, detail: str, now: float, *, blamed: bool = True
    ) -> Cancelled:
        lease = record.lease
        if lease is None:
            raise LedgerError(f"task {record.number} has no lease to end")
        number = record.number
        self._emit(
            Closed(
                number=number,
                attempt=lease.attempt,
                cause=cause,
                detail=detail,
                blamed=blamed,
                at=now,
            )
        )
        dropped = record.failures >= self.settings.max_attempts
        if dropped:
            self._emit(Dropped(number=number, cause=cause, detail=detail, at=now))
        return cancelled(self._state, record, lease, detail, dropped=dropped)
