"""What died with a learner: the checkpoint says what was under way, its journal what came later."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from learner.ledger.events import AnyEvent, Consumed, Formed, Joined, Received
from learner.ledger.types import LostReport
from protocol.messages.parts import TaskId
from protocol.run_record import cut_partial_line


class JournalLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of ledger.jsonl: an event, and the learner incarnation that it happened to."""

    incarnation: str
    event: AnyEvent


class Lost(msgspec.Struct, frozen=True, kw_only=True):
    """What a resume lost. The first half was under way at the checkpoint (see `LostReport`).

    The second half happened after it and is undone: `trained_since` are tasks of batches consumed
    since (they will be trained again from the checkpoint's weights), `received_since` those whose
    group had come but was not trained, `joined_since` all tasks that joined.
    """

    checkpoint: LostReport
    version: int
    version_reached: int
    trained_since: list[TaskId]
    received_since: list[TaskId]
    joined_since: list[TaskId]


def encode_line(incarnation: str, event: AnyEvent) -> bytes:
    """Return an event as a line of the journal."""
    return msgspec.json.encode(JournalLine(incarnation=incarnation, event=event)) + b"\n"


def read_journal(path: Path, incarnation: str) -> list[AnyEvent]:
    """Return the events of an incarnation; a last line that was cut off by its end is cut away."""
    cut_partial_line(path)
    if not path.is_file():
        return []
    events: list[AnyEvent] = []
    decoder = msgspec.json.Decoder(JournalLine)
    with path.open("rb") as file:
        for data in file:
            line = decoder.decode(data)
            if line.incarnation == incarnation:
                events.append(line.event)
    return events


def since(
    report: LostReport, run: str, incarnation: str, version: int, events: Iterable[AnyEvent]
) -> Lost:
    """Say what was lost, from the events of `incarnation` after the checkpoint of `version`."""
    forming: list[int] = []
    trained: list[int] = []
    received: list[int] = []
    joined: list[int] = []
    reached = version
    for event in events:
        match event:
            case Joined(number=number, kind="train"):
                joined.append(number)
            case Received(number=number):
                received.append(number)
            case Formed(numbers=numbers):
                forming = numbers
            case Consumed(version=new):
                reached = new
                trained += forming
            case _:
                pass
    train = {*joined, *(old.old.number for old in report.rejoined)}

    def ids(numbers: Iterable[int]) -> list[TaskId]:
        return [TaskId(run=run, incarnation=incarnation, number=n) for n in numbers]

    return Lost(
        checkpoint=report,
        version=version,
        version_reached=reached,
        trained_since=ids(trained),
        received_since=ids(n for n in received if n in train and n not in set(trained)),
        joined_since=ids(joined),
    )
