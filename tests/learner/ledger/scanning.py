"""The ledger's look-ups, defined by scanning its state, and a ledger that is held to them."""

from collections.abc import Callable
from typing import Any

from learner.ledger import rules
from learner.ledger.events import TaskLeased
from learner.ledger.ledger import Ledger
from learner.ledger.state import LedgerState, TaskRecord
from learner.ledger.types import EndedLease, Grant, LedgerSettings


class ScanningLedger(Ledger):
    """A ledger that looks at every task for every answer."""

    def _use(self, state: LedgerState) -> None:
        super()._use(state)
        self.given: dict[int, float] = {}
        self.expires: dict[int, float] = {}

    def held(self, actor: str | None = None) -> list[TaskRecord]:
        return [r for r, lease in self.state.open_leases() if actor in (None, lease.actor)]

    def to_lease(self) -> list[TaskRecord]:
        """Return the tasks that may be leased: retries first, then evaluation, then new tasks."""
        window = rules.staleness_window(self.settings, self.state)
        train = list(self.state.queue.values())[:window]
        evals = list(self.state.evals.values())
        retries = [r for r in (*train, *evals) if r.waiting and r.floors]
        new = [r for r in (*evals, *train) if r.waiting and not r.floors]
        return retries + new

    def completions_to_lease(self) -> int | None:
        found = self.to_lease() if self.state.published is not None else []
        return self.settings.completions(found[0].kind) if found else None

    def lease(self, actor: str, free_completions: int, now: float) -> list[Grant]:
        published, idle = self.state.published, not self.held(actor)
        granted: list[int] = []
        if published is None or free_completions <= 0:
            return []
        for record in self.to_lease():
            completions = self.settings.completions(record.kind)
            if completions > free_completions and not (idle and not granted):
                break
            free_completions -= completions
            floor = published if record.pinned_version is None else record.pinned_version
            attempt = len(record.floors) + 1
            self._emit(
                TaskLeased(
                    number=record.number,
                    attempt=attempt,
                    actor=actor,
                    min_policy_version=floor,
                    at=now,
                )
            )
            self.given[record.number] = now
            self.expires[record.number] = now + self.settings.lease_s
            granted.append(record.number)
        return [grant for number in granted for grant in self.grants(actor) if is_of(grant, number)]

    def grants(self, actor: str) -> list[Grant]:
        return [
            Grant(
                task=self.state.task_id(record.number),
                attempt=len(record.floors),
                kind=record.kind,
                row_key=record.row_key,
                min_policy_version=record.floors[-1],
                pinned_version=record.pinned_version,
            )
            for record in self.held(actor)
        ]

    def leases_of(self, actor: str) -> list[Grant]:
        return self.grants(actor)

    def is_idle(self, actor: str) -> bool:
        return not self.held(actor)

    def renew_leases(self, actor: str, now: float) -> None:
        for record in self.held(actor):
            self.expires[record.number] = now + self.settings.lease_s

    def expire(self, now: float) -> list[EndedLease]:
        longest, ended = self.settings.max_lease_s, []
        for record in self.held():
            number = record.number
            if number not in self.given:  # of a restored state
                self.given[number], self.expires[number] = now, now + self.settings.lease_s
            if self.given[number] + longest <= now:
                detail = f"leased for {longest:g} s (queue.max_lease_s)"
                ended.append(self._end_lease(record, "overdue", detail, now))
            elif self.expires[number] <= now:
                detail = f"no progress for {self.settings.lease_s:g} s"
                ended.append(self._end_lease(record, "expired", detail, now))
        return ended

    def withdraw(
        self, actor: str, detail: str, now: float, *, blamed: bool = True
    ) -> list[EndedLease]:
        held = self.held(actor)
        return [self._end_lease(r, "withdrawn", detail, now, blamed=blamed) for r in held]

    def actor_gone(self, actor: str, now: float, *, blamed: bool = True) -> list[EndedLease]:
        detail = f"actor {actor} {'was lost' if blamed else 'left'}"
        held = self.held(actor)
        return [self._end_lease(record, "gone", detail, now, blamed=blamed) for record in held]

    def batch_ready(self) -> bool:
        return bool(rules.next_batch(self.settings, self.state))

    def eval_ready(self) -> bool:
        evals = self.state.evals
        return bool(evals) and all(record.ended for record in evals.values())


def is_of(grant: Grant, number: int) -> bool:
    return grant.task.number == number


class CheckedLedger(Ledger):
    """A ledger whose every answer, and every state, is that of a `ScanningLedger`."""

    def __init__(self, settings: LedgerSettings, state: LedgerState) -> None:
        self.twin = ScanningLedger(settings, state.copy())
        super().__init__(settings, state)

    def _use(self, state: LedgerState) -> None:
        super()._use(state)
        self.twin._use(state.copy())


def _checked(name: str) -> Callable[..., Any]:
    def call(self: CheckedLedger, *args: Any, **kwargs: Any) -> Any:
        answer = getattr(Ledger, name)(self, *args, **kwargs)
        assert answer == getattr(self.twin, name)(*args, **kwargs), name
        assert self.state == self.twin.state, name
        return answer

    return call


CHANGES = (
    "join", "end_of_rows", "join_eval", "lease", "renew_leases", "expire", "withdraw", "actor_gone",
    "received", "failed", "form_batch", "consumed", "published", "take_eval",
)  # fmt: skip
QUESTIONS = ("completions_to_lease", "leases_of", "is_idle", "batch_ready", "eval_ready")
for _name in CHANGES + QUESTIONS:
    setattr(CheckedLedger, _name, _checked(_name))
