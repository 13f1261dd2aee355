"""launch/preference.py as a newcomer meets it: a mistake, the same name again, Ctrl-C, the end."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import launch.cli.run
from launch import preference
from launch.cli.command_line import read_command_line
from launch.cli.run import supervise
from launch.processes.exit_status import STOPPED
from launch.processes.specs import offline_processes
from protocol.config.settings import PreferenceRun
from protocol.run_record import change_state, read_run
from tests.tiny import write_model_folder


def launched(folder: Path, *flags: str) -> tuple[int, list[str]]:
    """Run the program in `folder`; return its status and the lines of its output."""
    command = [sys.executable, preference.__file__, *flags]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return done.returncode, done.stdout.decode().splitlines()


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_mistake_is_explained_and_costs_no_name(tmp_path: Path):
    write_model_folder(tmp_path / "model")
    flags = ["--model.path=model", "--data.path=rows.jsonl", "--run.name=a", "--train.batch_size=2"]
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "w2 ", "chosn": "w3", "rejected": "w4"}] * 9)
    status, lines = launched(tmp_path, *flags)
    assert status == 1
    assert read_run(tmp_path / "runs" / "a").state == "failed_to_start"
    assert lines[-1] == "logs:    runs/a/logs"
    assert 'data.columns = {chosen = "chosn"} would read that column' in lines[-2]
    assert not any("go on" in line for line in lines)

    write_rows(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "w2 ", "chosen": f"w{row}", "rejected": "w4", "id": "x"}
            for row in range(5, 9)
        ],
    )
    status, lines = launched(tmp_path, *flags)
    assert status == 0
    rows = tmp_path / "rows.jsonl"
    kept = f"{rows}: 4 rows kept, 0 dropped, 0 truncated"
    unread = f"{rows}: nothing reads the columns ['id']; rename them with data.columns, "
    unread += "or make rows of them in data.prepare"
    assert lines.index(unread) < lines.index(kept)
    starts = [line.split(":")[0] for line in lines]
    for said in ("Training lora", "Reference policy", "Estimated memory of a step"):
        assert said in starts
        assert f" INFO {said}: " in (tmp_path / "runs/a/logs/learner.log").read_text()
    assert [line[:8] for line in lines if line.startswith("step")] == ["step 1/2", "step 2/2"]
    assert lines[-4:] == [
        "weights: runs/a/adapters",
        "chat:    uv run mlx_lm.chat --model model --adapter-path runs/a/adapters",
        'ask:     uv run mlx_lm.generate --model model --adapter-path runs/a/adapters --prompt "…"',
        "export:  uv run launch/export.py runs/a OUT",
    ]
    assert launched(tmp_path, *flags)[0] == 2

    status, lines = launched(tmp_path, "--run.resume=runs/a")
    assert status == 0
    assert any(line.startswith("the run is finished: step 2 of 2") for line in lines)


def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_resume(tmp_path: Path):
    write_model_folder(tmp_path / "model")
    write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "w2 ", "chosen": "w5", "rejected": "w4 w7"}] * 4
    )
    command = [sys.executable, preference.__file__, "--model.path=model", "--run.name=a"]
    command += ["--data.path=rows.jsonl", "--train.max_steps=100000"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGINT)
                break
        last = process.stdout.read().splitlines()
        assert process.wait() == STOPPED == 130
    assert last[-1] == f"resume:  uv run {preference.__file__} --run.resume runs/a"
    assert last[-5] == "weights: runs/a/adapters"
    assert list((tmp_path / "runs" / "a" / "checkpoints").glob("step-*"))
    assert read_run(tmp_path / "runs" / "a").state == "stopped"


@pytest.mark.parametrize(("step", "first"), [(0, "logs:"), (3, "weights:")])
def test_a_run_that_stopped_before_its_first_step_offers_no_adapters(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
    first: str,
):
    flags = ["--model.path=m", "--data.path=org/d", f"--run.dir={tmp_path}", "--run.name=a"]
    run, folder = read_command_line(PreferenceRun, flags, "")

    def stopped(_: object) -> int:
        saved = folder / "checkpoints" / f"step-{step:06d}"
        saved.mkdir(parents=True)
        (saved / "state.json").write_text("{}")
        change_state(folder, "stopped")
        return STOPPED

    monkeypatch.setattr(launch.cli.run.anyio, "run", stopped)
    assert supervise(folder, run, offline_processes(run, folder)) == STOPPED
    lines = capsys.readouterr().out.splitlines()
    offered = [line.split()[0] for line in lines if line.split()[0].endswith(":")]
    assert offered[0:2] == ["run:", first]
    assert offered[-1] == "resume:"
    assert read_run(folder).state == "stopped"


def test_an_interrupt_before_the_supervisor_listens_leaves_the_name_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """An unfinished checkpoint is nothing to resume from."""

    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.cli.run.anyio, "run", interrupted)
    flags = ["--model.path=m", "--data.path=org/d", f"--run.dir={tmp_path}", "--run.name=a"]
    run, folder = read_command_line(PreferenceRun, flags, "")
    (folder / "checkpoints/.step-000002.77").mkdir(parents=True)
    (folder / "checkpoints/step-000001").mkdir()
    assert supervise(folder, run, offline_processes(run, folder)) == STOPPED
    assert read_run(folder).state == "failed_to_start"
    assert "resume:" not in capsys.readouterr().out
