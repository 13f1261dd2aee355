"""The actor program in a separate process, against a learner's socket held by the test."""

import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import anyio
import numpy as np

from actors.engine.base import GenerationRequest
from actors.engine.mlx_engine import MlxEngine
from protocol.config.settings import ModelSettings, builtins
from protocol.messages.arrays import floats_view
from protocol.messages.messages import (
    PROTOCOL_VERSION,
    Ack,
    Applied,
    Group,
    Heartbeat,
    Hello,
    Policy,
    Refuse,
    Release,
    Request,
    Stop,
    Task,
    Welcome,
)
from protocol.messages.parts import Sampling
from protocol.model.policy import LoadedPolicy, load_policy
from protocol.model.snapshots import write_snapshot
from protocol.transport.channel import Server
from protocol.transport.endpoints import ipc_folder
from tests.protocol.builders import a_task, a_welcome
from tests.tiny import write_model_folder

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = Sampling(num_generations=3, max_completion_length=6, temperature=0.8)
T = TypeVar("T")


def with_actor(scenario: Callable[[Server], Awaitable[None]], *flags: str) -> tuple[int, str]:
    """Run an actor against `scenario`; returns its exit status and what it logged.

    The actor's standard input closes when the scenario returns.
    """

    async def run() -> tuple[int, str]:
        with ipc_folder() as folder, anyio.fail_after(30):
            async with Server([f"ipc://{folder}/learner"]) as server:
                command = [sys.executable, str(ROOT / "launch/actor.py"), "--child", *flags]
                command += [
                    "--connect",
                    server.endpoint,
                    "--name",
                    "a0",
                    "--max-concurrent-completions",
                    "4",
                ]
                process = await anyio.open_process(
                    command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
                )
                assert process.stdin is not None
                assert process.stderr is not None
                stdin = process.stdin

                async def drive() -> None:
                    await scenario(server)
                    await stdin.aclose()

                text = b""
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(drive)
                    text = b"".join([chunk async for chunk in process.stderr])
                    tasks.cancel_scope.cancel()
                return await process.wait(), text.decode()

    return anyio.run(run)


async def next_of(server: Server, kind: type[T]) -> tuple[bytes, T]:
    """Return the next message of a kind; heartbeats and credit in between are passed over."""
    while True:
        peer, message = await server.receive()
        if isinstance(message, kind):
            return peer, message
        assert isinstance(message, Heartbeat | Request | Applied | Hello), message


def welcome_of(settings: ModelSettings, policy: LoadedPolicy) -> Welcome:
    return a_welcome(
        model=builtins(settings),
        model_digest=policy.model_digest,
        tokenizer_digest=policy.tokenizer_digest,
        rewards=[],
        seed=3,
    )


def task() -> Task:
    return a_task(
        prompt=[5, 9, 2],
        row=b'{"prompt":"w5 w9 w2"}',
        sampling=SAMPLING,
        seed=17,
        min_policy_version=4,
    )


def test_an_actor_joins_samples_and_leaves_at_the_end_of_the_run(tmp_path):
    settings = ModelSettings(path=str(write_model_folder(tmp_path / "m")), dtype="float32")
    policy = load_policy(settings, seed=3)
    written = write_snapshot(tmp_path / "p4", policy.model, 4)
    announced = Policy(
        version=4, digest=written.digest, size=written.size, path=str(tmp_path / "p4")
    )
    welcome = welcome_of(settings, policy)
    groups: list[Group] = []

    async def learner(server: Server) -> None:
        peer, enquiry = await next_of(server, Hello)
        assert (enquiry.actor_id, enquiry.model_digest) == ("a0", "")
        server.send(peer, welcome)
        while True:
            peer, hello = await next_of(server, Hello)
            if hello.model_digest:
                break
        assert (hello.model_digest, hello.tokenizer_digest) == (
            policy.model_digest,
            policy.tokenizer_digest,
        )
        server.send(peer, welcome)
        assert (await next_of(server, Request))[1].free_completions == 4
        server.send(peer, task())
        server.send(peer, announced)
        assert (await next_of(server, Applied))[1] == Applied(version=4, digest=written.digest)
        groups.append((await next_of(server, Group))[1])
        server.send(peer, Ack(task=groups[0].task, attempt=1))
        server.send(peer, Stop(reason="all done"))
        assert (await next_of(server, Release))[1].reason == "all done"
        await anyio.sleep_forever()

    status, logged = with_actor(learner)
    assert status == 0, logged
    assert "actor a0 leaves: all done" in logged
    (group,) = groups
    engine = MlxEngine(
        policy.model, stop_token_ids=policy.stop_token_ids, vocab_size=policy.vocab_size
    )
    engine.set_policy(lambda: None, 4, written.digest)
    engine.add(GenerationRequest(key=0, prompt_ids=[5, 9, 2], sampling=SAMPLING, seed=17))
    (expected,) = [result for _ in range(7) for result in engine.step().finished]
    assert len(group.completions) == 3
    for ours, theirs in zip(expected.completions, group.completions, strict=True):
        assert theirs.token_ids == ours.token_ids
        assert theirs.policy_spans == ours.policy_spans
        np.testing.assert_allclose(
            floats_view(theirs.sampling_logprobs), floats_view(ours.sampling_logprobs), atol=1e-5
        )


def test_a_refused_actor_says_why_and_fails():
    async def learner(server: Server) -> None:
        peer, hello = await next_of(server, Hello)
        assert hello.protocol_version == PROTOCOL_VERSION
        reason = "the learner speaks protocol version 9, actor a0 speaks 8"
        server.send(peer, Refuse(code="protocol_version", reason=reason, fatal=True))
        await anyio.sleep_forever()

    status, logged = with_actor(learner)
    assert status == 1
    assert "refused actor a0 (protocol_version): the learner speaks protocol version 9" in logged


def test_an_actor_ends_when_its_launcher_is_gone():
    async def learner(server: Server) -> None:
        await next_of(server, Hello)

    status, logged = with_actor(learner)
    assert status == 0, logged


def test_a_model_that_is_not_there_is_a_clear_error(tmp_path):
    settings = ModelSettings(path=str(write_model_folder(tmp_path / "m")))
    policy = load_policy(settings, seed=3)

    async def learner(server: Server) -> None:
        peer, _ = await next_of(server, Hello)
        server.send(peer, welcome_of(settings, policy))
        await anyio.sleep_forever()

    status, logged = with_actor(learner, "--model", str(tmp_path / "nowhere"))
    assert status == 1
    assert "nowhere" in logged
