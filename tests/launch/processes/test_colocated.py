"""Runs whose learner samples itself: the same bits as with an actor, and how they end."""

import json
import logging
import socket
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from actors.engine.mlx_engine import MlxEngine
from actors.worker import Worker
from launch import grpo
from launch.cli.command_line import read_command_line
from launch.processes.colocated import colocated_worker, engine_model, heartbeat_of
from launch.processes.learn import learn
from launch.processes.start import Lifeline
from learner.build.online import OnlineAddresses, assemble_online
from learner.model.reference import make_reference
from learner.online.in_process import InProcess
from protocol.config.settings import GrpoRun, LoraSettings, ModelSettings, PolicySettings
from protocol.errors import ChannelError, SnapshotError
from protocol.messages.messages import Heartbeat
from protocol.model.policy import load_policy
from protocol.model.snapshots import load_trainable, trainable
from tests.acceptance.run import ledger_events
from tests.launch.processes.whole_runs import adapters, launched, lines
from tests.tiny import VOCAB, tensors, write_model_folder

REWARD = """
def odd(completion_ids, **kwargs):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
"""


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Make a model, rows and a reward; return what a small synchronous run needs."""
    (tmp_path / "rewards.py").write_text(REWARD)
    rows = [{"prompt": f"w{2 + i} w{9 + i} w3"} for i in range(14)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "empty.toml").touch()
    return [
        f"--model.path={write_model_folder(tmp_path / 'model')}",
        f"--data.path={tmp_path / 'rows.jsonl'}",
        f"--rewards.functions={tmp_path / 'rewards.py'}:odd",
        f"--run.dir={tmp_path / 'runs'}",
        # The random state of dropout must not notice what is sampled.
        *("--model.lora.rank=4", "--model.lora.dropout=0.2", "--data.eval_rows=2"),
        *("--sampling.num_generations=4", "--sampling.max_completion_length=6"),
        *("--objective.old_logprobs=recompute", "--queue.max_staleness=0"),
        *("--optimizer.learning_rate=1e-2", "--optimizer.lr_scheduler_type=constant"),
        *("--train.batch_size=2", "--train.micro_batch_size=2", "--train.length_bucket=8"),
    ]


def test_a_colocated_and_resumed_run_has_the_bits_of_one_with_an_actor(
    tmp_path: Path, flags: list[str]
):
    two, one = tmp_path / "runs" / "two", tmp_path / "runs" / "one"
    recipe = str(tmp_path / "empty.toml")  # not the default one
    launched(recipe, *flags, "--run.name=two", "--train.max_steps=4")
    launched(recipe, *flags, "--run.name=one", "--train.max_steps=2", "--actors.colocate=true")
    assert adapters(one) != adapters(two)
    said = launched(f"--run.resume={one}", "--train.max_steps=4")

    assert adapters(one) == adapters(two)
    assert [line["step"] for line in lines(one, "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]
    evaluated = [line for line in lines(one, "metrics.jsonl") if "eval/reward" in line]
    assert [line["step"] for line in evaluated] == [0, 2, 4]
    sampled = [line for line in lines(one, "rollouts.jsonl") if line["kind"] == "train"]
    expected = [line for line in lines(two, "rollouts.jsonl") if line["kind"] == "train"]
    assert [line["completions"] for line in sampled] == [line["completions"] for line in expected]

    # No actor was started, and no snapshot written for one.
    assert sorted(path.name for path in (one / "logs").iterdir()) == ["learner.log", "reward-0.log"]
    assert (two / "policy").exists()
    assert not (one / "policy").exists()
    log = (one / "logs" / "learner.log").read_text()
    assert log.count("INFO actor: samples in the learner's process") == 2
    assert "actor: samples in the learner's process" in said


def free_port() -> int:
    """Return a port with free ones above it, as far as can be known."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_an_actor_elsewhere_can_join_a_colocated_run(tmp_path: Path, flags: list[str]):
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    actor = [sys.executable, str(Path(grpo.__file__).with_name("actor.py")), "--connect", endpoint]
    with subprocess.Popen([*actor, "--name", "guest"], stderr=subprocess.PIPE, text=True) as guest:
        launched(
            str(tmp_path / "empty.toml"),
            *flags,
            *("--run.name=r", "--actors.colocate=true", f"--transport.bind={endpoint}"),
            *("--train.max_steps=60", "--actors.max_concurrent_completions=4"),
        )
        assert guest.wait(30) == 0, guest.stderr.read() if guest.stderr else ""

    folder = tmp_path / "runs" / "r"
    holders = {
        line["event"]["actor"]
        for line in ledger_events(folder)
        if line["event"]["type"] == "Received"
    }
    assert holders == {"actor-0", "guest"}
    assert (folder / "policy" / "policy-000060.safetensors").is_file()


def test_a_worker_that_fails_ends_the_run_with_its_reason(flags: list[str]):
    _, folder = read_command_line(GrpoRun, [*flags, "--actors.colocate=true"], "")
    args = Namespace(run_dir=folder, endpoint=[], snapshots="", rewards=["bogus"], colocate=True)
    with pytest.raises(ChannelError, match="'bogus': required ipc://path or tcp://host:port"):
        learn(args, Lifeline(child=False))
    assert [path.name for path in (folder / "checkpoints").glob("*")] == ["step-000000"]


def work_on(worker: Worker, shared: InProcess) -> None:
    """Advance the worker until it raises."""
    while True:
        if not worker.advance():
            assert shared.bridges.wait(10)


def test_weights_that_are_not_the_announced_ones_are_refused(
    flags: list[str], caplog: pytest.LogCaptureFixture
):
    run, folder = read_command_line(GrpoRun, [*flags, "--actors.colocate=true"], "")
    nowhere = OnlineAddresses([], "", [f"ipc://{folder}/r"], colocate=True)
    caplog.set_level(logging.INFO)
    with assemble_online(folder, nowhere) as learner:
        shared = learner.in_process
        assert shared is not None
        with colocated_worker(learner, shared, run) as worker:
            shared.shelf.put(0, "another", {"a": mx.array([1.0])})
            with pytest.raises(SnapshotError, match=r"policy version 0: .*got another"):
                work_on(worker, shared)
        logging.getLogger("pippin.actor").info("elsewhere")
    said = "samples in the learner's process, with one copy of the base weights"
    assert f"actor: {said}" in caplog.messages
    assert "elsewhere" in caplog.messages  # once the actor has left, nobody speaks for it


def test_the_base_weights_exist_once_after_the_engine_has_stacked_them(tmp_path: Path):
    settings = ModelSettings(
        path=str(write_model_folder(tmp_path / "model")), lora=LoraSettings(rank=4)
    )
    policy = load_policy(settings, seed=3)
    reference = make_reference(policy, PolicySettings(path=settings.path, lora=settings.lora))
    before = {name: id(array) for name, array in tensors(policy.model).items()}
    expected = policy.model(mx.array([[5, 9, 2]]))

    model = engine_model(policy)
    engine = MlxEngine(model, stop_token_ids=[1], vocab_size=VOCAB, max_concurrent_completions=4)
    for version in range(2):
        update = {name: array + version for name, array in trainable(policy.model).items()}
        engine.set_policy(partial(load_trainable, model, update, "update"), version, "d")

    now = {name: id(array) for name, array in tensors(policy.model).items()}
    moved = {name for name in now if now[name] != before[name]}
    assert {name.rpartition("self_attn.")[2] for name in moved if "layers.0.self_attn" in name} >= {
        f"{part}_proj.linear.weight" for part in "qkv"
    }
    frozen = now.keys() - trainable(policy.model).keys()
    assert all(id(array) == now[name] for name, array in tensors(model).items() if name in frozen)
    assert {id(array) for array in tensors(reference.model).values()} == {
        now[name] for name in frozen
    }
    assert mx.array_equal(policy.model(mx.array([[5, 9, 2]])), expected)


@dataclass
class Beating:
    heartbeat: Heartbeat | None = None


def test_a_training_step_longer_than_a_lease_loses_no_lease():
    worker = Beating()
    heartbeat = heartbeat_of(worker)
    assert heartbeat() is None
    worker.heartbeat = Heartbeat(progress=7, tokens_sampled=40, groups_held=3)
    # The main thread trains meanwhile, so that the worker's own progress stands still.
    first, second = heartbeat(), heartbeat()
    assert first == Heartbeat(progress=0, tokens_sampled=40, groups_held=3)
    assert second == Heartbeat(progress=1, tokens_sampled=40, groups_held=3)
