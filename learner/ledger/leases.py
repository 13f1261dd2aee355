"""Which leases are out, what may be leased next, and what news of an attempt can count for."""

from collections.abc import Iterable

from learner.ledger.admission import window
from learner.ledger.state import Lease, LedgerState, TaskRecord
from learner.ledger.types import Cancelled, Grant, LedgerSettings, Outcome
from protocol.messages.parts import TaskId


def leased(state: LedgerState) -> list[TaskRecord]:
    """Return the tasks that an actor works on."""
    tables = (state.queue, state.evals)
    return [r for table in tables for r in table.values() if r.lease is not None]


def held(state: LedgerState, actor: str) -> list[TaskRecord]:
    """Return the tasks that this actor works on."""
    return [r for r in leased(state) if r.lease is not None and r.lease.actor == actor]


def leasable(settings: LedgerSettings, state: LedgerState) -> list[TaskRecord]:
    """Return the tasks that may be leased: those leased before, then evaluation, then new ones."""
    train = list(state.queue.values())[: window(settings, state)]
    evals = list(state.evals.values())
    again = [r for r in (*train, *evals) if r.waiting and r.floors]
    new = [r for r in (*evals, *train) if r.waiting and not r.floors]
    return again + new


def generations(settings: LedgerSettings, record: TaskRecord) -> int:
    """How many completions a task asks for."""
    return settings.num_generations if record.kind == "train" else settings.eval_generations


def is_open(record: TaskRecord, attempt: int) -> bool:
    """Whether an actor works on this very attempt."""
    return record.lease is not None and record.lease.attempt == attempt


def outcome_of(state: LedgerState, task: TaskId, attempt: int) -> Outcome:
    """Say what a message about this attempt can count for, before its versions are seen."""
    known = task == state.task_id(task.number) and 0 <= task.number < state.next_number
    record = state.find(task.number) if known else None
    if not known or (record is not None and not 1 <= attempt <= len(record.floors)):
        return "unknown"
    if task.number in state.dropped:
        return "dropped"
    if record is None or record.ended:
        return "duplicate"
    return "accepted"


def fits(state: LedgerState, record: TaskRecord, attempt: int, versions: Iterable[int]) -> bool:
    """Whether the versions that sampled a group are those that its lease allows."""
    floor, pinned = record.floors[attempt - 1], record.pinned_version
    newest = state.version if pinned is None else pinned
    return all(floor <= version <= newest for version in versions)


def granted(state: LedgerState, record: TaskRecord) -> Grant:
    """Return a task's newest lease, as it was granted."""
    return Grant(
        task=state.task_id(record.number),
        attempt=len(record.floors),
        kind=record.kind,
        row_key=record.row_key,
        min_policy_version=record.floors[-1],
        pinned_version=record.pinned_version,
    )


def cancelled(
    state: LedgerState, record: TaskRecord, lease: Lease, reason: str, *, dropped: bool = False
) -> Cancelled:
    """Return word of a lease that ended without a group of its own."""
    return Cancelled(
        task=state.task_id(record.number),
        attempt=lease.attempt,
        actor=lease.actor,
        reason=reason,
        dropped=dropped,
    )
