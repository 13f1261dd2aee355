"""The learner program with a real actor and a real reward server, over ipc, on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.processes.blas import deterministic_kernels
from launch.processes.exit_status import NO_RESTART
from protocol.run_record import (
    CheckpointSaved,
    EvaluationFinished,
    Fault,
    RunRecord,
    StartUp,
    StateChanged,
    parse_events,
    read_run,
    write_run,
)
from protocol.transport.endpoints import ipc_folder
from tests.acceptance.run import ledger_events
from tests.launch.processes.whole_runs import adapters
from tests.tiny import write_model_folder

ROOT = Path(__file__).resolve().parents[3]
REWARD = """
def short(completions, **kwargs):
    return [1.0 / (1 + len(text.split())) for text in completions]


def silent(completions, **kwargs):
    return [None] * len(completions)
"""


class Run:
    """A run folder, its sockets, and the processes that the test started."""

    def __init__(self, folder: Path, sockets: Path, *, reward: str = "short", **train: int) -> None:
        self.folder = folder / "run"
        self.sockets = sockets
        self.stack = ExitStack()
        self.folder.mkdir()
        model = write_model_folder(folder / "model")
        (folder / "rewards.py").write_text(REWARD)
        self.reward = f"{folder}/rewards.py:{reward}"
        rows = [{"prompt": f"w{2 + i} w{9 + i} w3"} for i in range(12)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        steps = train.get("max_steps", 2)
        write_run(self.folder, RunRecord(program="grpo"))
        (self.folder / "config.toml").write_text(f"""
[run]
seed = 5
save_steps = {train.get("save_steps", 1)}
[model]
path = "{model}"
dtype = "float32"
lora = {{rank = 4}}
[data]
path = "{folder}/rows.jsonl"
eval_rows = 2
[rewards]
functions = ["{self.reward}"]
[sampling]
num_generations = 4
max_completion_length = 6
[optimizer]
learning_rate = 1e-3
[train]
batch_size = 2
micro_batch_size = 2
max_steps = {steps}
length_bucket = 8
[queue]
max_staleness = 1
[actors]
heartbeat_s = 0.2
""")

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command, "--child"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        assert process.stdin is not None
        self.stack.callback(process.stdin.close)
        return process

    def learner(self, *flags: str) -> subprocess.Popen[bytes]:
        return self.start(
            "learner",
            "launch/processes/learn.py",
            str(self.folder),
            f"--endpoint=ipc://{self.sockets}/learner",
            f"--snapshots=ipc://{self.sockets}/snapshots",
            f"--rewards=ipc://{self.sockets}/rewards",
            *flags,
        )

    def actor(self) -> subprocess.Popen[bytes]:
        return self.start(
            "actor",
            "launch/actor.py",
            f"--connect=ipc://{self.sockets}/learner",
            "--name=a0",
            f"--run-dir={self.folder}",
            "--max-concurrent-completions=16",
        )

    def rewards(self) -> subprocess.Popen[bytes]:
        return self.start(
            "rewards",
            "launch/reward_server.py",
            self.reward,
            f"--bind=ipc://{self.sockets}/rewards",
        )

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines()]

    def steps(self) -> list[int]:
        return [int(str(line["step"])) for line in self.lines("metrics.jsonl") if "loss" in line]

    def wait_for_step(self, step: int, process: subprocess.Popen[bytes]) -> None:
        """Wait until a step is on record; the learner must be alive meanwhile."""
        deadline = time.monotonic() + 60
        while max(self.steps(), default=0) < step:
            assert process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue

    def log(self) -> str:
        return "".join(
            f"--- {path.name}\n{path.read_text()[-3000:]}\n" for path in self.folder.glob("*.log")
        )

    def settle(self, process: subprocess.Popen[bytes], status: int = 0) -> None:
        assert process.wait(60) == status, self.log()


@contextmanager
def run_of(folder: Path, **options: object) -> Generator[Run]:
    with ipc_folder() as sockets:
        run = Run(folder, Path(sockets), **options)  # type: ignore[arg-type]
        with run.stack:
            yield run


def trained(run: Run) -> list[dict[str, Any]]:
    return [line for line in run.lines("rollouts.jsonl") if line["kind"] == "train"]


def test_a_run_outlives_a_killed_actor_and_reward_server_and_its_adapters_load(tmp_path):
    from mlx.utils import tree_flatten
    from mlx_lm import load

    with run_of(tmp_path, max_steps=6) as run:
        rewards, actor, learner = run.rewards(), run.actor(), run.learner()
        run.wait_for_step(1, learner)
        os.kill(actor.pid, signal.SIGKILL)
        os.kill(rewards.pid, signal.SIGKILL)
        actor.wait()
        rewards.wait()
        (run.sockets / "rewards").unlink(missing_ok=True)
        run.rewards()
        actor = run.actor()
        run.settle(learner)
        run.settle(actor)
        assert run.steps() == [1, 2, 3, 4, 5, 6]
        events = parse_events((run.folder / "events.jsonl").read_bytes())
        starts = [each for each in events if isinstance(each, StartUp)]
        sampling = ("a0", ["imports", "model", "welcome", "engine", "first tokens"])
        stages = ["imports", "model", "data", "preparation", "first batch", "first step"]
        assert sorted((each.process, list(each.parts)) for each in starts) == [
            sampling,
            sampling,
            ("learner", stages),
        ]
        # The learner took the model that each actor had loaded meanwhile.
        assert (run.folder / "actor.log").read_text().count("Training lora: ") == 2
        numbers = [line["task"] for line in trained(run)]
        assert len(numbers) == len(set(map(str, numbers))) == 12
        journal = ledger_events(run.folder)
        assert len({str(line["incarnation"]) for line in journal}) == 1
        events = [line["event"] for line in journal]
        formed = [n for event in events if event["type"] == "Formed" for n in event["numbers"]]
        assert formed == numbers
        last = [line for line in run.lines("metrics.jsonl") if "loss" in line][-1]
        wanted = {
            "reward",
            "reward_std",
            "entropy",
            "grad_norm",
            "staleness/max",
            "step_time",
            "sampling/sampling_logp_difference/max",
            "actors/tokens_per_s",
            "actors/memory_peak_gb",
            "memory/peak_gb",
            "learner/waiting_share",
            "clip_ratio/region_mean",
            "num_tokens",
            "completions/mean_length",
            "frac_reward_zero_std",
            "rewards/short/mean",
        }
        assert wanted <= last.keys()
        assert float(str(last["staleness/max"])) <= 1
        evaluated = [line for line in run.lines("metrics.jsonl") if "eval/reward" in line]
        assert [line["step"] for line in evaluated] == [0, 6]
        record = read_run(run.folder)
        assert (record.state, record.total_steps) == ("finished", 6)
        events = parse_events((run.folder / "events.jsonl").read_bytes())
        states = [event.state for event in events if isinstance(event, StateChanged)]
        assert states == ["running", "finished"]
        assert [e.step for e in events if isinstance(e, EvaluationFinished)] == [0, 6]
        # Each at its step, and the last once more at the end.
        assert [e.step for e in events if isinstance(e, CheckpointSaved)][-2:] == [6, 6]
        loaded = load(str(tmp_path / "model"), adapter_path=str(run.folder / "adapters"))
        names = dict(tree_flatten(loaded[0].parameters()))
        assert any(name.endswith("lora_b") and bool((v != 0).any()) for name, v in names.items())


def finished(folder: Path, *, kill_at: Sequence[int] = ()) -> tuple[Run, str]:
    """Run to the end, with the learner killed after these steps; return the adapters' digest."""
    folder.mkdir()
    with run_of(folder, max_steps=9, save_steps=4) as run:
        config = run.folder / "config.toml"
        text = config.read_text().replace("max_staleness = 1", "max_staleness = 0")
        config.write_text(text.replace("seed = 5", "seed = 5\ndeterministic = true"))
        run.rewards()
        actor, learner = run.actor(), run.learner()
        for step in kill_at:
            run.wait_for_step(step, learner)
            os.kill(learner.pid, signal.SIGKILL)
            learner.wait()
            learner = run.learner()
        run.settle(learner)
        run.settle(actor)
        return run, adapters(run.folder)


def test_a_killed_learner_goes_on_to_the_same_adapters_and_samples_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in deterministic_kernels().items():
        monkeypatch.setenv(name, value)
    calm, whole = finished(tmp_path / "calm")
    run, digest = finished(tmp_path / "killed", kill_at=(2, 5, 6))
    assert digest == whole
    assert run.steps() == list(range(1, 10))
    events = [line["event"] for line in ledger_events(run.folder)]
    leased = [event["number"] for event in events if event["type"] == "Leased"]
    assert len(leased) == len(set(leased))  # one attempt each
    numbers = [line["task"] for line in trained(run)]
    assert numbers == [line["task"] for line in trained(calm)]
    assert "continuing from step 4" in (run.folder / "learner.log").read_text()
    assert not (run.folder / "lost.json").exists()
    assert [line["num_tokens"] for line in run.lines("metrics.jsonl") if "loss" in line] == [
        line["num_tokens"] for line in calm.lines("metrics.jsonl") if "loss" in line
    ]


def test_rewards_that_are_all_none_stop_the_run_with_a_checkpoint(tmp_path):
    with run_of(tmp_path, reward="silent", max_steps=9, save_steps=0) as run:
        run.rewards()
        run.actor()
        run.settle(run.learner(), status=NO_RESTART)
        assert "Every reward of 3 batches in a row was None" in run.log()
        assert run.steps() == [1, 2]
        events = parse_events((run.folder / "events.jsonl").read_bytes())
        (fault,) = [event for event in events if isinstance(event, Fault)]
        assert fault.process == "learner"
        assert fault.reason.startswith("RewardError: Every reward of 3 batches in a row was None")
        assert (run.folder / "checkpoints/step-000002/state.json").is_file()
