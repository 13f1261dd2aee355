"""Continues an online run from its newest checkpoint and the journal, or begins it."""

# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

import hashlib
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from learner.checkpoint import Checkpoint, checkpoints, restoring, step_of
from learner.data.prompts import PromptSource
from learner.ledger.events import BatchConsumed, LedgerEvent
from learner.ledger.journal import Entry, JournalIdentity, JournalWriter, segments, set_aside
from learner.ledger.journal_reader import JournalReader, cut, drop_before, read_header
from learner.ledger.ledger import Ledger
from learner.ledger.losses import losses_since
from learner.ledger.state import LedgerState
from learner.ledger.types import LedgerSettings, ResumeReport
from learner.online.experience import CoordinatorState
from learner.online.recovery import History, Recovered, follow
from learner.online.source import snapshot_path
from protocol.config.settings import OnlineRun, builtins
from protocol.errors import JournalError, SnapshotError
from protocol.hosts import boot_id
from protocol.messages.messages import Policy
from protocol.model.policy import LoadedPolicy
from protocol.model.snapshots import read_snapshot

log = logging.getLogger("pippin.learner")

# Sections of the settings without which recorded batches would train to other weights.
_DECISIVE = ("model", "data", "objective", "optimizer", "sampling", "train")


@dataclass
class Continued:
    """A ledger, new or restored; what else there was before; and the journal to append to."""

    ledger: Ledger
    journal: JournalWriter
    history: History | None = None
    recovered: Recovered | None = None


def journal_folder(run: Path) -> Path:
    """Return where a run keeps its journal."""
    return run / "journal"


def journal_identity(folder: Path, settings: OnlineRun, policy: LoadedPolicy) -> JournalIdentity:
    """Return what the journal of this run, as it is set up now, shares with what it had before."""
    values = builtins(settings)
    decisive = {name: values[name] for name in _DECISIVE if name in values}
    decisive |= {
        "seed": settings.run.seed,
        "max_staleness": settings.queue.max_staleness,
        "reward_weights": settings.rewards.reward_weights,
    }
    text = msgspec.json.encode(decisive, order="deterministic")
    return JournalIdentity(
        run=folder.name,
        model_digest=policy.model_digest,
        tokenizer_digest=policy.tokenizer_digest,
        settings=hashlib.sha256(text).hexdigest(),
        boot=boot_id(),
    )


def begin_run(folder: Path, limits: LedgerSettings, identity: JournalIdentity) -> Continued:
    """Begin a run that has no checkpoint; nothing was leased before the first."""
    set_aside(journal_folder(folder), 0)
    ledger = Ledger.new(limits, identity.run, uuid.uuid4().hex)
    return Continued(ledger, JournalWriter(journal_folder(folder), identity, 0))


def continue_run(
    folder: Path,
    checkpoint: Checkpoint,
    limits: LedgerSettings,
    identity: JournalIdentity,
    prompts: PromptSource,
    *,
    snapshots: bool = True,
) -> Continued:
    """Continue from a checkpoint and what the journal has after it.

    Where the journal ends as the last learner process left it, its incarnation goes on: actors that
    are still there keep their leases, and deliver what they hold. Otherwise a new one begins, and
    where an evaluation is open whose policy no actor can fetch; without `snapshots`, none can be.
    Raises CheckpointError or JournalError if these files are not this run's.
    """
    with restoring(checkpoint) as source:
        state = msgspec.msgpack.decode(source, type=CoordinatorState)
    identity = msgspec.structs.replace(identity, run=state.ledger.run)
    journal = journal_folder(folder)
    history = History.of_checkpoint(state, prompts, prompts.evaluation)
    reader = JournalReader(journal, state.journal)
    headers = [header for path in segments(journal) if (header := read_header(path)) is not None]
    since = [header for header in headers if header.first >= state.journal]
    for header in since:
        _require_same_run(header.identity, identity, journal)

    theirs = {state.settings, *(header.identity.settings for header in since)}
    if theirs != {identity.settings}:
        return _with_other_settings(folder, history, reader, limits, identity, state)

    batches, evaluations = follow(history, _entries(reader))
    cut(journal, reader.end)
    ledger = Ledger(limits, history.ledger)
    writer = JournalWriter(journal, identity, reader.end.number)
    if reader.end.number == state.journal:
        writer.begin_segment(checkpoint.step)

    same_boot = bool(headers) and bool(identity.boot) and headers[-1].identity.boot == identity.boot
    reached = ledger.state.version
    announced = _announced(folder, history) if snapshots and same_boot else None
    if reader.end.damage or not same_boot or (ledger.state.evals and announced is None):
        announced = None
        _start_actors_over(folder, ledger, history, reader)
    if batches and not history.ledger.training and batches[-1].trained_at == reached:
        batches.pop()  # it is queued again

    log.info(
        "continuing from step %d: %d steps are taken again from the journal, up to step %d; then "
        "%d groups are waiting and %d tasks are leased",
        checkpoint.step,
        reached - checkpoint.step,
        reached,
        sum(record.taken is not None for record in ledger.state.queue.values()),
        len(ledger.state.open_leases()),
    )
    recovered = Recovered(
        reached, history.evaluated, batches, evaluations, history.published, announced
    )
    return Continued(ledger, writer, history, recovered)


def drop_segments(folder: Path, keep: int) -> None:
    """Delete what only checkpoints older than the newest `keep` need of a run's journal."""
    newest = checkpoints(folder / "checkpoints")[-keep:]
    if newest:
        drop_before(journal_folder(folder), step_of(newest[0]))


def _entries(reader: JournalReader) -> Iterator[Entry]:
    return (entry for _, entry in reader)


def _require_same_run(theirs: JournalIdentity, ours: JournalIdentity, journal: Path) -> None:
    for name in ("run", "model_digest", "tokenizer_digest"):
        if getattr(theirs, name) != getattr(ours, name):
            raise JournalError(
                f"{journal}: required a journal whose {name} is {getattr(ours, name)}, as the "
                f"checkpoint's; got one whose {name} is {getattr(theirs, name)}. Put back the "
                "journal and the model that the run began with"
            )


def _with_other_settings(
    folder: Path,
    history: History,
    reader: JournalReader,
    limits: LedgerSettings,
    identity: JournalIdentity,
    state: CoordinatorState,
) -> Continued:
    """Continue from the checkpoint with other settings, as a new incarnation without its groups.

    Groups that were received are moved aside, and lost.json lists them. Raises JournalError if
    steps were taken since the checkpoint: these settings would not lead to them.
    """
    events = [entry for entry in _entries(reader) if isinstance(entry, LedgerEvent)]
    steps = sum(isinstance(event, BatchConsumed) for event in events)
    if steps:
        raise JournalError(
            f"{journal_folder(folder)}: {steps} steps were taken after the checkpoint of step "
            f"{history.ledger.version}, with other settings, and cannot be taken again with these. "
            "Resume without changes first, and stop the run: that saves a checkpoint, from which "
            "it can be resumed with other settings. Or delete the journal to give the steps up"
        )

    ledger = Ledger(limits, history.ledger)
    before, report = _new_incarnation(ledger, history, keep_groups=False)
    set_aside(journal_folder(folder), state.journal)

    reason = "the run goes on with other settings"
    lost = losses_since(before, report, events, reason)
    groups = len(lost.under_way.groups) + len(lost.received_since)
    if groups:
        _write_losses(folder, msgspec.json.encode(lost))
        log.warning(
            "%s: %d groups that were not trained on yet are sampled again; lost.json lists them",
            reason,
            groups,
        )
    writer = JournalWriter(journal_folder(folder), identity, state.journal)
    writer.begin_segment(ledger.state.version)
    return Continued(ledger, writer, history)


def _new_incarnation(
    ledger: Ledger, history: History, *, keep_groups: bool
) -> tuple[LedgerState, ResumeReport]:
    """Begin a new incarnation of ledger and tasks; return the state before, and what that ended."""
    before = ledger.state.copy()
    report = ledger.begin_incarnation(uuid.uuid4().hex, keep_groups=keep_groups)
    history.tasks.rejoin(report.rejoined, keep_groups=keep_groups)
    return before, report


def _start_actors_over(
    folder: Path, ledger: Ledger, history: History, reader: JournalReader
) -> None:
    """Begin a new incarnation with all received groups; say why, and what damage has cost."""
    before, report = _new_incarnation(ledger, history, keep_groups=True)
    if not reader.end.damage:
        log.info(
            "actors start over, and what was received is kept: they, or the policy of an open "
            "evaluation, are gone"
        )
        return

    events = [entry for entry in reader.end.lost if isinstance(entry, LedgerEvent)]
    lost = losses_since(before, report, events, reader.end.damage)
    _write_losses(folder, msgspec.json.encode(lost))
    log.warning(
        "the journal is damaged (%s): the run goes on from what came before. What came after and "
        "can still be read, %d steps and %d groups, is listed in lost.json; the damaged files are "
        "in %s",
        reader.end.damage,
        lost.version_reached - lost.version,
        len(lost.received_since),
        journal_folder(folder) / "damaged",
    )


def _write_losses(folder: Path, data: bytes) -> None:
    (folder / "lost.json").write_bytes(msgspec.json.format(data))


def _announced(folder: Path, history: History) -> Policy | None:
    """Return the newest policy that actors knew of, if its snapshot is there and whole."""
    version = history.ledger.published
    if version is None:
        return None

    path = snapshot_path(folder / "policy", version)
    try:
        snapshot = read_snapshot(path)
    except SnapshotError:
        return None
    if snapshot.digest != history.ledger.digest:
        return None
    size, where = path.stat().st_size, str(path.resolve())
    return Policy(version=version, digest=snapshot.digest, size=size, path=where)
