"""The reward server's program: it serves, ends with its launcher, and says why it cannot start."""

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import pytest
import zmq

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "tests/actors/rewards/sample_rewards.py"


class Program(NamedTuple):
    """A process and its pipes."""

    process: subprocess.Popen[str]
    stdin: IO[str]
    stdout: IO[str]
    stderr: IO[str]


@contextmanager
def program(*args):
    """Start the program; it is killed at the end if it still runs.

    Gives the process and its three pipes.
    """
    with subprocess.Popen(
        [sys.executable, str(ROOT / "launch/reward_server.py"), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield Program(process, process.stdin, process.stdout, process.stderr)
        finally:
            process.kill()


@contextmanager
def served(*args, function="length"):
    """Run the program until it serves; give the process and the endpoint that it says."""
    with program(f"{SAMPLES}:{function}", "--bind", "tcp://127.0.0.1:*", *args) as running:
        line = running.stdout.readline().split()
        assert line[:3] == ["serving", function, "at"], running.stderr.read()
        yield running, line[3]


def ask(socket, **changes):
    request = {
        "type": "score",
        "id": "1",
        "prompts": ["p"] * 2,
        "completions": ["a", "bb"],
        "completion_ids": [[1], [1, 2]],
    }
    socket.send(json.dumps(request | changes).encode())
    return json.loads(socket.recv())


@contextmanager
def dealer(endpoint):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.RCVTIMEO, 20_000)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        yield socket


def test_it_serves_and_ends_when_its_launcher_does():
    with served("--child") as (running, endpoint), dealer(endpoint) as socket:
        assert ask(socket)["type"] == "progress"
        assert json.loads(socket.recv())["rewards"] == [[1.0, 2.0]]
        running.stdin.close()
        assert running.process.wait(15) == 0


def test_ctrl_c_and_sigterm_end_it():
    for number in (signal.SIGINT, signal.SIGTERM):
        with served() as (running, _):
            running.process.send_signal(number)
            assert running.process.wait(15) == 0


def test_nothing_outlives_a_server_that_is_killed(tmp_path):
    os.mkfifo(tmp_path / "go")
    columns = {"folder": [str(tmp_path)] * 2}
    with served(function="waits") as (running, endpoint), dealer(endpoint) as socket:
        ask(socket, columns=columns)
        # Opening waits for the function; then its end of the pipe tells when it is gone.
        pipe = os.open(tmp_path / "go", os.O_WRONLY)
        running.process.kill()
        running.process.wait()
        # The worker ends when its guard has seen that the server is gone.
        ended = select.poll()
        ended.register(pipe, select.POLLERR)
        assert ended.poll(15_000)
        with pytest.raises(BrokenPipeError):
            os.write(pipe, b"x")
        os.close(pipe)


def test_what_left_the_session_does_not_outlive_a_server_that_is_killed(tmp_path):
    os.mkfifo(tmp_path / "held")
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    columns = {"folder": [str(tmp_path)] * 2}
    with served(function="leaves_one") as (running, endpoint), dealer(endpoint) as socket:
        assert ask(socket, columns=columns)["type"] == "progress"
        assert json.loads(socket.recv())["rewards"] == [[1.0, 1.0]]
        os.kill(int((tmp_path / "child").read_text()), 0)
        running.process.kill()
        running.process.wait()
        os.set_blocking(held, True)
        assert os.read(held, 1) == b""  # the end of the process that held the other end
        os.close(held)


def test_an_endpoint_in_use_is_named():
    function = f"{SAMPLES}:length"
    with served() as (_, endpoint), program(function, "--bind", endpoint) as second:
        _, errors = second.process.communicate(timeout=20)
        assert second.process.returncode == 1
        assert f"ChannelError: endpoint {endpoint}: required a free address" in errors


def test_a_reward_that_cannot_be_imported_is_named():
    with program(f"{SAMPLES}:nothing", "--bind", "tcp://127.0.0.1:*") as running:
        _, errors = running.process.communicate(timeout=20)
    assert running.process.returncode == 1
    assert "sample_rewards.py has no 'nothing'; it defines all_none" in errors


def test_the_schema_is_that_of_the_messages_and_of_the_documentation():
    with program("--schema") as running:
        schema = json.loads(running.process.communicate(timeout=20)[0])
    kinds = {"ScoreRequest", "ScoreReply", "ScoreProgress", "ScoreRefusal"}
    assert kinds < schema["$defs"].keys()
    request = schema["$defs"]["ScoreRequest"]
    assert request["properties"]["type"] == {"enum": ["score"]}
    assert {"id", "prompts", "completions", "completion_ids"} < set(request["required"])
    text = (ROOT / "protocol/REWARDS.md").read_text()
    for kind in kinds:
        for field in schema["$defs"][kind]["properties"]:
            assert f"`{field}`" in text, f"REWARDS.md leaves out {kind}.{field}"
