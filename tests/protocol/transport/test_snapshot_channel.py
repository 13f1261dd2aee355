"""Snapshots in chunks: whole, bounded, guarded, and given up with a reason."""

import hashlib
import random
from typing import TypeVar

import anyio
import pytest
import zmq
import zmq.asyncio

from protocol.errors import SnapshotError
from protocol.messages import wire
from protocol.messages.messages import Chunk, Fetch, Heartbeat, Policy
from protocol.transport.curve_keys import load_client_keys, make_keys
from protocol.transport.endpoints import ipc_folder
from protocol.transport.snapshot_channel import (
    MAX_READERS,
    MAX_WAITING,
    Readers,
    SnapshotServer,
    fetch_snapshot,
)

T = TypeVar("T", Fetch, Chunk)
pytestmark = pytest.mark.anyio
DATA = random.Random(1).randbytes(1_000_003)
DIGEST = hashlib.sha256(DATA).hexdigest()
POLICY = Policy(version=3, digest=DIGEST, size=len(DATA))


@pytest.fixture
def file():
    """Make a snapshot in a short folder."""
    with ipc_folder() as folder:
        (folder / "policy").write_bytes(DATA)
        yield folder / "policy"


@pytest.fixture
def endpoint(file):
    """Name a socket next to the file."""
    return f"ipc://{file.parent}/s"


def decoded(data: bytes, kind: type[T]) -> T:
    """Decode a message of the snapshot socket and check its kind."""
    message = wire.decode_snapshot(data)
    assert isinstance(message, kind)
    return message


@pytest.mark.parametrize("chunk_bytes", [1000, 1_000_003, 1 << 30])
async def test_a_snapshot_arrives_whole(file, endpoint, chunk_bytes):
    async with SnapshotServer(endpoint) as server:
        server.register(3, DIGEST, file)
        data = await fetch_snapshot(endpoint, POLICY, chunk_bytes=chunk_bytes, timeout_s=5)
    assert data == DATA


async def test_two_fetch_at_once_over_tcp_with_keys(file):
    keys = make_keys(file.parent / "keys", ["studio"])
    pair = load_client_keys(keys)
    async with SnapshotServer("tcp://127.0.0.1:*", keys=keys) as server:
        server.register(3, DIGEST, file)
        results = []

        async def fetch():
            results.append(await fetch_snapshot(server.endpoint, POLICY, keys=pair, timeout_s=5))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fetch)
            tasks.start_soon(fetch)
        assert results == [DATA, DATA]
        with pytest.raises(SnapshotError, match=r"no chunk came for 0\.3 s at byte 0 of 1000003"):
            await fetch_snapshot(server.endpoint, POLICY, timeout_s=0.3)


async def test_what_is_not_served_is_said_at_once(file, endpoint):
    async with SnapshotServer(endpoint) as server:
        with pytest.raises(SnapshotError, match="no longer served"):
            await fetch_snapshot(endpoint, POLICY, timeout_s=30)
        server.register(3, DIGEST, file)
        server.unregister(3, DIGEST)
        with pytest.raises(SnapshotError, match="no longer served"):
            await fetch_snapshot(endpoint, POLICY, timeout_s=30)
        server.register(3, DIGEST, file)
        file.unlink()
        with pytest.raises(SnapshotError, match="no longer served"):
            await fetch_snapshot(endpoint, POLICY, timeout_s=30)


async def test_another_size_is_refused(file, endpoint):
    async with SnapshotServer(endpoint) as server:
        server.register(3, DIGEST, file)
        wrong = Policy(version=3, digest=DIGEST, size=len(DATA) + 1)
        with pytest.raises(SnapshotError, match=r"required 1000004 bytes.*of 1000003"):
            await fetch_snapshot(endpoint, wrong, timeout_s=30)


async def test_a_lost_chunk_is_asked_for_again(file, endpoint):
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.bind(endpoint)
        asked = []

        async def forgetful():
            while True:
                peer, data = await router.recv_multipart()
                fetch = decoded(data, Fetch)
                asked.append(fetch.offset)
                if len(asked) == 2:
                    continue
                part = DATA[fetch.offset : fetch.offset + fetch.length]
                chunk = Chunk(
                    version=3, digest=DIGEST, offset=fetch.offset, total=len(DATA), data=part
                )
                await router.send_multipart([peer, wire.encode(chunk)])

        data = b""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(forgetful)
            with anyio.fail_after(20):
                data = await fetch_snapshot(endpoint, POLICY, chunk_bytes=600_000, timeout_s=10)
            tasks.cancel_scope.cancel()
    assert data == DATA
    assert asked == [0, 600_000, 600_000]


async def test_bad_requests_are_counted_and_the_rest_goes_on(file, endpoint):
    async with SnapshotServer(endpoint) as server:
        server.register(3, DIGEST, file)
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as raw:
            raw.linger = 0
            raw.connect(endpoint)
            await raw.send(b"\xc1")
            await raw.send_multipart([b"a", b"b"])
            await raw.send(wire.encode(Heartbeat(progress=1)))
            await raw.send(bytes(4097))
            negative = Fetch(version=3, digest=DIGEST, offset=-1, length=5)
            await raw.send(wire.encode(negative))
            refused = decoded(await raw.recv(), Chunk)
            assert (refused.total, refused.data) == (0, b"")
            huge = Fetch(version=3, digest=DIGEST, offset=len(DATA) - 3, length=1 << 60)
            await raw.send(wire.encode(huge))
            assert decoded(await raw.recv(), Chunk).data == DATA[-3:]
        assert dict(server.refusals) == {"undecodable": 2, "unknown": 1, "oversized": 1}
        assert await fetch_snapshot(endpoint, POLICY, timeout_s=5) == DATA


async def test_the_bodys_own_error_is_not_wrapped(endpoint):
    with pytest.raises(KeyError):
        async with SnapshotServer(endpoint):
            raise KeyError("body")


def test_readers_take_turns_and_one_that_has_gone_frees_its_place():
    fetch = Fetch(version=3, digest="d3", offset=0, length=4)
    readers = Readers()
    for number in range(MAX_READERS + 2):
        readers.ask(f"r{number}", b"p", fetch, now=0.0)
    first = [reader for reader, *_ in readers.due(0.0)]
    assert first == [f"r{number}" for number in range(MAX_READERS)]
    assert readers.due(1.0) == []

    readers.ask("r5", b"p", fetch, now=4.0)  # goes on reading; it does not wait again
    readers.ask("r16", b"later", fetch, now=4.0)  # asks again, from the same place in the queue
    assert readers.due(4.0) == [("r5", b"p", fetch)]
    readers.finished("r0")
    assert readers.due(4.0) == [("r16", b"later", fetch)]
    assert readers.due(5.0) == []
    assert [reader for reader, *_ in readers.due(5.1)] == ["r17"]


def test_waiting_readers_are_bounded():
    fetch = Fetch(version=3, digest="d3", offset=0, length=4)
    readers = Readers()
    for number in range(MAX_READERS):
        readers.ask(f"r{number}", b"p", fetch, now=0.0)
    assert len(readers.due(0.0)) == MAX_READERS
    for number in range(2 * MAX_WAITING):
        readers.ask(f"w{number}", b"p", fetch, now=0.0)
    for number in range(MAX_READERS):
        readers.finished(f"r{number}")
    served = []
    while due := readers.due(0.0):
        served += [reader for reader, *_ in due]
        for reader, *_ in due:
            readers.finished(reader)
    assert served == [f"w{number}" for number in range(MAX_WAITING)]
