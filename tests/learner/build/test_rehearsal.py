"""A rehearsed step changes no number of the run: weights, moments, random state, metrics."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from learner.build.rehearsal import LONGEST, rehearsal, rehearsal_batch
from learner.data.prompts import Prompt
from learner.objectives.grpo import GrpoObjective
from learner.online.experience import PromptGroup, TrainBatch
from learner.optim.step import Step
from learner.records import Records
from learner.trainer import Schedule, Trainer
from protocol.config.load import load
from protocol.config.settings import (
    GrpoRewards,
    GrpoRun,
    GrpoSettings,
    GrpoTrain,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    SamplingSettings,
)
from protocol.messages.arrays import floats_view, ids_view
from protocol.model.policy import load_policy
from protocol.model.random_state import random_state
from protocol.model.snapshots import trainable
from tests.protocol.builders import a_completion, a_group, a_reward
from tests.protocol.config.recipes import FLAGS
from tests.tiny import write_model_folder


class OneBatch:
    """A source of one batch of two groups, published nowhere."""

    exhausted = False

    def __init__(self) -> None:
        groups = [
            a_group([a_completion([5, 9, 1], 0), a_completion([7, 1], 0)], reward=a_reward([1, 0]))
            for _ in range(2)
        ]
        prompts = [Prompt(index, [3 + index, 8], {"prompt": "p"}) for index in range(2)]
        items = [PromptGroup(*pair) for pair in zip(prompts, groups, strict=True)]
        self.batch = TrainBatch(items, 0)

    def poll(self, timeout_s: float = 0.0) -> TrainBatch | None:
        return self.batch

    def publish(self, version: int) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> bytes:
        return b""


def trainer_of(model: Path, folder: Path, *, compiled: bool = False) -> Trainer[TrainBatch]:
    settings = ModelSettings(
        path=str(model), dtype="float32", lora=LoraSettings(rank=4, dropout=0.25)
    )
    policy = load_policy(settings, seed=3)
    mx.random.seed(11)
    grpo = GrpoSettings(old_logprobs="recompute")
    objective = GrpoObjective(
        grpo, GrpoTrain(length_bucket=8), SamplingSettings(num_generations=2),
        GrpoRewards(reward_weights=[1.0]), policy.model, "chunked", lambda item, at: {},
    )  # fmt: skip
    optimizer = OptimizerSettings(learning_rate=1e-2)
    step = Step(policy.model, optimizer, total_steps=4, compiled=compiled)
    schedule = Schedule(2, 0, 1, 0, eval_at_start=False)
    return Trainer(policy.model, OneBatch(), objective, step, Records(folder, 0.0), schedule)


def outcome(trainer: Trainer[TrainBatch]) -> dict[str, np.ndarray]:
    arrays = {f"weight.{name}": np.array(a) for name, a in trainable(trainer.model).items()}
    arrays |= {name: np.array(array) for name, array in trainer.updater.state().items()}
    timed = ("time", "train_", "learner/", "memory/")
    for name, value in trainer.last_metrics.items():
        if not name.startswith(timed) and "_time" not in name:
            arrays[f"metric.{name}"] = np.array(value)
    return arrays | {"random": np.array(random_state())}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rehearsal_changes_nothing(tmp_path: Path, compiled: bool):
    model = write_model_folder(tmp_path / "model")
    found: list[dict[str, np.ndarray]] = []
    for name in ("plain", "rehearsed"):
        trainer = trainer_of(model, tmp_path / name, compiled=compiled)
        if name == "rehearsed":
            before = outcome(trainer)
            batch = rehearsal_batch(
                groups=2, completions=2, rewards=1, prompt_length=3, completion_length=5
            )
            assert trainer.objective.prepare(batch).step
            trainer.rehearse(batch)
            assert not trainer.model.training
            after = outcome(trainer)
            assert before.keys() == after.keys()
            assert all(np.array_equal(before[key], after[key]) for key in before)
        for _ in range(2):
            trainer.advance()
        found.append(outcome(trainer))

    plain, rehearsed = found
    assert plain.keys() == rehearsed.keys()
    assert [key for key in plain if not np.array_equal(plain[key], rehearsed[key])] == []
    assert plain["schedule"].tolist() == [2, 0]
    assert plain["metric.grad_norm"] > 0


def test_dropout_would_show_a_moved_random_state(tmp_path: Path):
    """The test above compares what it says: with another random state, the weights differ."""
    model = write_model_folder(tmp_path / "model")
    found: list[dict[str, np.ndarray]] = []
    for seed in (11, 12):
        trainer = trainer_of(model, tmp_path / str(seed))
        mx.random.seed(seed)
        trainer.advance()
        found.append(outcome(trainer))
    assert any(not np.array_equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize(("asked", "got"), [(7, 7), (5000, LONGEST)])
def test_the_batch_has_the_asked_shape_and_rewards_that_differ(asked: int, got: int):
    batch = rehearsal_batch(
        groups=3, completions=4, rewards=2, prompt_length=asked, completion_length=asked
    )
    assert [len(item.prompt.prompt_ids) for item in batch.groups] == [got] * 3
    group = batch.groups[0].group
    assert [len(ids_view(each.token_ids)) for each in group.completions] == [got] * 4
    assert floats_view(group.reward.rewards).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_only_compiled_runs_rehearse_as_many_groups_as_a_step_has_kinds_of_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = trainer_of(write_model_folder(tmp_path / "model"), tmp_path / "run")
    seen: list[TrainBatch] = []
    monkeypatch.setattr(trainer, "rehearse", seen.append)
    flags = [*FLAGS[GrpoRun], "--train.batch_size=8", "--sampling.max_completion_length=9"]
    assert rehearsal(load(GrpoRun, None, [*flags, "--train.compile=off"]), 6, trainer) is None

    run = load(GrpoRun, None, [*flags, "--train.compile=on", "--train.micro_batch_size=3"])
    rehearse = rehearsal(run, 6, trainer)
    assert rehearse is not None
    rehearse()
    (batch,) = seen
    assert [len(item.prompt.prompt_ids) for item in batch.groups] == [6] * 6
    completions = batch.groups[0].group.completions
    assert [len(ids_view(each.token_ids)) for each in completions] == [9] * 8
