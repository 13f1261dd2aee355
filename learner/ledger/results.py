"""What operations of the ledger return, made from its state."""

from learner.ledger.state import Lease, LedgerState, TaskRecord
from learner.ledger.types import EndedLease, EvalRound, Grant, RejoinedTask, ResumeReport


def grant(state: LedgerState, record: TaskRecord) -> Grant:
    """Return the open lease of a task, as its actor was given it."""
    return Grant(
        task=state.task_id(record.number),
        attempt=len(record.floors),
        kind=record.kind,
        row_key=record.row_key,
        min_policy_version=record.floors[-1],
        pinned_version=record.pinned_version,
    )


def ended_lease(
    state: LedgerState,
    record: TaskRecord,
    lease: Lease,
    reason: str,
    *,
    dropped: bool = False,
    overdue: bool = False,
) -> EndedLease:
    """Return a lease that was ended for a reason."""
    return EndedLease(
        task=state.task_id(record.number),
        attempt=lease.attempt,
        actor=lease.actor,
        reason=reason,
        dropped=dropped,
        overdue=overdue,
    )


def resume_report(old: LedgerState, new: LedgerState, *, keep_groups: bool) -> ResumeReport:
    """Return what the beginning of an incarnation ended."""
    unfinished = old.unfinished
    groups = [] if keep_groups else [r for r in unfinished if r.taken is not None]
    return ResumeReport(
        groups=[old.task_id(record.number) for record in groups],
        leases=[ended_lease(old, r, lease, "learner resumed") for r, lease in old.open_leases()],
        eval_rows=[record.row_key for record in old.evals.values()],
        rejoined=rejoined_tasks(old, new),
    )


def rejoined_tasks(old: LedgerState, new: LedgerState) -> list[RejoinedTask]:
    """Return what became of the unfinished tasks when a new incarnation began."""
    return [
        RejoinedTask(old=old.task_id(r.number), new=new.task_id(number), row_key=r.row_key)
        for r, number in zip(old.unfinished, new.queue, strict=True)
    ]


def eval_round(state: LedgerState) -> EvalRound:
    """Return what the open evaluation round, which must have ended, came to."""
    records = list(state.evals.values())
    return EvalRound(
        version=records[0].pinned_version or 0,
        tasks=[state.task_id(r.number) for r in records if r.taken is not None],
        dropped={r.row_key: r.dropped for r in records if r.dropped is not None},
    )
