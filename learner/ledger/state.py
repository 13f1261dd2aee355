"""What the ledger remembers: tasks, their leases, and totals."""

import msgspec

from protocol.errors import LedgerError
from protocol.messages.messages import TaskKind
from protocol.messages.parts import TaskId

RowKey = int | str


class Lease(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The open attempt at a task: who works on it, and since when.

    When it ends is not state: it depends on what the actor reports (`learner/ledger/leases.py`).
    """

    attempt: int
    actor: str
    leased_at: float


class TaskRecord(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A task that is queued, in training or part of an evaluation.

    `floors[attempt - 1]` is the `min_policy_version` of that attempt; attempts count from 1.
    `failures` counts the attempts that count against the task. `taken` is the attempt whose
    group was accepted. `dropped` is the reason an evaluation task was dropped; the task stays until
    its round ends, whereas a dropped training task leaves at once.
    """

    number: int
    row_key: RowKey
    kind: TaskKind
    pinned_version: int | None = None
    floors: list[int] = []
    lease: Lease | None = None
    failures: int = 0
    taken: int | None = None
    dropped: str | None = None

    @property
    def waiting(self) -> bool:
        """Whether the task can be leased."""
        return self.lease is None and not self.ended

    @property
    def ended(self) -> bool:
        """Whether nothing more is expected from actors."""
        return self.taken is not None or self.dropped is not None

    def is_leased_as(self, attempt: int) -> bool:
        """Whether an actor is working on exactly this attempt."""
        return self.lease is not None and self.lease.attempt == attempt


class Counters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Totals over the run, in tasks, attempts or groups; they survive a resume."""

    joined: int = 0
    leased: int = 0  # attempts
    retried: int = 0  # attempts after a task's first
    received: int = 0  # accepted groups
    duplicates: int = 0  # groups for a task that already had one
    expired: int = 0  # leases
    trained: int = 0  # tasks
    evaluated: int = 0  # tasks
    discarded: dict[str, int] = {}  # groups, by reason
    dropped: dict[str, int] = {}  # tasks, by reason


class LedgerState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Everything the ledger knows; checkpoints store it.

    `version` is the number of batches consumed, `published` the newest version that actors can
    fetch. `queue`, `training` and `evals` are ordered by position. `dropped` keeps the reason for
    every dropped task: any other number below `next_number` that is in no dictionary was trained.
    """

    run: str
    incarnation: str
    version: int = 0
    published: int | None = None
    digest: str = ""
    next_number: int = 0
    rows_ended: bool = False
    queue: dict[int, TaskRecord] = {}
    training: dict[int, TaskRecord] = {}
    evals: dict[int, TaskRecord] = {}
    dropped: dict[int, str] = {}
    counters: Counters = msgspec.field(default_factory=Counters)

    def task_id(self, number: int) -> TaskId:
        """Return the full ID of a task of this incarnation."""
        return TaskId(run=self.run, incarnation=self.incarnation, number=number)

    def find(self, number: int) -> TaskRecord | None:
        """Return a task's record, or None once it was trained, dropped or evaluated."""
        for tasks in (self.queue, self.evals, self.training):
            if number in tasks:
                return tasks[number]
        return None

    def open_leases(self) -> list[tuple[TaskRecord, Lease]]:
        """Return the leased tasks with their leases."""
        records = (*self.queue.values(), *self.evals.values())
        return [(record, record.lease) for record in records if record.lease is not None]

    @property
    def unfinished(self) -> list[TaskRecord]:
        """Return the training tasks that are not consumed, in order."""
        return [*self.training.values(), *self.queue.values()]

    def copy(self) -> "LedgerState":
        return msgspec.msgpack.decode(msgspec.msgpack.encode(self), type=LedgerState)

    def begin(self, incarnation: str, *, keep_groups: bool) -> None:
        """Continue as another incarnation, whose actors start over.

        Training tasks that were not consumed join again, in order, as new tasks without leases;
        with `keep_groups`, those whose group was received keep it. Evaluation tasks do not join,
        because the version they are pinned to may be gone. Nothing is published yet, so nothing can
        be leased.
        """
        require(incarnation != self.incarnation, "a new incarnation needs a name of its own")
        first, unfinished = self.next_number, self.unfinished
        self.incarnation, self.published, self.digest = incarnation, None, ""
        self.training, self.evals = {}, {}
        self.queue = {
            number: _joined_again(number, old, keep_groups)
            for number, old in enumerate(unfinished, start=first)
        }
        self.next_number = first + len(unfinished)


def _joined_again(number: int, old: TaskRecord, keep_groups: bool) -> TaskRecord:
    new = TaskRecord(number=number, row_key=old.row_key, kind="train")
    if keep_groups and old.taken is not None:
        new.floors, new.taken = [old.floors[old.taken - 1]], 1
    return new


def require(condition: bool, message: str) -> None:
    """Raise `LedgerError` unless a rule of the ledger holds."""
    if not condition:
        raise LedgerError(message)
