"""Settings of a resumed run: changes are listed, and undone where they are refused."""

from pathlib import Path

import pytest

from launch.cli.command_line import read_command_line
from launch.processes.run_lock import hold_run_folder
from launch.run_folder.resume import (
    accept_settings,
    changed_settings,
    prepare_resume,
    require_program,
    restore_settings,
)
from protocol.config.load import load, to_toml
from protocol.config.settings import SftRun
from protocol.errors import ConfigError
from protocol.run_record import RunRecord, StateChanged, parse_events, read_run, write_run

FLAGS = ["--model.path=m", "--data.path=d"]
OTHER = [*FLAGS, "--run.resume=r", "--run.seed=7", "--model.lora.rank=4", "--data.max_length=none"]


def test_changed_settings_are_listed():
    before, after = load(SftRun, None, FLAGS), load(SftRun, None, OTHER)
    assert changed_settings(before, before) == []
    seed, lora, length = changed_settings(before, after)
    assert seed == "changed: run.seed = 7, was 42"
    assert lora.startswith('changed: model.lora = {"rank":4,')
    assert '"rank":16' in lora.split(", was ")[1]
    assert length == "changed: data.max_length = null, was 1024"


def test_refused_settings_are_undone_and_events_keep_their_history(tmp_path: Path):
    before, after = load(SftRun, None, FLAGS), load(SftRun, None, OTHER)
    config = tmp_path / "config.toml"
    config.write_text(to_toml(before))
    write_run(tmp_path, RunRecord(program="sft", state="finished", started_at=5.0, total_steps=4))
    (tmp_path / "events.jsonl").write_text(
        '{"event":"StateChanged","time":1.0,"state":"finished"}\n{"ev'
    )
    prepare_resume(tmp_path, after)
    assert load(SftRun, config) == after
    assert restore_settings(tmp_path)
    assert load(SftRun, config) == before
    record = read_run(tmp_path)
    assert (record.state, record.started_at, record.total_steps) == ("finished", 5.0, 4)
    prepare_resume(tmp_path, after)
    accept_settings(tmp_path)
    assert not restore_settings(tmp_path)  # nothing is left to restore
    assert load(SftRun, config) == after

    record = read_run(tmp_path)
    assert (record.state, record.started_at, record.total_steps) == ("starting", 5.0, None)
    events = parse_events((tmp_path / "events.jsonl").read_bytes())
    states = [event.state for event in events if isinstance(event, StateChanged)]
    assert states == ["finished", "starting", "finished", "starting"]  # the partial line is gone
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["config.toml", "events.jsonl", "run.json"]


@pytest.mark.parametrize("damaged", ["", '{"program": "s', "[]"])
def test_a_damaged_run_json_is_an_error_that_says_how_to_repair_it(tmp_path: Path, damaged: str):
    (tmp_path / "run.json").write_text(damaged)
    with pytest.raises(ConfigError, match=r'run\.json is damaged: .*write \{"program": "grpo"\}'):
        require_program(tmp_path, "sft")
    (tmp_path / "run.json").write_text('{"program": "sft"}')
    require_program(tmp_path, "sft")


def test_a_run_that_is_at_work_is_not_touched_by_a_resume(tmp_path: Path):
    (tmp_path / "config.toml").write_text(to_toml(load(SftRun, None, FLAGS)))
    write_run(tmp_path, RunRecord(program="sft", state="running"))
    flags = [f"--run.resume={tmp_path}", "--run.save_steps=7"]
    with hold_run_folder(tmp_path):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ConfigError, match=r"another learner .* is working in"):
            read_command_line(SftRun, flags, "")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run, _ = read_command_line(SftRun, flags, "")
    assert run.run.save_steps == 7
