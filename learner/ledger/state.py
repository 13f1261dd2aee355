"""What the ledger remembers: its tasks, their leases, and its totals."""

import msgspec

from protocol.errors import LedgerError
from protocol.messages.messages import TaskKind
from protocol.messages.parts import TaskId

RowKey = int | str


class Lease(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The open attempt of a task: who works on it, and until when without progress."""

    attempt: int
    actor: str
    expires_at: float


class TaskRecord(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A task that has not ended.

    `floors[attempt - 1]` is the `min_policy_version` of that attempt; attempts count from 1.
    `failures` counts the attempts that are held against the task; `taken` is the attempt whose
    group counts; `dropped` is set only in evaluation tasks that wait for their round to end.
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
        return self.lease is None and self.taken is None and self.dropped is None

    @property
    def ended(self) -> bool:
        """Whether nothing more is expected from actors."""
        return self.taken is not None or self.dropped is not None


class Counters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Totals over the run, in tasks, attempts or groups; they survive a resume."""

    joined: int = 0
    leased: int = 0  # attempts
    retried: int = 0  # attempts after a task's first
    received: int = 0  # groups that count
    duplicates: int = 0  # groups of a task that already had one
    expired: int = 0  # leases
    trained: int = 0  # tasks
    evaluated: int = 0  # tasks
    discarded: dict[str, int] = {}  # groups, by reason
    dropped: dict[str, int] = {}  # tasks, by reason


class LedgerState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Everything that the ledger knows; a checkpoint holds it.

    `queue`, `training` and `evals` are ordered by position. `dropped` keeps the reason of every
    dropped task: any other number below `next_number` that is in no dictionary was trained.
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
        """Return the identity of a task of this incarnation."""
        return TaskId(run=self.run, incarnation=self.incarnation, number=number)

    def find(self, number: int) -> TaskRecord | None:
        """Return the record of a task that has not left the ledger."""
        for table in (self.queue, self.evals, self.training):
            if number in table:
                return table[number]
        return None

    def copy(self) -> "LedgerState":
        """Return a deep copy."""
        return msgspec.msgpack.decode(msgspec.msgpack.encode(self), type=LedgerState)


def require(condition: bool, message: str) -> None:
    """Raise `LedgerError` unless a rule of the ledger holds."""
    if not condition:
        raise LedgerError(message)
