"""The prompts and groups of the tasks that are not finished."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from msgspec import structs

from learner.data.prompts import Prompt
from learner.ledger.state import LedgerState
from learner.ledger.types import RejoinedTask
from learner.online.experience import OpenContents, PromptGroup
from protocol.messages.arrays import floats_view
from protocol.messages.messages import Group, TaskKind
from protocol.messages.parts import TaskId


@dataclass
class OpenTasks:
    """Keeps each task's prompt until it is trained or evaluated, and its group until it is used.

    The ledger decides which tasks are open; this holds the data, which the ledger never sees.
    """

    _train: dict[TaskId, Prompt] = field(default_factory=dict[TaskId, Prompt])
    _eval: dict[TaskId, Prompt] = field(default_factory=dict[TaskId, Prompt])
    _in_training: dict[TaskId, PromptGroup] = field(default_factory=dict[TaskId, PromptGroup])
    _groups: dict[TaskId, Group] = field(default_factory=dict[TaskId, Group])
    _holders: dict[TaskId, dict[int, str]] = field(default_factory=dict[TaskId, dict[int, str]])

    def __contains__(self, task: TaskId) -> bool:
        return task in self._train or task in self._eval

    def add(self, task: TaskId, prompt: Prompt, kind: TaskKind) -> None:
        """Add a task that joined the ledger."""
        prompts = self._train if kind == "train" else self._eval
        prompts[task] = prompt

    def kind(self, task: TaskId) -> TaskKind:
        return "train" if task in self._train else "eval"

    def prompt(self, task: TaskId) -> Prompt:
        return self._train[task] if task in self._train else self._eval[task]

    def add_holder(self, task: TaskId, attempt: int, actor: str) -> None:
        """Note which actor an attempt was leased to; late groups are accepted from it alone."""
        self._holders.setdefault(task, {})[attempt] = actor

    def holder(self, task: TaskId, attempt: int) -> str:
        """Return which actor an attempt was leased to; "" if there was none."""
        return self._holders.get(task, {}).get(attempt, "")

    def add_group(self, group: Group) -> None:
        """Keep the group that the ledger accepted for its task."""
        self._groups[group.task] = group

    def remove(self, task: TaskId) -> None:
        """Forget a task that was dropped."""
        self._train.pop(task, None)
        self._eval.pop(task, None)
        self._groups.pop(task, None)
        self._holders.pop(task, None)

    def take_batch(self, tasks: Sequence[TaskId]) -> list[PromptGroup]:
        """Hand over the groups of a batch, which are kept until `batch_consumed`.

        A checkpoint may be written before the batch is consumed, and must not lose them.
        """
        groups = [self._take(task) for task in tasks]
        self._in_training = dict(zip(tasks, groups, strict=True))
        return groups

    def batch_consumed(self) -> None:
        """Forget the batch in training."""
        self._in_training.clear()

    def without_reward(self) -> list[TaskId]:
        """Return the queued tasks whose group is there, but got no reward at all."""
        return [
            task
            for task, group in self._groups.items()
            if task in self._train and np.isnan(floats_view(group.reward.rewards)).all()
        ]

    def batch_returned(self, also: Iterable[TaskId]) -> None:
        """Queue the prompts of the batch in training again; forget its groups, and those `also`."""
        for task in also:
            del self._groups[task]
        prompts = {task: item.prompt for task, item in self._in_training.items()}
        self._train = {**prompts, **self._train}
        self._in_training.clear()

    def take_evaluation(self, tasks: Sequence[TaskId]) -> list[PromptGroup]:
        """Hand over the groups of an evaluation round and forget the round's other tasks."""
        groups = [self._take(task) for task in tasks]
        for task in list(self._eval):
            self.remove(task)
        return groups

    def contents(self) -> OpenContents:
        """Return what is kept, for a checkpoint."""
        training = {task.number: item for task, item in self._in_training.items()}
        waiting = {**self._train, **self._eval}
        return OpenContents(
            prompts={
                **{number: item.prompt for number, item in training.items()},
                **{task.number: prompt for task, prompt in waiting.items()},
            },
            groups={
                **{number: item.group for number, item in training.items()},
                **{task.number: group for task, group in self._groups.items()},
            },
            holders={task.number: dict(each) for task, each in self._holders.items()},
        )

    @classmethod
    def restored(cls, contents: OpenContents, ledger: LedgerState) -> Self:
        """Return what `contents` held when the ledger was in this state."""
        tasks = cls()
        for record in (*ledger.unfinished, *ledger.evals.values()):
            task = ledger.task_id(record.number)
            tasks.add(task, contents.prompts[record.number], record.kind)
            if record.number in contents.groups:
                tasks.add_group(contents.groups[record.number])
            for attempt, actor in contents.holders.get(record.number, {}).items():
                tasks.add_holder(task, attempt, actor)
        if ledger.training:
            tasks.take_batch([ledger.task_id(number) for number in ledger.training])
        return tasks

    def batch_in_training(self) -> list[PromptGroup]:
        """Return the groups of the batch in training."""
        return list(self._in_training.values())

    def rejoin(self, rejoined: Sequence[RejoinedTask], *, keep_groups: bool) -> None:
        """Continue with the tasks of a new incarnation, and nothing else."""
        prompts = {task: item.prompt for task, item in self._in_training.items()} | self._train
        groups = {task: item.group for task, item in self._in_training.items()} | self._groups
        self._in_training.clear()
        self._eval.clear()
        self._holders.clear()
        self._train = {each.new: prompts[each.old] for each in rejoined}
        self._groups = {
            each.new: structs.replace(groups[each.old], task=each.new, attempt=1)
            for each in rejoined
            if keep_groups and each.old in groups
        }

    def _take(self, task: TaskId) -> PromptGroup:
        taken = PromptGroup(self.prompt(task), self._groups[task])
        self.remove(task)
        return taken
