"""Checkpoints: exact, whole or not at all; damage, and a disk that does not take them."""

import hashlib
import json

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from learner.checkpoint import (
    Checkpoint,
    checkpoints,
    load_checkpoint,
    remove_unfinished,
    restoring,
    save_checkpoint,
)
from learner.data.sets import BatchesState
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


def test_a_replacement_that_was_cut_short_gives_the_earlier_one_its_name_back(tmp_path):
    save_checkpoint(tmp_path, checkpoint(2, 7.0), keep=2)
    (tmp_path / "step-000002").rename(tmp_path / ".step-000002.replaced")
    (tmp_path / ".step-000002.77").mkdir()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert load_checkpoint(tmp_path).weights["a"][0].item() == 7.0


def test_half_deleted_folders_are_deleted_and_nothing_else(tmp_path):
    save_checkpoint(tmp_path, checkpoint(4), keep=2)
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002/weights.safetensors").write_bytes(b"half")
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-000003").write_text("a file")
    remove_unfinished(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-000003", "step-000004", "step-notes"]


def test_one_that_is_missing_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        load_checkpoint(tmp_path)


FILES = ("weights.safetensors", "optimizer.safetensors", "source.msgpack", "state.json")
DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-2],
    "longer": lambda data: data + b" x",
    "bit": lambda data: data[:-4] + bytes([data[-4] ^ 1]) + data[-3:],
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_named_and_the_one_before_it_is_loaded(tmp_path, caplog, name, damage):
    for step in (2, 4):
        path = save_checkpoint(tmp_path, checkpoint(step, float(step)), keep=2)
    change, file = DAMAGE[damage], path / name
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))

    loaded = load_checkpoint(tmp_path)
    assert (loaded.step, loaded.path) == (2, tmp_path / "step-000002")
    assert loaded.weights["a"][0].item() == 2.0
    warnings = [record.getMessage() for record in caplog.records]
    if (name, damage) == ("state.json", "gone"):
        assert warnings == []  # a folder that is half deleted, not a damaged checkpoint
        return
    assert warnings[0].startswith(f"passing over a damaged checkpoint: {file}: ")
    assert warnings[1:] == [f"continuing from the checkpoint before it: {loaded.path}"]


def test_an_edited_state_is_noticed_and_another_layout_of_the_same_is_not(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(2), keep=2) / "state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, sort_keys=True))
    assert load_checkpoint(tmp_path).state == {"step": 2, "num_tokens": 9.0}
    path.write_text(json.dumps({**content, "num_tokens": 8.0}))
    with pytest.raises(CheckpointError, match=r"state\.json: its content has SHA-256 .* edited"):
        load_checkpoint(tmp_path)


def test_digests_are_those_of_the_files(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(2), keep=2)
    files = json.loads((path / "state.json").read_text())["files"]
    assert files == {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES[:3]
    }


def test_without_an_intact_one_all_are_listed_with_what_is_wrong(tmp_path):
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, checkpoint(step), keep=3)
    (tmp_path / "step-000002/optimizer.safetensors").write_bytes(b"nonsense")
    (tmp_path / "step-000004/state.json").write_text("")
    (tmp_path / "step-000006/state.json").write_text('{"step": 6, "num_tokens": 9.0}')
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    text = str(caught.value)
    digest = hashlib.sha256(b"nonsense").hexdigest()[:12]
    assert f"There is no intact checkpoint in {tmp_path}: " in text
    assert f"step-000002/optimizer.safetensors: 8 bytes with SHA-256 {digest}, required" in text
    assert f"{tmp_path}/step-000004/state.json: 0 bytes, not a JSON object" in text
    assert f"{tmp_path}/step-000006/state.json: it has no digests, as those of earlier" in text
    assert text.index("step-000006") < text.index("step-000004") < text.index("step-000002")


def test_a_later_damaged_one_does_not_count_against_the_limit(tmp_path):
    for step in (4, 6):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    (tmp_path / "step-000006/source.msgpack").write_bytes(b"")
    save_checkpoint(tmp_path, checkpoint(5), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000005", "step-000006"]
    assert load_checkpoint(tmp_path).step == 5
    save_checkpoint(tmp_path, checkpoint(8), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000008"]


def test_steps_are_ordered_by_number(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert load_checkpoint(tmp_path).step == 1_000_000


def test_a_source_of_another_program_is_a_clear_error(tmp_path):
    save_checkpoint(tmp_path, checkpoint(2), keep=2)
    loaded = load_checkpoint(tmp_path)
    with (
        pytest.raises(CheckpointError, match=r"step-000002/source\.msgpack: not what this program"),
        restoring(loaded) as source,
    ):
        msgspec.msgpack.decode(source, type=BatchesState)


def test_a_folder_that_cannot_be_written_is_an_error_that_says_what_to_do(tmp_path):
    blocked = tmp_path / "checkpoints"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"Earlier checkpoints are untouched. Free space"):
        save_checkpoint(blocked, checkpoint(2), keep=2)
