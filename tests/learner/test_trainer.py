"""The loop with fakes: order of events, skips, stops, saves that fail, exact resume."""

import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from learner.checkpoint import checkpoints, load_checkpoint
from learner.interfaces import Prepared
from learner.losses.metrics import Metrics
from learner.optim.step import Step, Update
from learner.records import Records
from learner.trainer import Schedule, Trainer
from protocol.config.settings import OptimizerSettings
from protocol.errors import CheckpointError
from protocol.model.snapshots import load_trainable, trainable
from protocol.run_record import CheckpointFailed, parse_events

Arrays = dict[str, mx.array]


class Mean:
    """Steps on the mean of a linear layer's output; batch 0 cannot be learned from."""

    def __init__(self, log: list[str], iterations: int = 1) -> None:
        self.log, self.num_iterations = log, iterations

    def prepare(self, batch: int) -> Prepared[Arrays]:
        self.log.append(f"prepare {batch}")
        return Prepared(
            [{"x": mx.full((1, 2), batch)}], {"batch_tokens": 3.0}, step=batch != 0,
            rollouts=[{"batch": batch}],
        )  # fmt: skip

    def loss(self, model: nn.Module, arrays: Arrays) -> tuple[mx.array, Metrics]:
        return model(arrays["x"]).mean(), Metrics(shares={"seen": mx.array(1.0)})


class Numbers:
    """Batches by number, from a list; ends after the last."""

    def __init__(self, log: list[str], numbers: list[int]) -> None:
        self.log, self.numbers, self.exhausted = log, numbers, False

    def poll(self, timeout_s: float = 0.0) -> int | None:
        self.exhausted = not self.numbers
        return self.numbers.pop(0) if self.numbers else None

    def publish(self, version: int) -> None:
        self.log.append(f"publish {version}")

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> bytes:
        self.log.append("state")
        return bytes(self.numbers)


class Held:
    """Evaluations that are there at the next poll."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.pending, self.version = log, False, -1

    def start(self, version: int) -> None:
        self.log.append(f"evaluate {version}")
        self.pending, self.version = True, version

    def poll(self) -> tuple[int, dict[str, float], list[dict[str, Any]]] | None:
        if not self.pending:
            return None
        self.pending = False
        return self.version, {"eval/loss": 1.0}, []


def trainer(
    tmp_path: Path,
    log: list[str],
    numbers: list[int],
    *,
    iterations: int = 1,
    evaluator: Held | None = None,
    **schedule: Any,
) -> Trainer[int]:
    mx.random.seed(0)
    model = nn.Linear(2, 1)
    step = Step(model, OptimizerSettings(learning_rate=0.1), total_steps=20, compiled=False)
    plan = {"max_steps": None, "save_steps": 0, "save_total_limit": 9, "eval_steps": 0,
            "eval_at_start": True, **schedule}  # fmt: skip
    return Trainer(
        model, Numbers(log, numbers), Mean(log, iterations), step, Records(tmp_path, 0.0),
        Schedule(**plan), evaluator,
    )  # fmt: skip


def run(made: Trainer[int]) -> None:
    for _ in range(50):
        if made.done:
            return
        made.advance()
    raise AssertionError("the trainer does not come to its end")


def test_evaluate_train_publish_save_in_this_order(tmp_path):
    log: list[str] = []
    run(trainer(tmp_path, log, [1, 2], evaluator=Held(log), save_steps=2))
    assert log == [
        "evaluate 0", "prepare 1", "publish 1", "prepare 2", "publish 2", "state",
        "evaluate 2", "state",
    ]  # fmt: skip
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-000002"]


def test_a_batch_that_teaches_nothing_counts_but_moves_no_weight(tmp_path):
    made = trainer(tmp_path, [], [1, 0])
    made.advance()
    before = {name: np.array(value) for name, value in trainable(made.model).items()}
    made.advance()  # momentum from the first batch would move the weights
    for name, value in trainable(made.model).items():
        np.testing.assert_array_equal(np.array(value), before[name])
    assert made.step == 2
    assert made.last_metrics["optimizer_skipped"] == 1
    assert made.last_metrics["num_tokens"] == 6
    assert made.last_metrics["learning_rate"] == pytest.approx(0.1 * 19 / 20)


def test_iterations_step_more_than_once_on_a_batch(tmp_path):
    made = trainer(tmp_path, [], [1], iterations=3)
    before = np.array(made.model.parameters()["bias"])
    made.advance()
    # Adam's steps with a constant gradient are the learning rates: 0.1 (20 + 19 + 18) / 20.
    moved = before - np.array(made.model.parameters()["bias"])
    np.testing.assert_allclose(moved, 0.1 * 57 / 20, atol=1e-5)
    assert made.step == 1
    assert made.last_metrics["seen"] == 1  # the mean over iterations


def test_the_model_trains_in_training_mode_and_is_left_in_eval_mode(tmp_path):
    made = trainer(tmp_path, [], [1])
    made.model.eval()
    modes: list[tuple[str, bool]] = []
    prepare, loss = made.objective.prepare, made.objective.loss

    def noted_prepare(batch: int) -> Prepared[Arrays]:
        modes.append(("prepare", made.model.training))
        return prepare(batch)

    def noted_loss(model: nn.Module, arrays: Arrays) -> tuple[mx.array, Metrics]:
        modes.append(("loss", model.training))
        return loss(model, arrays)

    made.objective.prepare, made.objective.loss = noted_prepare, noted_loss
    made.advance()
    assert modes == [("prepare", False), ("loss", True)]
    assert not made.model.training


def test_a_stop_saves_without_a_further_batch_or_evaluation(tmp_path):
    log: list[str] = []
    made = trainer(tmp_path, log, [1, 2, 3], evaluator=Held(log), eval_at_start=False)
    made.advance()
    made.stopping = True
    run(made)
    assert log == ["prepare 1", "publish 1", "state"]
    assert load_checkpoint(tmp_path / "checkpoints").step == 1


def test_a_stop_before_the_first_step_saves_without_an_evaluation(tmp_path, caplog):
    caplog.set_level(logging.INFO, "pippin")
    log: list[str] = []
    made = trainer(tmp_path / "stopped", log, [1], evaluator=Held(log))
    made.stopping = True
    run(made)
    assert log == ["state"]
    assert load_checkpoint(tmp_path / "stopped/checkpoints").step == 0
    assert "evaluating" not in caplog.text
    run(trainer(tmp_path / "whole", log, [1], evaluator=Held(log)))
    said = [message for message in caplog.messages if message.startswith("evaluating")]
    assert said == ["evaluating step 0", "evaluating step 1"]
    events = parse_events((tmp_path / "whole/events.jsonl").read_bytes())
    assert [event.text for event in events] == [
        "evaluating step 0", "evaluated step 0", "evaluating step 1", "evaluated step 1",
        "saved checkpoints/step-000001",
    ]  # fmt: skip


def test_a_save_that_fails_on_the_way_is_logged_and_the_last_one_is_an_error(tmp_path, caplog):
    made = trainer(tmp_path, [], [1, 2], save_steps=1)
    (tmp_path / "checkpoints").write_text("no room for a folder")
    made.advance()
    made.advance()
    assert made.step == 2
    assert caplog.text.count("training goes on without this checkpoint") == 2
    events = parse_events((tmp_path / "events.jsonl").read_bytes())
    failed = [event for event in events if isinstance(event, CheckpointFailed)]
    assert [event.step for event in failed] == [1, 2]
    assert "Free space" in failed[0].reason
    with pytest.raises(CheckpointError, match="Free space"):
        run(made)


def test_the_first_save_that_works_again_says_so(tmp_path):
    made = trainer(tmp_path, [], [1, 2, 3], save_steps=1)
    (tmp_path / "checkpoints").write_text("no room for a folder")
    made.advance()
    (tmp_path / "checkpoints").unlink()
    made.advance()
    made.advance()
    events = parse_events((tmp_path / "events.jsonl").read_bytes())
    assert isinstance(events[0], CheckpointFailed)
    assert [event.text for event in events[1:]] == [
        "saving works again: saved checkpoints/step-000002",
        "saved checkpoints/step-000003",
    ]


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    whole = trainer(tmp_path / "a", [], [1, 2, 3, 4], save_steps=2)
    run(whole)
    made = trainer(tmp_path / "b", [], [3, 4])
    checkpoint = load_checkpoint(tmp_path / "a/checkpoints/step-000002")
    assert checkpoint.source == bytes([3, 4])
    load_trainable(made.model, checkpoint.weights, "checkpoint")
    made.restore(checkpoint)
    run(made)
    assert (made.step, made.num_tokens) == (4, 12.0)
    for name, value in trainable(whole.model).items():
        np.testing.assert_array_equal(np.array(trainable(made.model)[name]), np.array(value))


def test_every_further_pass_brings_the_batch_up_to_date_and_metrics_are_means(tmp_path):
    made = trainer(tmp_path, [], [], iterations=3)
    seen: list[tuple[bool, int]] = []
    prepared = Mean([], 3).prepare(2)
    norms = [3.0, float("inf"), 1.0]

    def refresh() -> None:
        seen.append((made.model.training, len(norms)))

    class Updater:
        def accumulate(self, arrays: Arrays, loss_fn: Any) -> tuple[mx.array, Metrics]:
            return loss_fn(made.model, arrays)

        def apply(self) -> Update:
            norm = norms.pop(0)
            return Update(grad_norm=norm, learning_rate=0.1, applied=norm < 2)

    prepared.refresh, made.updater = refresh, Updater()  # type: ignore[assignment]
    metrics = made._update(prepared)
    assert seen == [(False, 2), (False, 1)]  # in eval mode, before the second and third pass
    assert metrics["grad_norm"] == float("inf")
    assert metrics["optimizer_skipped"] == pytest.approx(2 / 3)
    assert not made.model.training


def test_an_evaluation_that_was_left_out_is_not_begun_while_catching_up(tmp_path):
    """Its policy was superseded before: no actor could answer with it."""
    run(trainer(tmp_path, [], [1, 2, 3], save_steps=2, eval_at_start=False))
    log: list[str] = []
    made = trainer(tmp_path, log, [3, 4, 5], evaluator=Held(log), eval_steps=1, eval_at_start=False)
    made.restore(load_checkpoint(tmp_path / "checkpoints/step-000002"))
    made.catch_up(4, evaluated=None)
    run(made)
    assert [entry for entry in log if entry.startswith("evaluate")] == ["evaluate 4", "evaluate 5"]


def test_an_evaluation_that_ended_before_a_checkpoint_is_recorded_before_it(tmp_path):
    """The journal after that checkpoint does not have it: a learner killed there would lose it."""
    log: list[str] = []
    made = trainer(tmp_path, log, [1, 2], evaluator=Held(log), save_steps=1)
    assert made.evaluator is not None
    made.advance()  # the evaluation of step 0 is open
    made.step = 1
    recorded: list[int] = []
    made.source.state = lambda: recorded.append(made.records.newest()[1]) or b""
    made.evaluator.start(1)
    made.save(required=True)
    assert recorded == [0]
    assert made.records.newest()[1] == 1


def test_an_evaluation_of_the_last_step_that_was_lost_is_begun_again(tmp_path):
    run(trainer(tmp_path, [], [1, 2], save_steps=2, eval_at_start=False))
    log: list[str] = []
    made = trainer(tmp_path, log, [], evaluator=Held(log), eval_at_start=False)
    made.restore(load_checkpoint(tmp_path / "checkpoints/step-000002"))
    made.catch_up(2, evaluated=2)
    run(made)
    assert [entry for entry in log if entry.startswith("evaluate")] == ["evaluate 2"]
    assert made.records.newest() == (2, 2)
