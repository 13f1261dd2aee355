"""The programs' command lines: run folder, paths of a recipe, resuming, refusals."""

import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from launch import grpo
from launch.cli.command_line import read_command_line
from launch.cli.run import what_next
from launch.grpo import DEFAULT_RECIPE
from launch.processes.restarts import RestartLimit
from launch.processes.specs import (
    actor_specs,
    offline_processes,
    online_processes,
    reward_services,
    snapshot_endpoint,
)
from launch.run_folder.paths import resolve_flags, resolve_path
from protocol.config.load import load
from protocol.config.settings import GrpoRun, PairsRun, PreferenceRun, SftRun
from protocol.errors import ConfigError
from protocol.run_record import change_state, read_run, write_run

OFFLINE = ["--model.path=m", "--data.path=org/set"]


def test_the_default_recipe_resolves_its_own_files(tmp_path: Path):
    run, folder = read_command_line(GrpoRun, [f"--run.dir={tmp_path}"], "", DEFAULT_RECIPE)
    recipes = DEFAULT_RECIPE.parent
    assert run.model.path == str(recipes.parent / "models" / "addition")
    assert run.data.path == f"{recipes / 'addition.py'}:train_rows"
    assert run.rewards.functions == [f"{recipes / 'addition.py'}:exact_match"]
    assert load(GrpoRun, folder / "config.toml") == run
    record = read_run(folder)
    assert (record.program, record.state, record.started_at) == ("grpo", "starting", None)
    assert record.versions.keys() == {"mlx", "mlx-lm", "pippin"}
    assert (tmp_path / "latest").resolve() == folder


def test_paths_come_from_the_recipes_folder_then_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "both.py").touch()
    (there / "both.py").touch()
    (here / "only.jsonl").touch()
    monkeypatch.chdir(here)
    assert resolve_path("both.py:f", there) == f"{there / 'both.py'}:f"
    assert resolve_path("only.jsonl", there) == str(here / "only.jsonl")
    assert resolve_path("org/model", there) == "org/model"
    assert resolve_path("zmq://host:1", there) == "zmq://host:1"
    assert resolve_path("pkg.mod:f", there) == "pkg.mod:f"


def test_paths_in_flags_come_from_the_current_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "rows.jsonl").touch()
        (folder / "base").touch()
    (here / "f.py").touch()
    monkeypatch.chdir(here)
    (there / "r.toml").write_text("[model]\npath = 'org/m'\n[data]\npath = 'rows.jsonl'\n")
    runs = f"--run.dir={tmp_path}"
    run, _ = read_command_line(SftRun, [str(there / "r.toml"), runs, "--run.name=a"], "")
    assert run.data.path == str(there / "rows.jsonl")
    flags = [str(there / "r.toml"), runs, "--run.name=b", "--data.path", "rows.jsonl"]
    assert read_command_line(SftRun, flags, "")[0].data.path == str(here / "rows.jsonl")
    flags = ["--rewards.functions", "f.py:a,zmq://h:1", "--model.reference=base", "--run.name", "f"]
    assert resolve_flags(flags, here) == [
        f"--rewards.functions={here / 'f.py'}:a,zmq://h:1",
        "--model.reference=base",
        "--run.name=f",
    ]


def test_a_data_file_that_is_missing_or_no_recipe_is_refused_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ConfigError, match=r"rows\.jsonl is not a recipe.*--data\.path rows\.jsonl"):
        read_command_line(SftRun, ["rows.jsonl", "--model.path=m"], "")
    with pytest.raises(ConfigError, match=r"data\.path row\.csv: no such file \(looked at /"):
        read_command_line(SftRun, ["--model.path=m", "--data.path=row.csv"], "")
    flags = ["--model.path=m", "--data.path=rows.jsonl", "--data.eval_path=e.json"]
    with pytest.raises(ConfigError, match=r"data\.eval_path e\.json: no such file"):
        read_command_line(SftRun, flags, "")
    assert not (tmp_path / "runs").exists()


def test_the_name_of_a_run_that_never_began_is_free(tmp_path: Path):
    flags = [*OFFLINE, f"--run.dir={tmp_path}", "--run.name=a"]
    _, folder = read_command_line(SftRun, flags, "")
    write_run(folder, structs.replace(read_run(folder), started_at=1.0))
    change_state(folder, "failed_to_start")
    run, again = read_command_line(SftRun, [*flags, "--train.max_steps=3"], "")
    assert again == folder
    assert load(SftRun, folder / "config.toml") == run
    assert read_run(folder).started_at is None
    assert read_run(folder).state == "starting"
    assert not (folder / "events.jsonl").exists()
    with pytest.raises(ConfigError, match=r"already holds a run"):
        read_command_line(SftRun, flags, "")


def test_the_last_lines_are_commands_for_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "a b"
    run = load(SftRun, None, ["--model.path=org/m", "--data.path=d"])
    assert what_next(folder, run, done=True) == [
        "weights: 'runs/a b/adapters'",
        "chat:    uv run mlx_lm.chat --model org/m --adapter-path 'runs/a b/adapters'",
        "ask:     uv run mlx_lm.generate --model org/m --adapter-path 'runs/a b/adapters' "
        '--prompt "…"',
        "export:  uv run launch/export.py 'runs/a b' OUT",
    ]
    full = load(SftRun, None, [*OFFLINE, "--model.fine_tune_type=full"])
    assert what_next(Path("/elsewhere/a"), full, done=True)[:2] == [
        "weights: /elsewhere/a/model",
        "chat:    uv run mlx_lm.chat --model /elsewhere/a/model",
    ]
    assert what_next(folder, run, done=False) == ["logs:    'runs/a b/logs'"]


def test_a_run_is_not_overwritten_and_is_resumed_with_its_settings(tmp_path: Path):
    flags = [*OFFLINE, f"--run.dir={tmp_path}", "--run.name=a", "--train.max_steps=3"]
    run, folder = read_command_line(SftRun, flags, "")
    with pytest.raises(ConfigError, match=r"already holds a run.*or delete that folder"):
        read_command_line(SftRun, flags, "")  # nothing to resume was saved
    (folder / "checkpoints/step-000002").mkdir(parents=True)
    (folder / "checkpoints/step-000002/state.json").touch()
    with pytest.raises(ConfigError, match=r"already holds a run.*continue it with --run.resume"):
        read_command_line(SftRun, flags, "")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file cannot be made"):
        read_command_line(SftRun, [*flags, "--run.name=file"], "")
    again, same = read_command_line(
        SftRun, ["--run.resume", str(folder), "--train.max_steps=9"], ""
    )
    assert load(SftRun, folder / "config.toml") == again
    assert again.run.resume == str(folder)
    assert same == folder
    assert again.train.max_steps == 9
    assert again.optimizer == run.optimizer
    with pytest.raises(ConfigError, match=r"a run of launch/sft\.py; resume it with that program"):
        read_command_line(PreferenceRun, ["--run.resume", str(folder)], "")
    with pytest.raises(ConfigError, match="required a run folder"):
        read_command_line(SftRun, [f"--run.resume={tmp_path / 'no'}"], "")


def test_processes_of_a_run(tmp_path: Path):
    flags = ["--rewards.functions=a.py:f,zmq://h:1,zmq://h:2,m:g", "--rewards.workers=2"]
    run = load(GrpoRun, None, [*OFFLINE, *flags, "--actors.count=2", "--run.max_restarts=3"])
    assert snapshot_endpoint(run, Path("/s")) == "ipc:///s/snapshots"
    remote = load(GrpoRun, None, [*OFFLINE, *flags, "--transport.bind=tcp://127.0.0.1:7000"])
    assert snapshot_endpoint(remote, Path("/s")) == "tcp://127.0.0.1:7001"
    services, servers = reward_services(run, Path("/s"))
    assert services == ["ipc:///s/reward-0,ipc:///s/reward-1", "tcp://h:1,tcp://h:2"]
    assert [spec.name for spec in servers] == ["reward-0", "reward-1"]
    assert list(servers[1].command[2:]) == [
        "a.py:f",
        "m:g",
        "--bind",
        "ipc:///s/reward-1",
        "--child",
    ]
    assert [spec.name for spec in actor_specs(run, tmp_path, "ipc:///s/l")] == [
        "actor-0",
        "actor-1",
    ]
    offline = offline_processes(load(SftRun, None, OFFLINE), tmp_path)
    child = ["--child", "--stop-timeout-s", "300"]
    assert offline.learner.command[2:] == [str(tmp_path), *child]
    assert offline.learner.restarts == RestartLimit(10, 3600)
    assert offline.required == frozenset()

    whole = online_processes(run, tmp_path, Path("/s"))
    assert list(whole.learner.command[2:]) == [
        str(tmp_path), *child, "--endpoint", "ipc:///s/learner",
        "--snapshots", "ipc:///s/snapshots",
        "--rewards", "ipc:///s/reward-0,ipc:///s/reward-1", "--rewards", "tcp://h:1,tcp://h:2",
    ]  # fmt: skip
    assert [spec.name for spec in whole.helpers] == ["reward-0", "reward-1", "actor-0", "actor-1"]
    assert whole.required == {"actor", "reward server"}
    assert [spec.restarts.count for spec in (whole.learner, *whole.helpers)] == [3, 10, 10, 10, 10]
    assert whole.stop_timeout_s == 300
    # Actors elsewhere can stand in for the local ones.
    pairs = load(PairsRun, None, [*OFFLINE, *flags, "--transport.bind=tcp://127.0.0.1:7000"])
    elsewhere = online_processes(pairs, tmp_path, Path("/s"))
    assert elsewhere.learner.command[1].endswith("processes/collect.py")
    assert elsewhere.learner.command[-6:-4] == ["--endpoint", "tcp://127.0.0.1:7000"]
    assert elsewhere.required == {"reward server"}
    assert elsewhere.learner.restarts.count == 0  # it would write its pairs from the beginning


def test_a_learner_that_samples_has_no_actor_beside_it(tmp_path: Path):
    flags = [*OFFLINE, "--rewards.functions=a.py:f", "--actors.colocate=true"]
    alone = online_processes(load(GrpoRun, None, flags), tmp_path, Path("/s"))
    assert list(alone.learner.command[2:]) == [
        str(tmp_path), "--child", "--stop-timeout-s", "300", "--colocate", "--rewards", "ipc:///s/reward-0",
    ]  # fmt: skip
    assert [spec.name for spec in alone.helpers] == ["reward-0"]
    assert alone.required == {"reward server"}

    open_to_others = load(GrpoRun, None, [*flags, "--transport.bind=tcp://127.0.0.1:7000"])
    joined = online_processes(open_to_others, tmp_path, Path("/s"))
    assert list(joined.learner.command[6:]) == [
        "--colocate", "--snapshots", "tcp://127.0.0.1:7001", "--endpoint", "tcp://127.0.0.1:7000",
        "--rewards", "tcp://127.0.0.1:7002",
    ]  # fmt: skip
    assert [spec.name for spec in joined.helpers] == ["reward-0"]
    assert joined.required == {"reward server"}


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, "--sampling.num_generations int = 8"),
        (["--sampling.num_generation", "4"], 2, "did you mean 'sampling.num_generations'?"),
        (["none.toml"], 2, "recipe none.toml does not exist"),
        (["--run.dir", "/dev/null/x"], 2, "cannot be made"),
    ],
)
def test_help_and_refusals_come_before_anything_heavy(
    arguments: list[str], status: int, words: str, tmp_path: Path
):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'mlx', 'mlx_lm', 'transformers', 'datasets'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, grpo.__file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert words in done.stdout + done.stderr
    assert done.returncode == status
    assert "Traceback" not in done.stderr
