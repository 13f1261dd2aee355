"""Trains a recorded run again from its journal, without actors, and compares its weights.

Imported by launch/replay.py.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import mlx.nn as nn
import msgspec

from learner.build.common import require_same_inputs
from learner.build.forward import choose_forward, longest_prompt
from learner.build.grpo_run import LoadedRun, load_run, new_trainer
from learner.build.recover import journal_folder, journal_identity
from learner.checkpoint import (
    Checkpoint,
    checkpoint_path,
    checkpoints,
    load_checkpoint,
    restoring,
    step_of,
)
from learner.ledger.events import BatchConsumed, BatchReturned, IncarnationBegan, PolicyPublished
from learner.ledger.journal import Entry, SegmentHeader, segments
from learner.ledger.journal_reader import JournalReader, read_header
from learner.ledger.state import LedgerState
from learner.online.experience import CoordinatorState, TrainBatch
from learner.online.recovery import History
from learner.records import Records
from learner.trainer import Schedule, Trainer
from protocol.errors import CheckpointError, JournalError
from protocol.model.snapshots import TensorDigests, load_trainable, trainable


@dataclass(frozen=True)
class Compared:
    """A policy version's weights beside those that the run published.

    `differing` names the tensors that differ, in order; empty: none does.
    """

    version: int
    digest: str
    differing: list[str]


@dataclass
class RecordedSource:
    """The batches that a run trained on, in order, and a comparison for each version published.

    `model` is trained on the batches. `policies` holds its tensors for the newest `keep` versions.
    `batch` is the newest batch, `rows` the positions of its tasks in the training order.
    """

    entries: Iterator[tuple[SegmentHeader, Entry]]
    history: History
    model: nn.Module
    settings: str
    keep: int
    batch: TrainBatch | None = None
    rows: list[int] = field(default_factory=list[int])
    exhausted: bool = False
    compared: list[Compared] = field(default_factory=list[Compared])
    policies: dict[int, dict[str, mx.array]] = field(default_factory=dict[int, dict[str, mx.array]])
    _digests: dict[int, TensorDigests] = field(default_factory=dict[int, TensorDigests])
    _formed: bool = False

    def __post_init__(self) -> None:
        """Take over the batch that was in training at a checkpoint."""
        self._form(self.history.in_training())

    def poll(self, timeout_s: float = 0.0) -> TrainBatch | None:
        """Return the next batch that the run trained on; None, and `exhausted`, after the last."""
        for header, entry in self.entries:
            if header.identity.settings != self.settings:
                raise JournalError(
                    f"after step {self.history.ledger.version} the run went on with other settings "
                    f"(journal segment {header.first}), with which it cannot be replayed from here"
                )
            made = self.history.apply(entry)
            if isinstance(made, TrainBatch):
                self._form(made)
            elif isinstance(entry, BatchReturned | IncarnationBegan):
                self._formed = False
            elif isinstance(entry, PolicyPublished):
                self._compare(entry)
            elif isinstance(entry, BatchConsumed) and self._formed:
                self._formed = False
                return self.batch
        self.exhausted = True
        return None

    def publish(self, version: int) -> None:
        """Note the policy's tensors and their digests."""
        arrays = trainable(self.model)
        self.policies[version] = arrays
        self._digests[version] = TensorDigests.of(arrays)
        for old in [v for v in self.policies if v <= version - self.keep]:
            del self.policies[old], self._digests[old]

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> bytes:
        return b""

    def _form(self, batch: TrainBatch | None) -> None:
        if batch is not None:
            self.batch, self._formed = batch, True
            self.rows = [int(r.row_key) for r in self.history.ledger.training.values()]

    def _compare(self, event: PolicyPublished) -> None:
        ours = self._digests.get(event.version)
        # A learner that recovered published its newest version once more.
        known = any(each.version == event.version for each in self.compared)
        if ours is None or known:
            return
        differing: list[str] = []
        if ours.whole != event.digest:
            differing = ours.differing(event.tensors) or list(ours.each)
        self.compared.append(Compared(event.version, ours.whole, differing))


@dataclass(frozen=True)
class Replay:
    """A run that is ready to be trained again from step `start` on, by what `entries` yields."""

    run: LoadedRun
    trainer: Trainer[TrainBatch]
    source: RecordedSource
    start: int
    entries: Callable[[], JournalReader]

    def batches(self) -> int:
        """Count the batches to train on, which reads the journal once more."""
        return sum(isinstance(entry, BatchConsumed) for _, entry in self.entries())

    def advance(self) -> list[Compared]:
        """Train on the next batch; return the comparisons that were made since the last call."""
        self.trainer.advance()
        made, self.source.compared[:] = list(self.source.compared), []
        return made


@contextmanager
def open_replay(folder: Path, start: int | None = None) -> Generator[Replay]:
    """Open the journal of the run in `folder` from step `start` on; None: from its beginning.

    Raises JournalError if the journal does not reach back so far, CheckpointError if `start` is
    neither 0 nor the step of a checkpoint.
    """
    run = load_run(folder)
    settings = journal_identity(folder, run.settings, run.policy).settings
    start = _beginning(folder, settings) if start is None else start
    checkpoint = _checkpoint(folder, start)
    history, number = _history(folder, run, checkpoint)

    forward = choose_forward(
        run.settings, run.policy, run.reference, longest_prompt(run.settings.data, run.prompts)
    )
    entries = partial(JournalReader, journal_folder(folder), number)
    reader = entries()
    keep = run.settings.queue.max_staleness + 2
    source = RecordedSource(iter(reader), history, run.policy.model, settings, keep)
    with TemporaryDirectory(prefix="pippin-replay-") as records:
        trainer = new_trainer(run, forward, source, Records(Path(records), 0.0))
        trainer.schedule = Schedule(None, 0, 1, 0, eval_at_start=False)
        if checkpoint is not None:
            require_same_inputs(checkpoint, run.policy, run.reference)
            load_trainable(run.policy.model, checkpoint.weights, f"checkpoint of step {start}")
            trainer.restore(checkpoint)
        source.publish(start)
        yield Replay(run, trainer, source, start, entries)

    if reader.end.damage:
        raise JournalError(f"the journal is damaged after what was replayed: {reader.end.damage}")


def _beginning(folder: Path, settings: str) -> int:
    """Return the earliest step from which the journal can be replayed with these settings."""
    found = segments(journal_folder(folder))
    headers = [header for path in found if (header := read_header(path)) is not None]
    if not headers:
        raise JournalError(
            f"{journal_folder(folder)}: required a journal, found none; only GRPO runs have one"
        )
    usable = [header for header in headers if header.identity.settings == settings]
    if usable and usable[0].first == 0:
        return 0

    kept = {step_of(path) for path in checkpoints(folder / "checkpoints")}
    starts = [header.checkpoint for header in usable if header.checkpoint in kept]
    first = next(iter(starts), None)
    if first is None:
        raise JournalError(
            f"{journal_folder(folder)}: required a beginning, or a checkpoint that is still kept, "
            "since when the settings are those of config.toml; found neither. Keep all of the "
            'journal with run.journal = "all"'
        )
    return first


def _checkpoint(folder: Path, start: int) -> Checkpoint | None:
    if start == 0:
        return None
    path = checkpoint_path(folder / "checkpoints", start)
    if not path.is_dir():
        names = ", ".join(each.name for each in checkpoints(path.parent)) or "none"
        raise CheckpointError(f"{path}: required a checkpoint of step {start}; kept are {names}")
    return load_checkpoint(path)


def _history(folder: Path, run: LoadedRun, checkpoint: Checkpoint | None) -> tuple[History, int]:
    """Return the state to begin with, and the number of the journal entry that follows it."""
    held_out = run.prompts.evaluation
    if checkpoint is None:
        return History(LedgerState(run=folder.name, incarnation=""), run.prompts, held_out), 0
    with restoring(checkpoint) as data:
        state = msgspec.msgpack.decode(data, type=CoordinatorState)
    return History.of_checkpoint(state, run.prompts, held_out), state.journal
