"""What a run writes as it goes."""

import json
import resource
import tracemalloc
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.run_folder.tail import JsonTail
from learner.records import Records, move_lines
from protocol.errors import DiskError
from protocol.run_record import (
    BLOCK,
    CheckpointFailed,
    CheckpointSaved,
    cut_partial_line,
    parse_events,
)


def test_lines_are_appended_whole_and_what_is_not_finite_is_null(tmp_path):
    records = Records(tmp_path / "run", started_at=0.0)
    records.metrics(1, {"loss": 0.5, "kl": float("nan")})
    records.metrics(2, {"loss": float("inf")})
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, None)]
    assert lines[0]["kl"] is None
    assert lines[0]["time_s"] > 0


def test_a_line_that_a_killed_writer_left_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"st')
    Records(tmp_path, started_at=0.0).metrics(2, {})
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == [1, 2]
    whole = tmp_path / "whole.jsonl"
    whole.write_text('{"step":1}\n')
    cut_partial_line(whole)
    assert whole.read_text() == '{"step":1}\n'
    cut_partial_line(tmp_path / "absent")


@pytest.mark.parametrize("partial", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("whole", [b"", b"\n", b"a\n" * BLOCK])
def test_partial_lines_of_any_length_are_cut_off(tmp_path, whole, partial):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(whole + b"x" * partial)
    cut_partial_line(path)
    assert path.read_bytes() == whole


def test_no_file_of_a_long_run_is_held_in_memory(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    line = json.dumps({"kind": "train", "trained_at": 7, "text": "x" * 2000}) + "\n"
    path.write_text(line * 4000 + '{"kind"')
    tracemalloc.start()
    try:
        Records(tmp_path, started_at=0.0).undo(5, 5)
        Records(tmp_path, started_at=0.0).undo(5, 5)
        JsonTail(tmp_path / "rollouts.undone.jsonl").skip()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "rollouts.undone.jsonl").read_text() == line * 4000
    assert path.read_bytes() == b""
    assert peak < 1 << 20  # of 8 MB


@contextmanager
def full_disk(size: int) -> Generator[None]:
    """Let no file of this process grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 10, 150])
def test_events_that_a_full_disk_refuses_follow_once_there_is_room(tmp_path, room):
    records, path = Records(tmp_path, started_at=0.0), tmp_path / "events.jsonl"
    records.event(CheckpointSaved(step=1, path="a"))
    before = path.read_bytes()
    failed = [CheckpointFailed(step=step, reason="the disk is full") for step in (2, 3)]
    with full_disk(len(before) + room):
        records.event(failed[0])
        assert path.read_bytes().startswith(before)
        records.event(failed[1])
    last = CheckpointSaved(step=4, path="b", again=True)
    records.event(last)
    assert parse_events(path.read_bytes())[1:] == [*failed, last]
    assert path.read_bytes().count(b"\n") == 4  # no line was torn or written twice


def test_records_wait_for_a_full_disk_and_are_then_whole(tmp_path, monkeypatch, caplog):
    records, path = Records(tmp_path, started_at=0.0), tmp_path / "rollouts.jsonl"
    records.rollouts([{"step": 1}])
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes: list[int] = []

    def freed_after_three(_: float) -> None:
        sizes.append(path.stat().st_size)
        if len(sizes) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, room)

    monkeypatch.setattr("learner.full_disk.time.sleep", freed_after_three)
    with full_disk(20):
        records.rollouts([{"step": step} for step in (2, 3)])
    assert sizes == [11, 11, 11]  # nothing of the lines while some do not fit
    assert path.read_text() == '{"step":1}\n{"step":2}\n{"step":3}\n'
    assert [record.message for record in caplog.records] == [
        "rollouts.jsonl cannot be written: [Errno 27] File too large. The run waits; free space "
        "within 60 s, or it ends",
        "rollouts.jsonl can be written again",
    ]


def test_records_that_a_full_disk_never_takes_end_the_run_with_its_reason(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(
        "learner.full_disk.time",
        SimpleNamespace(monotonic=lambda: float(next(clock)), sleep=lambda _: None),
    )
    records = Records(tmp_path, started_at=0.0)
    with full_disk(4), pytest.raises(DiskError, match=r"metrics\.jsonl could not .* for 60 s"):
        records.metrics(1, {"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


METRICS = [
    {"step": 0, "eval/loss": 3.0},
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": 1.0},
    {"step": 2, "eval/loss": 1.5},
    {"step": 3, "loss": 0.5},
]
SAMPLED = [
    {"kind": "eval", "trained_at": 0},
    {"kind": "train", "trained_at": 0},  # step 1
    {"kind": "train", "trained_at": 1},
    {"kind": "eval", "trained_at": 2},
    {"kind": "train", "trained_at": 2},
    {"note": "by hand"},
]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("evaluated", [0, 2])
def test_what_a_resume_does_again_moves_aside(tmp_path, evaluated):
    metrics, rollouts = tmp_path / "metrics.jsonl", tmp_path / "rollouts.jsonl"
    write(metrics, METRICS)
    write(rollouts, SAMPLED)
    records = Records(tmp_path, started_at=0.0)
    records.undo(2, evaluated)
    again = [3, 4] if evaluated == 0 else [4]  # the evaluation of step 2 too, or not
    stay = [line for index, line in enumerate(METRICS) if index not in again]
    assert read(metrics) == stay
    assert read(tmp_path / "metrics.undone.jsonl") == [METRICS[index] for index in again]
    stay = [line for index, line in enumerate(SAMPLED) if index not in again]
    assert read(rollouts) == stay
    assert read(tmp_path / "rollouts.undone.jsonl") == [SAMPLED[index] for index in again]

    records.undo(2, evaluated)  # nothing more to move
    records.metrics(3, {"loss": 0.25})
    records.undo(2, 2)  # and killed once more
    assert [line["loss"] for line in read(tmp_path / "metrics.undone.jsonl")[-2:]] == [0.5, 0.25]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl", "metrics.undone.jsonl", "rollouts.jsonl", "rollouts.undone.jsonl",
    ]  # fmt: skip


def test_nothing_is_lost_or_doubled_if_moving_is_cut_short(tmp_path, monkeypatch):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.undone.jsonl"
    write(aside, [{"step": 9, "loss": 0.0}])  # of an earlier resume
    write(path, METRICS)

    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            move_lines(path, lambda line: line["step"] > 1)
    assert read(path) == METRICS
    assert move_lines(path, lambda line: line["step"] > 1) == 3
    assert read(path) == METRICS[:2]
    assert read(aside) == [{"step": 9, "loss": 0.0}, *METRICS[2:]]


def test_a_run_that_was_not_ahead_keeps_its_files(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, METRICS)
    before = path.stat().st_ino
    Records(tmp_path, started_at=0.0).undo(3, 2)
    assert path.stat().st_ino == before
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_newest_step_and_evaluation_are_read_past_a_damaged_line(tmp_path: Path):
    records = Records(tmp_path, 0.0)
    assert records.newest() == (0, -1)
    for step in (1, 2, 3):
        records.metrics(step, {"loss": 0.5})
    records.metrics(2, {"eval/reward": 0.5})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(bytes(64) + b"\n")
    assert Records(tmp_path, 0.0).newest() == (3, 2)
