"""What the learner holds for its tasks: prompts until they are trained, groups until taken."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from learner.data.prompts import Prompt
from learner.online.experience import TrainedGroup
from protocol.messages.messages import Group, TaskKind
from protocol.messages.parts import TaskId


@dataclass
class Holdings:
    """Which tasks are open is the ledger's to say; this keeps what belongs to them."""

    _train: dict[TaskId, Prompt] = field(default_factory=dict)
    _eval: dict[TaskId, Prompt] = field(default_factory=dict)
    _training: dict[TaskId, Prompt] = field(default_factory=dict)
    _groups: dict[TaskId, Group] = field(default_factory=dict)

    def __contains__(self, task: TaskId) -> bool:
        return task in self._train or task in self._eval

    def add(self, task: TaskId, prompt: Prompt, kind: TaskKind) -> None:
        """Hold the prompt of a task that joined."""
        table = self._train if kind == "train" else self._eval
        table[task] = prompt

    def kind(self, task: TaskId) -> TaskKind:
        """Return what a held task is for."""
        return "train" if task in self._train else "eval"

    def prompt(self, task: TaskId) -> Prompt:
        """Return the prompt of a held task."""
        return self._train[task] if task in self._train else self._eval[task]

    def keep(self, group: Group) -> None:
        """Hold the group that counts for its task."""
        self._groups[group.task] = group

    def forget(self, task: TaskId) -> None:
        """Let go of a task."""
        for table in (self._train, self._eval, self._groups):
            table.pop(task, None)

    def form(self, tasks: Sequence[TaskId]) -> list[TrainedGroup]:
        """Hand over the groups of a batch; its prompts stay outstanding until `consumed`.

        A checkpoint may come before the batch is consumed, and must not lose its rows.
        """
        self._training = {task: self._train[task] for task in tasks}
        return [self._take(task) for task in tasks]

    def consumed(self) -> None:
        """Let go of the prompts of the batch in training."""
        self._training.clear()

    def evaluated(self, tasks: Sequence[TaskId]) -> list[TrainedGroup]:
        """Hand over the groups of an evaluation and let go of all its tasks."""
        groups = [self._take(task) for task in tasks]
        self._eval.clear()
        return groups

    def outstanding(self) -> dict[int, Prompt]:
        """Return the prompts of the tasks that are not trained yet, by number."""
        return {task.number: p for task, p in (*self._training.items(), *self._train.items())}

    def _take(self, task: TaskId) -> TrainedGroup:
        taken = TrainedGroup(self.prompt(task), self._groups[task])
        self.forget(task)
        return taken
