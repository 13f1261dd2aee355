"""Checkpoints: exact, whole or not at all, and a disk that does not take them."""

import mlx.core as mx
import numpy as np
import pytest

from learner.checkpoint import Checkpoint, checkpoints, load_checkpoint, save_checkpoint
from protocol.errors import CheckpointError


def checkpoint(step: int, value: float = 1.5) -> Checkpoint:
    return Checkpoint(
        step=step,
        weights={"a": mx.array([value, 2.0])},
        optimizer={"m": mx.array([3], mx.int64)},
        source=b"source",
        state={"num_tokens": 9.0},
    )


def test_what_was_saved_is_loaded_and_the_newest_is_taken(tmp_path):
    for step in (2, 4, 10):
        save_checkpoint(tmp_path, checkpoint(step, float(step)), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000004", "step-000010"]
    loaded = load_checkpoint(tmp_path)
    assert (loaded.step, loaded.source, loaded.state["num_tokens"]) == (10, b"source", 9.0)
    np.testing.assert_array_equal(np.array(loaded.weights["a"]), [10.0, 2.0])
    assert loaded.optimizer["m"].item() == 3
    assert load_checkpoint(tmp_path / "step-000004").step == 4


def test_the_same_step_is_replaced_and_nothing_is_left_lying(tmp_path):
    save_checkpoint(tmp_path, checkpoint(2, 1.0), keep=2)
    save_checkpoint(tmp_path, checkpoint(2, 7.0), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert load_checkpoint(tmp_path).weights["a"][0].item() == 7.0


def test_one_that_was_not_finished_is_not_looked_at(tmp_path):
    save_checkpoint(tmp_path, checkpoint(2), keep=2)
    (tmp_path / "step-000004").mkdir()
    (tmp_path / "step-000004/weights.safetensors").write_bytes(b"half")
    (tmp_path / ".step-000006.77").mkdir()
    assert load_checkpoint(tmp_path).step == 2


def test_what_a_killed_writer_left_is_deleted_by_the_next(tmp_path):
    (tmp_path / ".step-000006.77").mkdir()
    (tmp_path / ".step-000006.77/weights.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, checkpoint(7), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


def test_a_damaged_or_missing_one_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        load_checkpoint(tmp_path)
    path = save_checkpoint(tmp_path, checkpoint(2), keep=2)
    (path / "optimizer.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"step-000002 cannot be read.*Delete that folder"):
        load_checkpoint(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error_that_says_what_to_do(tmp_path):
    blocked = tmp_path / "checkpoints"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"Earlier checkpoints are untouched. Free space"):
        save_checkpoint(blocked, checkpoint(2), keep=2)
