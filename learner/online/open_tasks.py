"""The prompts and groups of the tasks that are not finished."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from learner.data.prompts import Prompt
from learner.online.experience import PromptGroup
from protocol.messages.messages import Group, TaskKind
from protocol.messages.parts import TaskId


@dataclass
class OpenTasks:
    """Keeps each task's prompt until it is trained or evaluated, and its group until it is used.

    The ledger decides which tasks are open; this holds the data, which the ledger never sees.
    """

    _train: dict[TaskId, Prompt] = field(default_factory=dict[TaskId, Prompt])
    _eval: dict[TaskId, Prompt] = field(default_factory=dict[TaskId, Prompt])
    _in_training: dict[TaskId, Prompt] = field(default_factory=dict[TaskId, Prompt])
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
        """Hand over the groups of a batch; its prompts are kept until `batch_consumed`.

        A checkpoint may be written before the batch is consumed, and must not lose its rows.
        """
        self._in_training = {task: self._train[task] for task in tasks}
        return [self._take(task) for task in tasks]

    def batch_consumed(self) -> None:
        """Forget the prompts of the batch in training."""
        self._in_training.clear()

    def take_evaluation(self, tasks: Sequence[TaskId]) -> list[PromptGroup]:
        """Hand over the groups of an evaluation round and forget the round's other tasks."""
        groups = [self._take(task) for task in tasks]
        for task in list(self._eval):
            self.remove(task)
        return groups

    def untrained_prompts(self) -> dict[int, Prompt]:
        """Return the prompts of the tasks that are queued or in training, by task number."""
        tasks = (*self._in_training.items(), *self._train.items())
        return {task.number: prompt for task, prompt in tasks}

    def _take(self, task: TaskId) -> PromptGroup:
        taken = PromptGroup(self.prompt(task), self._groups[task])
        self.remove(task)
        return taken
