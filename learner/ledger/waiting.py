"""The tasks that wait, for a lease or for a group: derived from the ledger's state, never stored.

A look costs what has changed since the last one, not what is queued. Numbers ascend along the
queue, so that the smallest number is the first in queue order.
"""

import heapq
from collections.abc import Callable, Mapping
from itertools import islice

from learner.ledger import rules
from learner.ledger.state import LedgerState, TaskRecord
from learner.ledger.types import LedgerSettings
from protocol.messages.messages import TaskKind

KINDS: tuple[TaskKind, ...] = ("train", "eval")


class WaitingTasks:
    """Which task is leased next, and which is the first without a group."""

    def __init__(self, settings: LedgerSettings, state: LedgerState) -> None:
        self._settings, self._state = settings, state
        self._retries = {kind: _Front(state, kind, _is_retry) for kind in KINDS}
        self._new = {kind: _Front(state, kind, _is_new) for kind in KINDS}
        self._unanswered = {kind: _Front(state, kind, _is_unanswered) for kind in KINDS}

    def joined(self, number: int, kind: TaskKind) -> None:
        """Note a task that joined."""
        self._new[kind].add(number)
        self._unanswered[kind].add(number)

    def returned(self, number: int) -> None:
        """Note a task whose lease ended without a group."""
        self._retries["train" if number in self._state.queue else "eval"].add(number)

    def next_to_lease(self) -> TaskRecord | None:
        """Return the task to lease next: a retry, else one of an evaluation, else a new one."""
        end = self._end_of_window()
        retries, new = self._retries, self._new

        # Retries first: a batch cannot form while a task at the head of the queue lacks its group.
        for front in (retries["train"], retries["eval"], new["eval"], new["train"]):
            record = front.first()
            if record is not None and (record.kind == "eval" or record.number < end):
                return record
        return None

    def is_evaluated(self) -> bool:
        """Whether every task of the evaluation round has a group or was dropped."""
        return self._unanswered["eval"].first() is None

    def may_form_batch(self) -> bool:
        """Whether the first tasks of the queue may all have groups; False is certain.

        Dropped tasks leave gaps in the numbers, so that the first task without a group may be
        nearer to the head of the queue than its number says.
        """
        missing = self._unanswered["train"].first()
        head = next(iter(self._state.queue), 0)
        return missing is None or missing.number >= head + self._settings.batch_size

    def _end_of_window(self) -> float:
        """Return the number at which the part of the queue that may be leased ends."""
        window, queue = rules.staleness_window(self._settings, self._state), self._state.queue
        if len(queue) <= window:
            return float("inf")
        # Rare: before the first publication, and after a resume with a tighter bound.
        return next(islice(queue, window, None))


class _Front:
    """The first task of those that `belongs` is true of: a heap of numbers.

    A task that no longer belongs stays in the heap until it comes to the front.
    """

    def __init__(
        self, state: LedgerState, kind: TaskKind, belongs: Callable[[TaskRecord], bool]
    ) -> None:
        self._state, self._kind, self._belongs = state, kind, belongs
        self._heap = [number for number, record in self._tasks().items() if belongs(record)]
        heapq.heapify(self._heap)

    def add(self, number: int) -> None:
        heapq.heappush(self._heap, number)

    def first(self) -> TaskRecord | None:
        tasks = self._tasks()
        while self._heap:
            record = tasks.get(self._heap[0])
            if record is not None and self._belongs(record):
                return record
            heapq.heappop(self._heap)
        return None

    def _tasks(self) -> Mapping[int, TaskRecord]:
        return self._state.queue if self._kind == "train" else self._state.evals


def _is_retry(record: TaskRecord) -> bool:
    return record.waiting and bool(record.floors)


def _is_new(record: TaskRecord) -> bool:
    return record.waiting and not record.floors


def _is_unanswered(record: TaskRecord) -> bool:
    return not record.ended
