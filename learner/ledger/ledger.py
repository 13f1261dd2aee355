"""The ledger: which task is queued, leased, answered, in training, trained or dropped.

    row ─ join ─▶ queue ─ lease ─▶ actor ─ received ─▶ queue ─ form_batch ─▶ training ─ consumed
                    ▲                │
                    └─ same place ───┘ failed, expire, actor_gone; after max_attempts: dropped

Every operation decides by the rules (`rules.py`, which also proves the staleness bound), expresses
its decision as events (`events.py`), and applies them to the state (`state.py`). The caller drains
the events into its journal (`journal.py`). Times are passed in, in seconds, all from one clock.

What an operation looks up is kept beside the state, in memory and derived from it (`waiting.py`,
`leases.py`), so that its cost does not grow with the number of tasks or actors.
"""

from collections.abc import Iterable, Sequence
from typing import Self

from learner.ledger import rules
from learner.ledger.events import (
    AnyEvent,
    BatchConsumed,
    BatchFormed,
    BatchReturned,
    EvaluationTaken,
    GroupDiscarded,
    GroupReceived,
    IncarnationBegan,
    LeaseClosed,
    PolicyPublished,
    RowsEnded,
    TaskDropped,
    TaskJoined,
    TaskLeased,
)
from learner.ledger.leases import OpenLeases
from learner.ledger.results import ended_lease, eval_round, grant, resume_report
from learner.ledger.state import LedgerState, RowKey, TaskRecord, require
from learner.ledger.types import (
    Batch,
    EndedLease,
    EvalRound,
    Grant,
    LedgerSettings,
    Receipt,
    Rejection,
    ResumeReport,
)
from learner.ledger.waiting import WaitingTasks
from protocol.errors import LedgerError
from protocol.messages.messages import TaskKind
from protocol.messages.parts import TaskId


class Ledger:
    """The ledger of one learner incarnation. `state` is for reading; operations change it."""

    def __init__(self, settings: LedgerSettings, state: LedgerState) -> None:
        self.settings = settings
        self._events: list[AnyEvent] = []
        self._use(state)

    @classmethod
    def new(cls, settings: LedgerSettings, run: str, incarnation: str) -> Self:
        """Return the ledger of a run that begins."""
        ledger = cls(settings, LedgerState(run=run, incarnation=""))
        ledger.begin_incarnation(incarnation, keep_groups=False)
        return ledger

    def begin_incarnation(self, incarnation: str, *, keep_groups: bool) -> ResumeReport:
        """Continue as a new incarnation (see `LedgerState.begin`), and say what that ended."""
        before = self.state.copy()
        self._emit(IncarnationBegan(incarnation=incarnation, keep_groups=keep_groups))
        return resume_report(before, self.state, keep_groups=keep_groups)

    def _use(self, state: LedgerState) -> None:
        """Work on a state: derive from it what operations look up."""
        self.state = state
        self._waiting = WaitingTasks(self.settings, state)
        self._leases = OpenLeases(self.settings, state)

    def drain_events(self) -> list[AnyEvent]:
        """Return the events since the last drain."""
        events, self._events = self._events, []
        return events

    # ---- tasks join ---------------------------------------------------------------------------

    def room(self) -> int:
        return rules.room(self.settings, self.state)

    def is_finished(self) -> bool:
        return rules.is_finished(self.settings, self.state)

    def join(self, row_key: RowKey, now: float) -> TaskId:
        """Add a row to the end of the queue."""
        require(self.room() > 0, f"row {row_key!r} joined without room; ask room() first")
        return self._join(row_key, "train", None, now)

    def end_of_rows(self, now: float) -> None:
        """Record that no further row will join, so that the last batch may be short."""
        if not self.state.rows_ended:
            self._emit(RowsEnded(at=now))

    def join_eval(self, rows: Sequence[RowKey], version: int, now: float) -> list[TaskId]:
        """Open an evaluation round, or add rows to an open one of the same version."""
        evals = self.state.evals
        pinned = {record.pinned_version for record in evals.values()}
        require(pinned <= {version}, f"evaluation of {version} joined while {pinned} is open")
        total, limit = len(evals) + len(rows), self.settings.max_eval_tasks
        require(total <= limit, f"{total} evaluation tasks; max_eval_tasks allows {limit}")

        return [self._join(row, "eval", version, now) for row in rows]

    def _join(self, row_key: RowKey, kind: TaskKind, pinned: int | None, now: float) -> TaskId:
        number = self.state.next_number
        self._emit(
            TaskJoined(number=number, row_key=row_key, kind=kind, pinned_version=pinned, at=now)
        )
        return self.state.task_id(number)

    # ---- leases -------------------------------------------------------------------------------

    def lease(self, actor: str, free_completions: int, now: float) -> list[Grant]:
        """Lease tasks to an actor that has room for `free_completions` completions.

        Retries come first, then evaluation, then new tasks, each in queue order. A group larger
        than `free_completions` goes only to an actor that has room and holds no lease.
        """
        published = self.state.published
        if published is None or free_completions <= 0:
            return []

        idle = self.is_idle(actor)
        grants: list[Grant] = []
        while (record := self._waiting.next_to_lease()) is not None:
            completions = self.settings.completions(record.kind)
            # An idle actor may take one group larger than its room, or nobody ever would.
            if completions > free_completions and not (idle and not grants):
                break
            free_completions -= completions

            pinned = record.pinned_version
            self._emit(
                TaskLeased(
                    number=record.number,
                    attempt=len(record.floors) + 1,
                    actor=actor,
                    min_policy_version=published if pinned is None else pinned,
                    at=now,
                )
            )
            grants.append(grant(self.state, record))
        return grants

    def completions_to_lease(self) -> int | None:
        """Return how many completions the task asks for that is leased next; None: there is none.

        Nothing is leased before a policy was published.
        """
        record = None if self.state.published is None else self._waiting.next_to_lease()
        return None if record is None else self.settings.completions(record.kind)

    def leases_of(self, actor: str) -> list[Grant]:
        """Return an actor's open leases as they were granted, so that they can be sent again."""
        return [grant(self.state, record) for record in self._leases.of(actor)]

    def is_idle(self, actor: str) -> bool:
        """Whether an actor holds no lease."""
        return self._leases.is_idle(actor)

    def holder(self, number: int) -> str | None:
        """Return the actor that a task is leased to, if it is."""
        return self._leases.holder(number)

    def lease_age(self, number: int, now: float) -> float:
        """Return for how many seconds a task has been leased to its actor."""
        return self._leases.age(number, now)

    def renew_leases(self, actor: str, now: float) -> None:
        """Extend all of an actor's leases, because it made progress. This is not an event."""
        self._leases.renew(actor, now)

    def expire(self, now: float) -> list[EndedLease]:
        """End the leases whose time is up: without progress, or too old."""
        ended: list[EndedLease] = []
        for record in self._leases.take_due(now):
            if self._leases.is_overdue(record.number, now):
                detail = f"leased for {self.settings.max_lease_s:g} s (queue.max_lease_s)"
                ended.append(self._end_lease(record, "overdue", detail, now))
            else:
                detail = f"no progress for {self.settings.lease_s:g} s"
                ended.append(self._end_lease(record, "expired", detail, now))
        return ended

    def withdraw(
        self, actor: str, detail: str, now: float, *, blamed: bool = True
    ) -> list[EndedLease]:
        """End the leases of an actor that stays connected but does not work."""
        held = self._leases.of(actor)
        return [self._end_lease(r, "withdrawn", detail, now, blamed=blamed) for r in held]

    def actor_gone(self, actor: str, now: float, *, blamed: bool = True) -> list[EndedLease]:
        """End an actor's leases. `blamed` False (it left in good order): not a failed attempt."""
        detail = f"actor {actor} {'was lost' if blamed else 'left'}"
        held = self._leases.of(actor)
        return [self._end_lease(record, "gone", detail, now, blamed=blamed) for record in held]

    def _end_lease(
        self, record: TaskRecord, cause: str, detail: str, now: float, *, blamed: bool = True
    ) -> EndedLease:
        lease, number = record.lease, record.number
        if lease is None:
            raise LedgerError(f"task {number} has no lease to end")

        self._emit(
            LeaseClosed(
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
            self._emit(TaskDropped(number=number, cause=cause, detail=detail, at=now))
        return ended_lease(
            self.state, record, lease, detail, dropped=dropped, overdue=cause == "overdue"
        )

    # ---- what comes back ----------------------------------------------------------------------

    def received(
        self, task: TaskId, attempt: int, actor: str, now: float, versions: Iterable[int] = ()
    ) -> Receipt:
        """Accept or discard a group; `versions` are the policy versions that sampled it."""
        record = rules.find_open(self.state, task, attempt)
        if isinstance(record, str):
            return self._discard(task, attempt, actor, record, now)

        if not rules.sampled_within_lease(self.state, record, attempt, versions):
            receipt = self._discard(task, attempt, actor, "stale", now)
            if not record.is_leased_as(attempt):
                return receipt
            # The attempt is over, so the task can be leased again.
            reason = "sampled by a policy outside the lease"
            ended = self._end_lease(record, "stale", reason, now)
            return Receipt(outcome="stale", dropped=ended.dropped)

        # Whichever attempt comes first counts; another that is under way is no longer needed.
        lease, cancelled = record.lease, None
        if lease is not None and lease.attempt != attempt:
            cancelled = ended_lease(self.state, record, lease, f"attempt {attempt} came first")
        self._emit(GroupReceived(number=record.number, attempt=attempt, actor=actor, at=now))
        return Receipt(outcome="accepted", cancelled=cancelled)

    def failed(self, task: TaskId, attempt: int, reason: str, now: float) -> Receipt:
        """End the lease of a failed attempt; nothing changes if it has already ended."""
        record = rules.find_open(self.state, task, attempt)
        if isinstance(record, str):
            return Receipt(outcome=record)
        if not record.is_leased_as(attempt):
            return Receipt(outcome="duplicate")

        ended = self._end_lease(record, "failed", reason, now)
        return Receipt(outcome="accepted", dropped=ended.dropped)

    def _discard(
        self, task: TaskId, attempt: int, actor: str, reason: Rejection, now: float
    ) -> Receipt:
        self._emit(
            GroupDiscarded(number=task.number, attempt=attempt, actor=actor, reason=reason, at=now)
        )
        return Receipt(outcome=reason)

    # ---- batches, versions and evaluations ----------------------------------------------------

    def batch_ready(self) -> bool:
        """Whether `form_batch` may be called."""
        return self._waiting.may_form_batch() and bool(rules.next_batch(self.settings, self.state))

    def form_batch(self, now: float) -> Batch:
        """Move the first B tasks of the queue, which all have groups, into training."""
        records, version = rules.next_batch(self.settings, self.state), self.state.version
        require(bool(records), "form_batch without a full batch; ask batch_ready() first")

        self._emit(BatchFormed(numbers=[r.number for r in records], version=version, at=now))
        return Batch(tasks=[self.state.task_id(r.number) for r in records], version=version)

    def return_batch(self, reason: str, now: float, also: Sequence[int] = ()) -> None:
        """Queue the tasks of the batch in training again: their groups cannot be trained on.

        Nor can those of the queued tasks `also`.
        """
        self._emit(BatchReturned(detail=reason, at=now, also=list(also)))

    def consumed(self) -> None:
        """Record that the batch in training was consumed, which makes a new policy version."""
        self._emit(BatchConsumed(version=self.state.version + 1))

    def published(self, version: int, digest: str, tensors: bytes = b"") -> None:
        """Record that actors can fetch a version; nothing is leased before the first."""
        self._emit(PolicyPublished(version=version, digest=digest, tensors=tensors))

    def eval_ready(self) -> bool:
        """Whether every task of the open evaluation round has a group or was dropped."""
        return bool(self.state.evals) and self._waiting.is_evaluated()

    def take_eval(self) -> EvalRound:
        """Close the evaluation round and return its results."""
        require(self.eval_ready(), "take_eval before the round ended; ask eval_ready() first")
        ended = eval_round(self.state)
        self._emit(EvaluationTaken(numbers=list(self.state.evals)))
        return ended

    def _emit(self, event: AnyEvent) -> None:
        event.apply_to(self.state)
        self._events.append(event)

        match event:
            case IncarnationBegan() | BatchReturned():
                self._use(self.state)  # rare: every task may have changed
            case TaskJoined(number=number, kind=kind):
                self._waiting.joined(number, kind)
            case TaskLeased():
                self._leases.opened(event.number, event.attempt, event.actor, event.at)
            case GroupReceived(number=number):
                self._leases.closed(number)
            case LeaseClosed(number=number):
                self._leases.closed(number)
                self._waiting.returned(number)
            case (
                GroupDiscarded()
                | TaskDropped()
                | RowsEnded()
                | BatchFormed()
                | BatchConsumed()
                | PolicyPublished()
                | EvaluationTaken()
            ):
                pass  # what these change is seen when it is looked up
