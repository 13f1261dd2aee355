"""The journal of the ledger's events (`ledger.jsonl`), and what a restarted learner lost.

The checkpoint says what was under way when it was written, the journal what happened after it.
"""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from learner.ledger.events import AnyEvent, BatchConsumed, BatchFormed, GroupReceived, TaskJoined
from learner.ledger.state import LedgerState
from learner.ledger.types import ResumeReport
from protocol.messages.parts import TaskId
from protocol.run_record import cut_partial_line


class JournalLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of ledger.jsonl: an event, and the learner incarnation that it happened to."""

    incarnation: str
    event: AnyEvent


class RestartLosses(msgspec.Struct, frozen=True, kw_only=True):
    """The content of lost.json: what was lost between a checkpoint and the learner's end.

    `checkpoint` is what was under way at the checkpoint of `version`. The other fields happened
    after it, until `version_reached`, and are undone: `trained_since` are the tasks of batches that
    were consumed, and will be trained again from the checkpoint's weights; `received_since` those
    whose group had come but was not trained; `joined_since` all training tasks that joined.
    """

    checkpoint: ResumeReport
    version: int
    version_reached: int
    trained_since: list[TaskId]
    received_since: list[TaskId]
    joined_since: list[TaskId]


def encode_line(incarnation: str, event: AnyEvent) -> bytes:
    return msgspec.json.encode(JournalLine(incarnation=incarnation, event=event)) + b"\n"


def read_journal(path: Path, incarnation: str) -> list[AnyEvent]:
    """Return the events of an incarnation, after cutting off a last line that is incomplete."""
    cut_partial_line(path)
    if not path.is_file():
        return []

    decoder = msgspec.json.Decoder(JournalLine)
    with path.open("rb") as file:
        lines = (decoder.decode(data) for data in file)
        return [line.event for line in lines if line.incarnation == incarnation]


def losses_since_checkpoint(
    report: ResumeReport, checkpointed: LedgerState, events: Iterable[AnyEvent]
) -> RestartLosses:
    """Return what was lost, given the events that the old incarnation journalled afterwards."""
    in_training: list[int] = []
    trained: list[int] = []
    received: list[int] = []
    joined: list[int] = []
    reached = checkpointed.version

    for event in events:
        match event:
            case TaskJoined(number=number, kind="train"):
                joined.append(number)
            case GroupReceived(number=number):
                received.append(number)
            case BatchFormed(numbers=numbers):
                in_training = numbers
            case BatchConsumed(version=version):
                reached = version
                trained += in_training
            case _:
                pass

    # Evaluation groups are received too, but are not lost work of the training.
    training_tasks = {*joined, *(task.old.number for task in report.rejoined)}
    untrained = [n for n in received if n in training_tasks and n not in set(trained)]
    return RestartLosses(
        checkpoint=report,
        version=checkpointed.version,
        version_reached=reached,
        trained_since=[checkpointed.task_id(number) for number in trained],
        received_since=[checkpointed.task_id(number) for number in untrained],
        joined_since=[checkpointed.task_id(number) for number in joined],
    )
