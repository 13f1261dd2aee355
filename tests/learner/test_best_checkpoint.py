"""The best evaluation's checkpoint outlives those that came after it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from learner.checkpoint import Checkpoint, checkpoints, save_checkpoint
from learner.interfaces import Prepared
from learner.losses.metrics import Metrics
from learner.optim.step import Step
from learner.records import Records
from learner.trainer import Schedule, Trainer
from protocol.config.settings import OptimizerSettings

Arrays = dict[str, mx.array]


class Linear:
    """Steps on the mean of a linear layer's output."""

    num_iterations = 1

    def prepare(self, batch: mx.array) -> Prepared[Arrays]:
        return Prepared([{"x": batch}], {})

    def loss(self, model: nn.Module, arrays: Arrays) -> tuple[mx.array, Metrics]:
        return model(arrays["x"]).mean(), Metrics()


class Ones:
    """The same batch again and again."""

    exhausted = False

    def poll(self, timeout_s: float = 0.0) -> mx.array:
        return mx.ones((1, 2))

    def publish(self, version: int) -> None:
        """Nothing to publish."""

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> bytes:
        return b""


class Known:
    """Accuracies, and losses where there are any, that are known beforehand, by version."""

    def __init__(self, values: dict[int, float], losses: dict[int, float]) -> None:
        self.values = values
        self.losses = losses
        self.pending = False
        self.ready: list[int] = []

    def start(self, version: int) -> None:
        self.ready.append(version)

    def poll(self) -> tuple[int, dict[str, float], list[dict[str, Any]]] | None:
        if not self.ready:
            return None
        version = self.ready.pop()
        metrics = {"eval/rewards/accuracies": self.values[version]}
        if version in self.losses:
            metrics["eval/loss"] = self.losses[version]
        return version, metrics, []


def run(folder, values: dict[int, float], losses: dict[int, float] | None = None) -> Trainer[Any]:
    model = nn.Linear(2, 1)
    trainer: Trainer[Any] = Trainer(
        model,
        Ones(),
        Linear(),
        Step(model, OptimizerSettings(), total_steps=6, compiled=False),
        Records(folder, 0.0),
        Schedule(6, save_steps=0, save_total_limit=1, eval_steps=1, eval_at_start=True),
        Known(values, losses or {}),
    )
    while not trainer.done:
        trainer.advance()
    return trainer


def test_best_and_last_are_left(tmp_path):
    values = {0: 0.5, 1: 0.6, 2: 0.9, 3: 0.7, 4: 0.9, 5: 0.8, 6: 0.2}
    trainer = run(tmp_path, values)
    assert trainer.best["value"] == 0.9
    assert trainer.best["step"] == 2.0
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000002", "step-000006"]


def test_a_last_policy_that_is_best_is_saved_once(tmp_path):
    trainer = run(tmp_path, {step: step / 10 for step in range(7)})
    assert trainer.best["step"] == 6.0
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000006"]


def test_of_equal_accuracies_the_lower_loss_is_best(tmp_path):
    values = {0: 0.8, 1: 0.7, 2: 0.75, 3: 0.7, 4: 0.75, 5: 0.75, 6: 0.2}
    trainer = run(tmp_path, values, {2: 0.6, 4: 0.5, 5: 0.7})
    assert trainer.best["step"] == 4.0
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000004", "step-000006"]


def test_the_best_is_of_trained_policies_though_the_start_was_better(tmp_path):
    trainer = run(tmp_path, {0: 0.9, 1: 0.1, 2: 0.5, 3: 0.4, 4: 0.3, 5: 0.2, 6: 0.1})
    assert trainer.best["step"] == 2.0
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000002", "step-000006"]


def test_spared_steps_do_not_count_against_the_limit(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, Checkpoint(step, {}, {}, b"", {}), keep=2, also={1})
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000001", "step-000004", "step-000005"]
