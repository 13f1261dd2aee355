"""With run.deterministic, the number of actors changes no bit of a run; who is told of it."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from actors.bridge_messages import Command, Event
from actors.session import ActorIdentity
from launch.processes.blas import deterministic_kernels
from launch.processes.specs import online_processes
from launch.processes.workers import new_worker
from protocol.config.load import load
from protocol.config.settings import GrpoRun, ModelSettings
from protocol.model.policy import load_policy
from tests.launch.processes.whole_runs import adapters, launched, lines
from tests.protocol.builders import a_welcome
from tests.protocol.config.recipes import FLAGS
from tests.tiny import write_model_folder

# Scores nothing until every actor of the run is there, so that none of them does all the work.
REWARD = """
import time
from pathlib import Path

def ready(log):
    return "completions at a time" in log.read_text()

def odd(completion_ids, **kwargs):
    while not all(ready(log) for log in Path({logs!r}).glob("actor-*.log")):
        time.sleep(0.02)
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
"""
FIELDS = (
    "completions",
    "lengths",
    "rewards",
    "policy_spans",
    "trained_at",
)  # of a group, in rollouts.jsonl


class NoIo:
    """An I/O thread that is not there: the worker is made and never started."""

    def poll(self) -> list[Event]:
        return []

    def put(self, command: Command) -> None:
        raise AssertionError(command)


def sampled(folder: Path, name: str, *flags: str) -> tuple[str, dict[int, Any], set[str]]:
    """Run the default recipe's model; return the adapters' digest, what was sampled, and by whom.

    Half of a batch fits into an actor. `old_logprobs` are the sampler's.
    """
    run = folder / "runs" / name
    reward = folder / f"{name}.py"
    reward.write_text(REWARD.format(logs=str(run / "logs")))
    launched(
        *(f"--run.dir={run.parent}", f"--run.name={name}", f"--rewards.functions={reward}:odd"),
        *("--run.deterministic=true", "--run.log_completions=-1", "--queue.max_staleness=0"),
        *("--train.max_steps=3", "--train.batch_size=8", "--train.micro_batch_size=8"),
        *("--actors.max_concurrent_completions=32", "--data.eval_path=", "--eval.steps=0"),
        *flags,
    )
    groups = [line for line in lines(run, "rollouts.jsonl") if line["kind"] == "train"]
    found = {line["task"]: [line[field] for field in FIELDS] for line in groups}
    return adapters(run), found, {line["actor"] for line in groups}


def test_one_actor_two_actors_and_none_train_the_same_bits(tmp_path: Path):
    digest, groups, actors = sampled(tmp_path, "one")
    assert (len(groups), actors) == (3 * 8, {"actor-0"})
    policies = {span["digest"] for group in groups.values() for (span,) in group[3]}
    assert len(policies) == 3

    assert sampled(tmp_path, "two", "--actors.count=2") == (digest, groups, {"actor-0", "actor-1"})
    colocated = sampled(tmp_path, "none", "--actors.colocate=true")
    assert colocated == (digest, groups, {"actor-0"})


@pytest.mark.parametrize("deterministic", [True, False])
def test_learner_and_actors_get_kernels_for_which_a_row_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
):
    monkeypatch.setattr("launch.processes.specs.deterministic_kernels", lambda: {"KERNELS": "even"})
    flags = ["--actors.count=2", f"--run.deterministic={str(deterministic).lower()}"]
    processes = online_processes(load(GrpoRun, None, [*FLAGS[GrpoRun], *flags]), tmp_path, tmp_path)
    children = [processes.learner, *processes.helpers]
    found = {child.name for child in children if child.environment.get("KERNELS") == "even"}
    assert found == ({"learner", "actor-0", "actor-1"} if deterministic else set())
    assert "reward-0" in {child.name for child in children}


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [("avx2 avx512f avx512dq avx512bw avx512vl", "SkylakeX"), ("avx2 avx512f", "Sandybridge")],
)
def test_the_kernels_are_those_of_avx512_or_of_sandy_bridge(
    monkeypatch: pytest.MonkeyPatch, flags: str, kernels: str
):
    monkeypatch.setattr("launch.processes.blas.platform.machine", lambda: "x86_64")
    monkeypatch.setattr("launch.processes.blas.sys.platform", "linux")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"model name : x\nflags : {flags}\n")
    assert deterministic_kernels() == {"OPENBLAS_CORETYPE": kernels}


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_engine_is_told_by_the_welcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
):
    made = Mock()
    monkeypatch.setattr("actors.engine.mlx_engine.MlxEngine", made)
    settings = ModelSettings(path=str(write_model_folder(tmp_path)))
    policy = load_policy(settings, seed=0)
    new_worker(
        policy,
        policy.model,
        ActorIdentity("a", "i", "h", "m", "t", ""),
        NoIo(),
        lambda announced, data: lambda: None,
        welcome=a_welcome(deterministic=deterministic, max_tokens=40),
        completions=24,
        prefill_step_size=64,
    )
    asked = made.call_args.kwargs
    assert asked["deterministic"] is deterministic
    assert (asked["max_concurrent_completions"], asked["max_tokens"]) == (24, 40)
