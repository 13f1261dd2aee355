"""How a resumed learner takes over a checkpointed ledger."""

from learner.ledger.state import LedgerState, TaskRecord, require
from learner.ledger.types import Cancelled, LostReport, Outstanding


def resume(state: LedgerState, incarnation: str) -> tuple[LedgerState, LostReport]:
    """Return the state of a new incarnation, and what it lost.

    Training tasks that had not been consumed join again, in order, as new tasks. Evaluation rows
    do not: their version may be gone. Nothing is published yet.
    """
    require(incarnation != state.incarnation, "a resumed learner needs a new incarnation")
    outstanding = [*state.training.values(), *state.queue.values()]
    evals = list(state.evals.values())
    new = state.copy()
    new.incarnation, new.published, new.digest = incarnation, None, ""
    new.training, new.evals = {}, {}
    new.queue = {
        number: TaskRecord(number=number, row_key=record.row_key, kind="train")
        for number, record in enumerate(outstanding, start=state.next_number)
    }
    new.next_number += len(outstanding)
    lost = LostReport(
        groups=[state.task_id(r.number) for r in outstanding if r.taken is not None],
        leases=[
            Cancelled(
                task=state.task_id(r.number),
                attempt=r.lease.attempt,
                actor=r.lease.actor,
                reason="learner resumed",
            )
            for r in (*outstanding, *evals)
            if r.lease is not None
        ],
        eval_rows=[r.row_key for r in evals],
        rejoined=[
            Outstanding(old=state.task_id(old.number), new=new.task_id(number), row_key=old.row_key)
            for old, number in zip(outstanding, new.queue, strict=True)
        ],
    )
    return new, lost
