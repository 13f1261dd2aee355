"""A server under a flood of bad frames: it goes on, counts each one, and its memory is bounded."""

import random
import resource
import sys
from pathlib import Path

import anyio
import pytest

from protocol.errors import WireError
from protocol.messages.messages import Heartbeat, Stop
from protocol.messages.wire import decode_actor
from protocol.transport.channel import Client, Server
from protocol.transport.endpoints import ipc_folder

pytestmark = pytest.mark.anyio
PROGRAM = Path(__file__).with_name("fuzz_frames.py")
ROOT = PROGRAM.parents[2]
HEARTBEAT = Heartbeat(progress=1)


def resident_bytes():
    """Return the memory that this process holds, or its peak where the system has no /proc."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


async def flooded(frames, mutated, growth_limit):
    """Flood a server from another process while a client of it goes on talking."""
    total = frames + mutated
    with ipc_folder() as folder:
        async with Server([f"ipc://{folder}/s"]) as server, Client(server.endpoint) as client:
            before = resident_bytes()
            client.send(HEARTBEAT)
            friend, first = await server.receive()
            assert first == HEARTBEAT
            valid = 0
            command = [sys.executable, str(PROGRAM), server.endpoint, "--hold"]
            command += ["--frames", str(frames), "--mutated", str(mutated)]
            with anyio.fail_after(max(20, total / 2_000)):
                async with await anyio.open_process(command, cwd=ROOT) as program:
                    while sum(server.refusals.values()) + valid < total:
                        client.send(HEARTBEAT)
                        peer, message = await server.receive()
                        valid += peer != friend
                        assert peer != friend or message == HEARTBEAT
                    assert program.stdin is not None
                    await program.stdin.aclose()
                    assert await program.wait() == 0
            assert sum(server.refusals.values()) + valid == total
            assert {"undecodable", "invalid"} <= server.refusals.keys()
            assert resident_bytes() - before < growth_limit
            assert server.send(friend, Stop(reason="still here"))
            with anyio.fail_after(5):
                assert await client.receive() == Stop(reason="still here")
            print(f"{total} frames: {dict(server.refusals)}, {valid} valid")


async def test_a_small_flood():
    await flooded(3_000, 300, 64 << 20)


@pytest.mark.slow
async def test_a_million_frames():
    await flooded(1_000_000, 1_000, 128 << 20)


def test_random_bytes_raise_wire_errors_only():
    rng = random.Random(3)
    kinds = set()
    for _ in range(20_000):
        with pytest.raises(WireError) as caught:
            decode_actor(rng.randbytes(rng.randrange(64)))
        kinds.add(caught.value.kind)
    assert kinds == {"undecodable", "invalid"}
