"""How many tasks may wait, and which are the next batch.

The bound. Let v be the version (batches consumed), m the newest version that can be fetched, t 1
while a batch trains and 0 otherwise. A task at position p of the queue begins to train at version
v + t + ⌊p / B⌋; trained tasks and drops never raise that. It is joined, and leased, only while that
is at most m + η, and no token for it is sampled below m: hence staleness never exceeds η. With
m = v this is the rule "queued + in training < (η + 1) · B"; a late publication tightens it.

The end. Once `end_of_rows` was said and fewer than B tasks remain, the last batch is short. Dropped
tasks are replaced by further rows while there are any.
"""

from learner.ledger.state import LedgerState, TaskRecord
from learner.ledger.types import LedgerSettings


def window(settings: LedgerSettings, state: LedgerState) -> int:
    """How many positions of the queue the published policy is new enough for."""
    if state.published is None:
        return 0
    late = state.version + bool(state.training) - state.published
    return max(0, settings.max_staleness + 1 - late) * settings.batch_size


def done(settings: LedgerSettings, state: LedgerState) -> bool:
    """Whether the run consumed all its batches."""
    return settings.total_batches is not None and state.version >= settings.total_batches


def needed(settings: LedgerSettings, state: LedgerState) -> int:
    """How many tasks the run still lacks; without `total_batches`, never less than the window."""
    if state.rows_ended:
        return 0
    if settings.total_batches is None:
        return max(1, window(settings, state))
    batches = settings.total_batches - state.version - bool(state.training)
    return batches * settings.batch_size - len(state.queue)


def head(settings: LedgerSettings, state: LedgerState) -> list[TaskRecord]:
    """Return the tasks of the next batch, in order; none while one of them lacks its group."""
    if state.training or done(settings, state):
        return []
    first = list(state.queue.values())[: settings.batch_size]
    full = len(first) == settings.batch_size or needed(settings, state) <= 0
    return first if full and all(record.taken is not None for record in first) else []
