"""The reward server over its socket: time-outs, deaths, bad frames, fairness."""

import itertools
import json
import logging
import os
import random
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from actors.rewards.queue import FairQueue, QueuedRequest
from actors.rewards.server import MAX_REQUEST_BYTES, RewardServer
from protocol.errors import ChannelError, RewardError
from protocol.transport.curve_keys import load_client_keys, make_keys
from protocol.transport.endpoints import connected_socket, ipc_folder

pytestmark = pytest.mark.anyio
SAMPLES = Path(__file__).with_name("sample_rewards.py")
NUMBERS = itertools.count()


def named(*functions):
    return [f"{SAMPLES}:{name}" for name in functions]


def request(completions=("a", "bb"), **changes):
    """Make a request as any language would: plain JSON."""
    count = len(completions)
    return {
        "type": "score",
        "id": f"r{next(NUMBERS)}",
        "prompts": ["p"] * count,
        "completions": list(completions),
        "completion_ids": [[1]] * count,
        "timeout_s": 20.0,
    } | changes


def dealer(endpoint, keys=None):
    """Connect as an actor does."""
    return connected_socket(endpoint, keys, max_message_bytes=64 << 20, outbox_bound=1000)


@asynccontextmanager
async def serving(*functions, endpoint=None, **options):
    """Run a server; give it and a connected DEALER."""
    with ipc_folder() as folder, anyio.fail_after(30):
        endpoint = endpoint or f"ipc://{folder}/r"
        async with (
            RewardServer(named(*functions), endpoint, **options) as server,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(server.run)
            keys = load_client_keys(options["keys"]) if "keys" in options else None
            with dealer(server.endpoint, keys) as socket:
                yield server, socket
            tasks.cancel_scope.cancel()


async def say(socket, message):
    await socket.send(message if isinstance(message, bytes) else json.dumps(message).encode())


async def hear(socket, kind):
    """Return the next message of this kind; only word of progress may come before it."""
    while True:
        reply = json.loads((await socket.recv_multipart())[-1])
        if reply["type"] == kind:
            return reply
        assert reply["type"] == "progress", reply


async def score(socket, **changes):
    message = request(**changes)
    await say(socket, message)
    reply = await hear(socket, "rewards")
    assert reply["id"] == message["id"]
    return reply


async def test_rewards_by_hand():
    async with serving("length", "of_column", "mostly_none", "all_none", "step") as (_, socket):
        reply = await score(
            socket,
            completions=["a", "bbb"],
            columns={"answer": ["a", "x"]},
            trainer_state={"global_step": 7},
        )
    assert reply["names"] == ["length", "of_column", "mostly_none", "all_none", "step"]
    assert reply["rewards"] == [[1.0, 3.0], [1.0, 0.0], [None, 2.0], [None, None], [7.0, 7.0]]
    assert reply["faults"] == []


@pytest.mark.parametrize("name", ["sleeps", "loops", "async_sleeps", "blocks_in_c"])
async def test_a_function_that_hangs_is_cut_off_and_the_rest_runs(name):
    async with serving(name, "length") as (server, socket):
        before = server.scorer.worker.pid
        reply = await score(socket, timeout_s=0.5)
        assert reply["rewards"] == [[None, None], [1.0, 2.0]]
        assert [(f["function"], f["kind"]) for f in reply["faults"]] == [(name, "timeout")]
        assert server.scorer.worker.pid != before


async def test_what_a_hanging_function_started_dies_with_it(tmp_path):
    async with serving("spawns") as (_, socket):
        reply = await score(socket, timeout_s=1.0, columns={"folder": [str(tmp_path)] * 2})
        assert reply["faults"][0]["kind"] == "timeout"
        child = int((tmp_path / "child").read_text())
        with anyio.fail_after(10):
            while _alive(child):  # noqa: ASYNC110 - no event crosses processes
                await anyio.sleep(0.01)


async def test_what_left_the_session_ends_with_the_worker_and_is_named(tmp_path, caplog):
    async with serving("leaves_one") as (_, socket):
        await score(socket, columns={"folder": [str(tmp_path)] * 2})
        child = int((tmp_path / "child").read_text())
        assert _alive(child)
    with anyio.fail_after(10):
        while _alive(child):  # noqa: ASYNC110 - no event crosses processes
            await anyio.sleep(0.01)
    (message,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert message.startswith(f"ended what reward functions had left running: {child} (")
    assert "-c import os, time; " in message


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        if Path("/proc").is_dir():
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True
    return state != "Z"


async def test_a_traceback_is_shown_once_a_kind(caplog):
    with caplog.at_level(logging.ERROR, "pippin.rewards"):
        async with serving("raises", "too_few", "words") as (_, socket):
            replies = [await score(socket) for _ in range(3)]
    for reply in replies:
        assert reply["rewards"] == [[None, None]] * 3
        assert [f["kind"] for f in reply["faults"]] == ["exception", "contract", "contract"]
    assert "KeyError" in replies[0]["faults"][0]["message"]
    assert "'too_few' returned 1 rewards, but 2 were required" in replies[0]["faults"][1]["message"]
    assert "'words': reward 0 must be a float" in replies[0]["faults"][2]["message"]
    shown = [r.getMessage() for r in caplog.records]
    assert len(shown) == 3
    assert sum("Traceback" in text and "sample_rewards.py" in text for text in shown) == 1


async def test_a_synchronous_function_may_run_a_loop_and_asynchronous_ones_overlap():
    async with serving("first", "runs_a_loop", "second") as (_, socket):
        for _ in range(2):
            assert (await score(socket))["rewards"] == [[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]]


async def test_a_worker_killed_from_outside_is_retried(tmp_path):
    async with serving("dies_once", "length") as (server, socket):
        columns = {"folder": [str(tmp_path)] * 2}
        reply = await score(socket, columns=columns)
        assert reply["rewards"] == [[4.0, 4.0], [1.0, 2.0]]
        assert server.scorer.worker.pid is not None
        os.kill(server.scorer.worker.pid, signal.SIGKILL)
        reply = await score(socket, columns=columns)
        assert reply["rewards"] == [[4.0, 4.0], [1.0, 2.0]]
        assert reply["faults"] == []


async def test_a_function_that_always_ends_its_process_is_blamed():
    async with serving("dies", "length") as (_, socket):
        reply = await score(socket)
    assert reply["rewards"] == [[None, None], [1.0, 2.0]]
    assert [f["kind"] for f in reply["faults"]] == ["died"]


async def test_logs_are_merged_and_bounded():
    async with serving("logs", "logs_too", "logs_too_much") as (_, socket):
        reply = await score(socket)
    assert reply["log_extra"] == {"seen": ["a", "bb", 0, 0]}
    assert reply["log_metric"] == {"logs/accuracy": 1.0, "logs_too/accuracy": 0.0}
    assert [(f["function"], f["kind"]) for f in reply["faults"]] == [("logs_too_much", "contract")]


async def test_a_request_sent_again_is_not_scored_again(tmp_path):
    os.mkfifo(tmp_path / "go")
    async with serving("waits") as (_, socket):
        message = request(columns={"folder": [str(tmp_path)] * 2})
        for _ in range(3):
            await say(socket, message)
            assert (await hear(socket, "progress"))["id"] == message["id"]
        async with await anyio.open_file(tmp_path / "go", "wb"):
            pass
        reply = await hear(socket, "rewards")
        await say(socket, message)
        assert await hear(socket, "rewards") == reply
    assert len((tmp_path / "calls").read_text().split()) == 1


async def test_a_full_server_asks_to_try_again(tmp_path):
    os.mkfifo(tmp_path / "go")
    async with serving("waits", max_queued=1) as (server, socket):
        columns = {"folder": [str(tmp_path)] * 2}
        await say(socket, request(columns=columns))
        await hear(socket, "progress")
        go = await anyio.open_file(tmp_path / "go", "wb")  # opens when the function runs
        await say(socket, request(columns=columns))
        assert (await hear(socket, "progress"))["ahead"] == 1
        await say(socket, request(columns=columns))
        assert (await hear(socket, "refused"))["retry"] is True
        assert server.refusals == {"full": 1}
        await go.aclose()
        await hear(socket, "rewards")


async def test_bad_frames_are_refused_and_counted():
    rng = random.Random(1)
    version = {"reward_protocol_version": 99}
    bad = [
        ("undecodable", b"[" * 100_000),
        ("undecodable", b'{"type":"score","columns":' + b"[" * 100_000),
        ("undecodable", b"\xff\xfe"),
        ("undecodable", b""),
        ("version", json.dumps(request(**version)).encode()),
        ("invalid", json.dumps(request(prompts=[])).encode()),
        ("invalid", json.dumps(request(timeout_s=0)).encode()),
        ("oversized", b" " * (MAX_REQUEST_BYTES + 1)),
    ]
    bad += [("undecodable", rng.randbytes(rng.randrange(200))) for _ in range(200)]
    async with serving("length") as (server, socket):
        for kind, data in bad:
            await say(socket, data)
            assert (await hear(socket, "refused"))["retry"] is False, kind
        for depth in (500, 900, 950, 970, 980, 990, 1000):  # what is read here, a worker reads
            nested = b"[" * depth + b"]" * depth
            message = json.dumps(request(completions=["NESTED"])).encode()
            await say(socket, message.replace(b'"NESTED"', nested))
            reply = json.loads(await socket.recv())
            if reply["type"] == "progress":
                reply = await hear(socket, "rewards")
                assert reply["rewards"] == [[1.0]]
                assert depth < 1000
        assert (await score(socket, unknown_field=1))["rewards"] == [[1.0, 2.0]]
        counted = {kind: server.refusals[kind] for kind in ("version", "invalid", "oversized")}
        assert counted == {"version": 1, "invalid": 2, "oversized": 1}
        assert server.refusals["undecodable"] >= 204


async def test_keys_are_required_of_a_client(tmp_path):
    good, bad = (make_keys(tmp_path / name, ["studio"]) for name in ("good", "bad"))
    async with serving("length", endpoint="tcp://127.0.0.1:*", keys=good) as (server, socket):
        with dealer(server.endpoint, load_client_keys(bad)) as stranger:
            await say(stranger, request())
            assert (await score(socket))["rewards"] == [[1.0, 2.0]]
            assert not await stranger.poll(200)


async def test_what_cannot_be_served_is_refused_by_name():
    async with serving("length", endpoint="tcp://127.0.0.1:*") as (server, _):
        with pytest.raises(ChannelError, match="in use"):
            async with RewardServer(named("length"), server.endpoint):
                pass
    with pytest.raises(RewardError, match="'missing'"):
        async with RewardServer(named("missing"), "ipc:///tmp/never"):
            pass
    with pytest.raises(ChannelError, match="CURVE"):
        async with RewardServer(named("length"), "tcp://0.0.0.0:5555"):
            pass


async def test_peers_take_turns_and_the_queue_is_bounded():
    queue = FairQueue(max_requests=4, max_bytes=10)
    sizes = {"a1": 1, "a2": 1, "a3": 1, "b1": 1}
    for name, size in sizes.items():
        assert queue.put(name[:1].encode(), QueuedRequest(name, 1, 1.0, b"x" * size))
    assert not queue.put(b"c", QueuedRequest("c1", 1, 1.0, b""))
    assert [(await queue.get()).id for _ in range(4)] == ["a1", "b1", "a2", "a3"]
    assert queue.put(b"a", QueuedRequest("large", 1, 1.0, b"x" * 11))
    assert not queue.put(b"b", QueuedRequest("small", 1, 1.0, b"x"))
    assert queue.bytes == 11
