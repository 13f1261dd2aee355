"""The ledger's settings and the values its operations return."""

from typing import Literal

import msgspec

from learner.ledger.state import RowKey, require
from protocol.messages.messages import TaskKind
from protocol.messages.parts import TaskId

Rejection = Literal["duplicate", "dropped", "stale", "unknown"]
Outcome = Literal["accepted"] | Rejection


class LedgerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger's limits.

    `batch_size` is in groups, `max_staleness` in batches. `total_batches` None means that the run
    lasts until `end_of_rows`. A lease ends `lease_s` after its actor's last progress, and
    `max_lease_s` after it was given. `max_attempts` failed attempts drop a task.
    """

    batch_size: int
    max_staleness: int
    num_generations: int
    eval_generations: int = 1
    total_batches: int | None = None
    lease_s: float = 120.0
    max_lease_s: float = 3600.0
    max_attempts: int = 3
    max_eval_tasks: int = 4096

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_generations", "eval_generations", "max_attempts"):
            require(getattr(self, name) >= 1, f"LedgerSettings.{name} must be at least 1")
        require(self.max_staleness >= 0, "LedgerSettings.max_staleness must be at least 0")
        require(self.lease_s > 0, "LedgerSettings.lease_s must be above 0")
        require(self.max_lease_s > 0, "LedgerSettings.max_lease_s must be above 0")

    def completions(self, kind: TaskKind) -> int:
        """Return how many completions a task asks for."""
        return self.num_generations if kind == "train" else self.eval_generations


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """A lease given to an actor: the ledger's part of a `Task` message."""

    task: TaskId
    attempt: int
    kind: TaskKind
    row_key: RowKey
    min_policy_version: int
    pinned_version: int | None


class EndedLease(msgspec.Struct, frozen=True, kw_only=True):
    """A lease that ended before its own group came.

    `dropped`: the task was given up as well. `overdue`: the lease had reached its age limit.
    """

    task: TaskId
    attempt: int
    actor: str
    reason: str
    dropped: bool = False
    overdue: bool = False


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a group or of a reported failure.

    Only an "accepted" group is kept, but every group is acknowledged. `cancelled` is the lease of
    another attempt that is no longer needed. `dropped`: the task was given up.
    """

    outcome: Outcome
    cancelled: EndedLease | None = None
    dropped: bool = False


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """The tasks that train next, in order; `version` is the number of batches consumed before."""

    tasks: list[TaskId]
    version: int


class EvalRound(msgspec.Struct, frozen=True, kw_only=True):
    """A finished evaluation: tasks with groups, in order, and dropped rows with their reason."""

    version: int
    tasks: list[TaskId]
    dropped: dict[RowKey, str]


class RejoinedTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task that a resumed learner queued again: its old ID and its new one."""

    old: TaskId
    new: TaskId
    row_key: RowKey


class ResumeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was under way when a new incarnation began, and what became of it.

    `groups` had been received but not consumed, `leases` were open, `eval_rows` were under
    evaluation: all three are lost. `rejoined` are the training tasks that were queued again.
    """

    groups: list[TaskId]
    leases: list[EndedLease]
    eval_rows: list[RowKey]
    rejoined: list[RejoinedTask]
