"""Which process gets which GPU, what the user is told, and which overrides are refused."""

import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from launch.cli.command_line import read_command_line
from launch.processes import placement
from launch.processes.children import ChildSpec, Processes
from launch.processes.gpus import VISIBLE
from launch.processes.placement import assign, colocates, place
from launch.processes.specs import offline_processes, online_processes
from launch.processes.supervisor import Supervisor
from protocol.config.load import load
from protocol.config.settings import GrpoRun, PairsRun, SftRun
from protocol.errors import ConfigError
from protocol.run_record import Notice, parse_events
from tests.protocol.config.recipes import FLAGS


def grpo(*flags: str) -> GrpoRun:
    return load(GrpoRun, None, [*FLAGS[GrpoRun], *flags])


@pytest.mark.parametrize(
    ("flags", "actors", "count", "expected"),
    [
        ([], 1, 1, [0, 0]),
        ([], 1, 2, [0, 1]),
        ([], 3, 4, [0, 1, 2, 3]),
        ([], 1, 4, [0, 1]),
        ([], 4, 3, [0, 1, 2, 0, 1]),
        (["--train.device=2"], 3, 3, [2, 0, 1, 2]),
        (["--actors.count=3", "--actors.devices=1,0"], 3, 2, [0, 1, 0, 1]),
        (["--train.device=1", "--actors.devices=1"], 1, 2, [1, 1]),
    ],
)
def test_the_learner_comes_first_then_actors_and_then_they_share(
    flags: list[str], actors: int, count: int, expected: list[int]
):
    names = [f"actor-{index}" for index in range(actors)]
    found = assign(grpo(*flags), "learner", names, count)
    assert list(found.items()) == list(zip(["learner", *names], expected, strict=True))


def test_a_collector_of_pairs_takes_no_gpu_from_the_actors():
    run = load(PairsRun, None, FLAGS[PairsRun])
    found = assign(run, "collect", ["actor-0", "actor-1"], 2)
    assert found == {"collect": 0, "actor-0": 0, "actor-1": 1}


def environments(processes: Processes) -> dict[str, str | None]:
    specs = [processes.learner, *processes.helpers]
    return {spec.name: spec.environment.get(VISIBLE) for spec in specs}


def test_a_run_places_learner_and_actors_and_leaves_reward_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(VISIBLE, "GPU-a,GPU-b")
    run = grpo("--actors.count=2", "--rewards.functions=a.py:f")
    processes = online_processes(run, tmp_path, tmp_path)
    assert environments(processes) == {
        "learner": "GPU-a",
        "reward-0": None,
        "actor-0": "GPU-b",
        "actor-1": "GPU-a",
    }
    assert processes.notes == ["GPU 0: learner, actor-1 share it; GPU 1: actor-0"]

    monkeypatch.setenv(VISIBLE, "")
    processes = online_processes(run, tmp_path, tmp_path)
    assert set(environments(processes).values()) == {None}
    assert processes.notes == ()


def test_offline_programs_have_a_device_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VISIBLE, "4,5,6")
    run = load(SftRun, None, [*FLAGS[SftRun], "--train.device=2"])
    processes = offline_processes(run, tmp_path)
    assert environments(processes) == {"learner": "6"}
    assert processes.notes == ["GPU 2: learner"]

    alone = place(Processes(ChildSpec("learner", "learner", ["x"])), run, [])
    assert alone.learner.environment == {}


@pytest.mark.parametrize(
    ("cls", "flags", "visible", "message"),
    [
        (
            SftRun,
            ["--train.device=0"],
            "",
            "train.device needs NVIDIA GPUs, of which there is none here: leave it out, got 0",
        ),
        (
            SftRun,
            ["--train.device=2"],
            "7,8",
            "train.device must be below 2, the number of GPUs here, got 2",
        ),
        (
            GrpoRun,
            ["--actors.count=2", "--actors.devices=0,3"],
            "0,1,2",
            "actors.devices must be below 3, the number of GPUs here, got 3",
        ),
        (
            PairsRun,
            ["--actors.devices=0"],
            "",
            "actors.devices needs NVIDIA GPUs, of which there is none here: leave it out, got 0",
        ),
        (
            GrpoRun,
            ["--actors.devices=0,1"],
            "0,1",
            "actors.devices must hold at most one GPU for each of the 1 local actors, got [0, 1]",
        ),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_before_a_folder_is_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cls: Any,
    flags: list[str],
    visible: str,
    message: str,
):
    monkeypatch.setenv(VISIBLE, visible)
    monkeypatch.setattr("launch.cli.command_line.require_files", lambda run: None)
    flags = [*FLAGS[cls], f"--run.dir={tmp_path / 'runs'}", *flags]
    with pytest.raises(ConfigError) as refused:
        read_command_line(cls, flags, "")
    assert str(refused.value) == message
    assert not (tmp_path / "runs").exists()


def test_a_child_gets_its_environment_and_the_user_the_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PIPPIN_TEST", "ours")
    code = f"import os; print(os.environ['{VISIBLE}'], os.environ['PIPPIN_TEST'])"
    learner = ChildSpec(
        "learner", "learner", [sys.executable, "-c", code], environment={VISIBLE: "GPU-b"}
    )
    supervisor = Supervisor(tmp_path, Processes(learner, notes=["GPU 1: learner"]), say=print)
    assert anyio.run(supervisor.run) == 0

    assert (tmp_path / "logs/learner.log").read_text() == "GPU-b ours\n"
    events = parse_events((tmp_path / "events.jsonl").read_bytes())
    assert [each.text for each in events if isinstance(each, Notice)] == ["GPU 1: learner"]


@pytest.mark.parametrize(
    ("flags", "gpus", "expected"),
    [
        ([], ["0"], True),
        ([], [], False),
        ([], ["0", "1"], False),
        (["--actors.count=2"], ["0"], False),
        (["--actors.devices=0"], ["0"], False),
        (["--actors.colocate=false"], ["0"], False),
        (["--actors.colocate=true"], [], True),
    ],
)
def test_one_actor_shares_the_learners_process_where_there_is_one_gpu(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], gpus: list[str], expected: bool
):
    monkeypatch.setattr(placement, "has_one_gpu", lambda found: len(found) == 1)
    assert colocates(grpo(*flags), gpus) is expected
