"""The open leases by actor and by the time at which they end: in memory only, never stored.

A lease ends `lease_s` after its actor last made progress, or after it was given if that is later,
and `max_lease_s` after it was given whatever its actor reports. Progress is a number per actor: to
note it costs the same however many leases and actors there are.
"""

import heapq
from collections import defaultdict
from dataclasses import dataclass, field

from learner.ledger.state import LedgerState, TaskRecord
from learner.ledger.types import LedgerSettings


@dataclass
class OpenLeases:
    """Who holds which tasks, and which leases are due.

    `_given` says to whom each task is leased and since when, `_progress` when each of them last
    made progress. `_ends` is a heap of (time, task, attempt): no lease ends before its time there,
    and when that has come, its end is worked out again.
    """

    settings: LedgerSettings
    state: LedgerState
    _held: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    _given: dict[int, tuple[str, float | None]] = field(
        default_factory=dict[int, tuple[str, float | None]]
    )
    _progress: dict[str, float] = field(default_factory=dict[str, float])
    _ends: list[tuple[float, int, int]] = field(default_factory=list[tuple[float, int, int]])

    def __post_init__(self) -> None:
        """Take in the leases of a restored state: they count as given at the next `take_due`.

        Their own times are those of another process's clock, and actors could not report meanwhile.
        """
        for record, lease in self.state.open_leases():
            self._held[lease.actor].add(record.number)
            self._given[record.number] = lease.actor, None
            heapq.heappush(self._ends, (float("-inf"), record.number, lease.attempt))

    def opened(self, number: int, attempt: int, actor: str, now: float) -> None:
        """Note a lease that was given."""
        self._held[actor].add(number)
        self._given[number] = actor, now
        heapq.heappush(self._ends, (self._end(actor, now), number, attempt))

    def closed(self, number: int) -> None:
        """Note that a task is no longer leased, if it was."""
        actor, _ = self._given.pop(number, ("", 0.0))
        held = self._held.get(actor, set())
        held.discard(number)
        if not held:
            # An actor is remembered only while it holds something.
            self._held.pop(actor, None)
            self._progress.pop(actor, None)

    def renew(self, actor: str, now: float) -> None:
        """Note that an actor made progress."""
        if actor in self._held:
            self._progress[actor] = now

    def is_idle(self, actor: str) -> bool:
        """Whether an actor holds no lease."""
        return actor not in self._held

    def of(self, actor: str) -> list[TaskRecord]:
        """Return the tasks that an actor holds, training tasks first, in order."""
        records = [self.state.find(number) for number in self._held.get(actor, ())]
        return in_order([record for record in records if record is not None])

    def take_due(self, now: float) -> list[TaskRecord]:
        """Return the tasks whose leases are over, training tasks first, in order."""
        due: list[TaskRecord] = []
        while self._ends and self._ends[0][0] <= now:
            _, number, attempt = heapq.heappop(self._ends)
            record = self.state.find(number)
            if record is None or record.lease is None or record.lease.attempt != attempt:
                continue

            actor, since = self._given[number]
            if since is None:
                since = now
                self._given[number] = actor, now
            end = self._end(actor, since)
            if end <= now:
                due.append(record)
            else:
                heapq.heappush(self._ends, (end, number, attempt))
        return in_order(due)

    def is_overdue(self, number: int, now: float) -> bool:
        """Whether a lease has reached the age limit."""
        since = self._given[number][1]
        return since is not None and since + self.settings.max_lease_s <= now

    def age(self, number: int, now: float) -> float:
        """Return for how many seconds a task has been leased."""
        since = self._given[number][1]
        return 0.0 if since is None else now - since

    def holder(self, number: int) -> str | None:
        """Return the actor that a task is leased to, if it is."""
        given = self._given.get(number)
        return None if given is None else given[0]

    def _end(self, actor: str, since: float) -> float:
        progress = max(since, self._progress.get(actor, since))
        return min(progress + self.settings.lease_s, since + self.settings.max_lease_s)


def in_order(records: list[TaskRecord]) -> list[TaskRecord]:
    """Sort tasks: training tasks first, then evaluation, each in queue order."""
    return sorted(records, key=lambda record: (record.kind == "eval", record.number))
