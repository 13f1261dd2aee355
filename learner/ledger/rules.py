"""The ledger's rules, as pure functions of its settings and state.

The staleness bound. A batch's staleness is the policy version at which it starts to train minus
the oldest version that sampled any of its tokens. It never exceeds `max_staleness`. Why: let

    v = the current policy version, which is the number of batches consumed
    t = 1 while a batch is in training, otherwise 0
    m = the newest version that actors can fetch
    B = the batch size, η = `max_staleness`

1. Batches are the first B tasks of the queue, in order. So ahead of the task at position p
   (counted from 0) there are ⌊p / B⌋ whole batches and the one in training, if any. Its own batch
   starts to train at version v + t + ⌊p / B⌋.
2. That number never grows. Forming a batch raises t by 1 and lowers p by B; consuming it raises v
   by 1 and lowers t by 1; a dropped task lowers p for those behind it; a task that is leased again
   keeps its place.
3. A task joins the queue, and is leased, only while v + t + ⌊p / B⌋ <= m + η. These are the
   positions p < (η + 1 - (v + t - m)) * B, which `staleness_window` counts.
4. Its lease says that no token may be sampled below version m (`min_policy_version`), and a group
   that breaks this is not accepted (`sampled_within_lease`).

By 1 to 3 the task trains at version m + η at the latest, and by 4 its tokens are no older than m.
If every version is published at once (m = v), the rule says that queued and training tasks together
never exceed (η + 1) * B; a late publication makes the window smaller.

The last batch. Dropped tasks are replaced by further rows while there are any. Once the rows have
ended and fewer than B tasks remain, the last batch is short.
"""

from collections.abc import Iterable
from itertools import islice

from learner.ledger.state import LedgerState, TaskRecord
from learner.ledger.types import LedgerSettings, Rejection
from protocol.messages.parts import TaskId


def staleness_window(settings: LedgerSettings, state: LedgerState) -> int:
    """Return how many positions of the queue the published policy is new enough for."""
    if state.published is None:
        return 0
    unpublished = state.version + bool(state.training) - state.published
    return max(0, settings.max_staleness + 1 - unpublished) * settings.batch_size


def is_last_batch_consumed(settings: LedgerSettings, state: LedgerState) -> bool:
    """Whether the run has consumed `total_batches`."""
    return settings.total_batches is not None and state.version >= settings.total_batches


def tasks_needed(settings: LedgerSettings, state: LedgerState) -> int:
    """Return how many more tasks must join before the run has enough; 0 or less: none."""
    if state.rows_ended:
        return 0
    if settings.total_batches is None:  # always more: only the window limits how many
        return max(1, staleness_window(settings, state))

    batches_left = settings.total_batches - state.version - bool(state.training)
    return batches_left * settings.batch_size - len(state.queue)


def room(settings: LedgerSettings, state: LedgerState) -> int:
    """Return how many training tasks may join the queue now."""
    free = staleness_window(settings, state) - len(state.queue)
    return max(0, min(free, tasks_needed(settings, state)))


def is_finished(settings: LedgerSettings, state: LedgerState) -> bool:
    """Whether no training task is left and none will join."""
    exhausted = not state.queue and tasks_needed(settings, state) <= 0
    return not state.training and (exhausted or is_last_batch_consumed(settings, state))


def next_batch(settings: LedgerSettings, state: LedgerState) -> list[TaskRecord]:
    """Return the tasks of the next batch, in order, or none while one of them lacks its group."""
    if state.training or is_last_batch_consumed(settings, state):
        return []

    first = list(islice(state.queue.values(), settings.batch_size))
    complete = len(first) == settings.batch_size or tasks_needed(settings, state) <= 0
    return first if complete and all(record.taken is not None for record in first) else []


def find_open(state: LedgerState, task: TaskId, attempt: int) -> TaskRecord | Rejection:
    """Return the open task that a message about an attempt is for, or why there is none."""
    if task != state.task_id(task.number) or not 0 <= task.number < state.next_number:
        return "unknown"
    record = state.find(task.number)
    if record is not None and not 1 <= attempt <= len(record.floors):
        return "unknown"
    if task.number in state.dropped:
        return "dropped"
    if record is None or record.ended:
        return "duplicate"
    return record


def sampled_within_lease(
    state: LedgerState, record: TaskRecord, attempt: int, versions: Iterable[int]
) -> bool:
    """Whether the policy versions that sampled a group are those that its lease allows."""
    oldest, pinned = record.floors[attempt - 1], record.pinned_version
    newest = state.version if pinned is None else pinned
    return all(oldest <= version <= newest for version in versions)
