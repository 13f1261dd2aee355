"""What was lost when a learner could not go on from where its journal ended (`lost.json`)."""

from collections.abc import Iterable

import msgspec

from learner.ledger.events import AnyEvent, BatchConsumed, BatchFormed, GroupReceived, TaskJoined
from learner.ledger.state import LedgerState
from learner.ledger.types import ResumeReport
from protocol.messages.parts import TaskId


class RestartLosses(msgspec.Struct, frozen=True, kw_only=True):
    """The content of lost.json: what was lost between where a learner goes on and where it was.

    `reason` says why. `under_way` is what was going on at policy `version`, from which the learner
    goes on. The other fields happened after it, until `version_reached`, and are undone:
    `trained_since` are the tasks of batches that were consumed; `received_since` those whose group
    had come but was not trained; `joined_since` all training tasks that joined.
    """

    reason: str
    under_way: ResumeReport
    version: int
    version_reached: int
    trained_since: list[TaskId]
    received_since: list[TaskId]
    joined_since: list[TaskId]


def losses_since(
    state: LedgerState, report: ResumeReport, events: Iterable[AnyEvent], reason: str
) -> RestartLosses:
    """Return what was lost, given the events that the journal had after `state`."""
    in_training: list[int] = []
    trained: list[int] = []
    received: list[int] = []
    joined: list[int] = []
    reached = state.version

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
        reason=reason,
        under_way=report,
        version=state.version,
        version_reached=reached,
        trained_since=[state.task_id(number) for number in trained],
        received_since=[state.task_id(number) for number in untrained],
        joined_since=[state.task_id(number) for number in joined],
    )
