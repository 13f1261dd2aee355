"""What a journal led to: the coordinator's state after its entries, and the batches that it formed.

A checkpoint's state and the entries after it give the state in which the learner ended, the batches
that it trained on since, in order, and the evaluations that were answered. Training on these
batches from the checkpoint's weights gives the weights that it had, bit for bit, because a step is
deterministic given its batch.
"""

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from learner.data.prompts import Prompt, PromptSource
from learner.ledger.events import (
    BatchConsumed,
    BatchFormed,
    BatchReturned,
    EvaluationTaken,
    GroupReceived,
    IncarnationBegan,
    PolicyPublished,
    TaskDropped,
    TaskJoined,
    TaskLeased,
)
from learner.ledger.journal import Entry
from learner.ledger.results import eval_round, rejoined_tasks
from learner.ledger.state import LedgerState
from learner.online.experience import CoordinatorState, EvalResult, TrainBatch
from learner.online.open_tasks import OpenTasks
from protocol.errors import JournalError
from protocol.messages.messages import Group, Policy

log = logging.getLogger("pippin.learner")


class Digests(Protocol):
    """The part of `protocol.model.snapshots.TensorDigests` that a comparison needs."""

    @property
    def whole(self) -> str: ...

    def differing(self, short: bytes) -> list[str]: ...


@dataclass
class History:
    """The coordinator's state, which `apply` moves on entry by entry.

    `published` holds the digests of each version that was published on the way, as events.
    `evaluated` is the newest version that was to be evaluated, None if none was.
    """

    ledger: LedgerState
    prompts: PromptSource
    eval_prompts: Sequence[Prompt]
    position: int = 0
    tasks: OpenTasks = field(default_factory=OpenTasks)
    published: dict[int, PolicyPublished] = field(default_factory=dict[int, PolicyPublished])
    evaluated: int | None = None
    _arrived: Group | None = None

    @classmethod
    def of_checkpoint(
        cls, state: CoordinatorState, prompts: PromptSource, eval_prompts: Sequence[Prompt]
    ) -> "History":
        """Begin with a checkpoint's state; `prompts` continue from there, too."""
        prompts.restore(state.prompts)
        return cls(
            state.ledger.copy(),
            prompts,
            eval_prompts,
            position=state.position,
            tasks=OpenTasks.restored(state.tasks, state.ledger),
        )

    def in_training(self) -> TrainBatch | None:
        """Return the batch in training, if there is one."""
        groups = self.tasks.batch_in_training()
        return TrainBatch(groups, trained_at=self.ledger.version) if groups else None

    def apply(self, entry: Entry) -> TrainBatch | EvalResult | None:
        """Move on by an entry; return the batch that it formed, or the evaluation that it ended."""
        if isinstance(entry, Group):
            self._arrived = entry
            return None

        before = self.ledger.copy() if isinstance(entry, IncarnationBegan) else self.ledger
        ended = eval_round(self.ledger) if isinstance(entry, EvaluationTaken) else None
        entry.apply_to(self.ledger)
        if ended is not None:
            groups = self.tasks.take_evaluation(ended.tasks)
            return EvalResult(ended.version, groups, len(ended.dropped))

        match entry:
            case IncarnationBegan(keep_groups=keep_groups):
                rejoined = rejoined_tasks(before, self.ledger)
                self.tasks.rejoin(rejoined, keep_groups=keep_groups)
            case TaskJoined():
                self._joined(entry)
            case TaskLeased(number=number, attempt=attempt, actor=actor):
                self.tasks.add_holder(self.ledger.task_id(number), attempt, actor)
            case TaskDropped(number=number):
                self.tasks.remove(self.ledger.task_id(number))
            case GroupReceived():
                self._received(entry)
            case BatchFormed(numbers=numbers, version=version):
                ids = [self.ledger.task_id(number) for number in numbers]
                return TrainBatch(self.tasks.take_batch(ids), trained_at=version)
            case BatchReturned(also=also):
                self.tasks.batch_returned([self.ledger.task_id(number) for number in also])
            case BatchConsumed():
                self.tasks.batch_consumed()
            case PolicyPublished(version=version):
                self.published[version] = entry
            case _:
                pass
        return None

    def _joined(self, event: TaskJoined) -> None:
        task = self.ledger.task_id(event.number)
        if event.kind == "eval":
            self.tasks.add(task, self.eval_prompts[int(event.row_key)], "eval")
            self.evaluated = event.pinned_version
            return

        prompt = self.prompts.next()
        if prompt is None or event.row_key != self.position:
            raise JournalError(
                f"the journal's task {event.number} is row {event.row_key} of the training order, "
                f"but the dataset has {self.position} rows before its end; continue with the data "
                "that the run began with"
            )
        self.position += 1
        self.tasks.add(task, prompt, "train")

    def _received(self, event: GroupReceived) -> None:
        group = self._arrived
        if group is None or (group.task.number, group.attempt) != (event.number, event.attempt):
            raise JournalError(
                f"the journal has no group for task {event.number}, attempt {event.attempt}, which "
                "it says was received; delete the journal to continue from the checkpoint alone"
            )
        self._arrived = None
        self.tasks.add_group(group)


@dataclass
class Recovered:
    """What an earlier process of the run left for the trainer.

    `batches` are to be trained on before any other, in order: those formed after the checkpoint, of
    which only the last may not be consumed yet. `version` is the policy version that it reached,
    `published` what it published on the way. `announced` is the version that actors can fetch
    already; None: not before `version` is reached again.
    """

    version: int
    evaluated: int | None = None
    batches: deque[TrainBatch] = field(default_factory=deque[TrainBatch])
    evaluations: deque[EvalResult] = field(default_factory=deque[EvalResult])
    published: Mapping[int, PolicyPublished] = field(default_factory=dict[int, PolicyPublished])
    announced: Policy | None = None
    _differs: bool = False

    def is_known(self, version: int) -> bool:
        """Whether actors need not be told of a version: they were, or will be of a newer one."""
        announced = self.announced is not None and self.announced.version == version
        return version < self.version or announced

    def compare(self, version: int, digests: Digests) -> None:
        """Warn, once, if the weights of a version are not those that were published then."""
        then = self.published.get(version)
        if then is None or then.digest == digests.whole or self._differs:
            return
        self._differs = True
        different = digests.differing(then.tensors)
        log.warning(
            "step %d, trained again from the journal, gave other weights than the first time: %s "
            "and %d tensors more differ. Training goes on from the new ones",
            version,
            different[0] if different else "none of the tensors",
            max(0, len(different) - 1),
        )


def follow(
    history: History, entries: Iterable[Entry]
) -> tuple[deque[TrainBatch], deque[EvalResult]]:
    """Apply entries; return the batches that they formed or consumed, and ended evaluations."""
    batches: deque[TrainBatch] = deque()
    evaluations: deque[EvalResult] = deque()
    in_training = history.in_training()
    if in_training is not None:
        batches.append(in_training)

    for entry in entries:
        match history.apply(entry):
            case TrainBatch() as batch:
                batches.append(batch)
            case EvalResult() as result:
                evaluations.append(result)
            case None:
                # The batch in training, if there was one, went back to the queue.
                if isinstance(entry, BatchReturned | IncarnationBegan):
                    while batches and batches[-1].trained_at >= history.ledger.version:
                        batches.pop()
    return batches, evaluations
