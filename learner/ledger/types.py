"""What goes into the ledger and what it answers."""

from typing import Literal

import msgspec

from learner.ledger.state import RowKey, require
from protocol.messages.messages import TaskKind
from protocol.messages.parts import TaskId

Outcome = Literal["accepted", "duplicate", "dropped", "stale", "unknown"]


class LedgerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger's limits. `total_batches` None: until `end_of_rows`. Rows are completions."""

    batch_size: int
    max_staleness: int
    num_generations: int
    eval_generations: int = 1
    total_batches: int | None = None
    lease_s: float = 120.0
    max_attempts: int = 3
    max_eval_tasks: int = 4096

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_generations", "eval_generations", "max_attempts"):
            require(getattr(self, name) >= 1, f"LedgerSettings.{name} must be at least 1")
        require(self.max_staleness >= 0, "LedgerSettings.max_staleness must be at least 0")
        require(self.lease_s > 0, "LedgerSettings.lease_s must be above 0")


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """A lease that was given: what a `Task` message needs of the ledger."""

    task: TaskId
    attempt: int
    kind: TaskKind
    row_key: RowKey
    min_policy_version: int
    pinned_version: int | None


class Cancelled(msgspec.Struct, frozen=True, kw_only=True):
    """A lease that ended without a group of its own. `dropped`: the task was given up with it."""

    task: TaskId
    attempt: int
    actor: str
    reason: str
    dropped: bool = False


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What a group or a failure counted for. Only an "accepted" group is to be kept; everything
    is to be acknowledged. `cancelled` is the attempt that became needless, if any."""

    outcome: Outcome
    cancelled: Cancelled | None = None
    dropped: bool = False


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """The tasks that train next, in order; `version` is the number of batches consumed before."""

    tasks: list[TaskId]
    version: int


class EvalRound(msgspec.Struct, frozen=True, kw_only=True):
    """A finished evaluation: tasks with groups, in order, and tasks dropped with their reason."""

    version: int
    tasks: list[TaskId]
    dropped: dict[RowKey, str]


class Outstanding(msgspec.Struct, frozen=True, kw_only=True):
    """A task that a resumed learner joined again, under its old and its new identity."""

    old: TaskId
    new: TaskId
    row_key: RowKey


class LostReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a resume lost: groups received but not trained, leases out, evaluation rows."""

    groups: list[TaskId]
    leases: list[Cancelled]
    eval_rows: list[RowKey]
    rejoined: list[Outstanding]
