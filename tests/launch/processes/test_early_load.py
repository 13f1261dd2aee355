"""What a local actor loads before its learner answers."""

import logging
from pathlib import Path

import pytest

from launch.processes.early_load import load_early
from launch.processes.stages import Stages
from protocol.config.load import load, to_toml
from protocol.config.settings import GrpoRun, ModelSettings, narrowed
from protocol.model.policy import load_policy
from protocol.run_record import Program, RunRecord, write_run
from tests.tiny import write_model_folder


def run_folder(folder: Path, model: Path, program: Program = "grpo") -> GrpoRun:
    flags = [f"--model.path={model}", "--data.path=d", "--rewards.functions=a.py:f"]
    run = load(GrpoRun, None, [*flags, "--run.seed=7", "--model.dtype=float32"])
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(run))
    write_run(folder, RunRecord(program=program))
    return run


def test_the_model_of_a_local_run_is_loaded_as_its_learner_does(tmp_path: Path):
    run = run_folder(tmp_path / "run", write_model_folder(tmp_path / "m"))
    stages = Stages("actor-0")
    early = load_early(tmp_path / "run", stages)
    assert early is not None
    assert (early.settings, early.seed) == (narrowed(run.model, ModelSettings), 7)
    assert list(stages.parts) == ["imports", "model"]
    theirs = load_policy(early.settings, seed=7)
    assert early.policy.model_digest == theirs.model_digest


def test_nothing_is_loaded_where_the_learner_decides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert load_early(None, Stages("a")) is None
    run_folder(tmp_path / "pairs", write_model_folder(tmp_path / "m"), "pairs")
    assert load_early(tmp_path / "pairs", Stages("a")) is None

    run_folder(tmp_path / "run", tmp_path / "nowhere")
    caplog.set_level(logging.INFO, "pippin.actor")
    assert load_early(tmp_path / "run", Stages("a")) is None
    assert "there is no model folder at" in caplog.messages[0]
