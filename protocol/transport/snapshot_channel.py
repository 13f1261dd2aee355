"""Snapshots travel over their own socket, in chunks, so that no message waits behind one.

`SnapshotServer` serves registered files; `fetch_snapshot` asks for one chunk at a time, and again
for a chunk that did not come. The digest is checked when the snapshot is applied.
"""

import os
import time
from collections import Counter, OrderedDict
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
import zmq.asyncio

from protocol.errors import SnapshotError, WireError, only_leaf
from protocol.messages import wire
from protocol.messages.messages import Chunk, Fetch, Policy
from protocol.transport import endpoints
from protocol.transport.bound_socket import BoundSocket, Received, bound_socket
from protocol.transport.curve_keys import ClientKeys

CHUNK_BYTES = 4 * wire.MIB
TIMEOUT_S = 60.0
_ASK_AGAIN_S = 2.0
_OUTBOX_BOUND = 4  # requests of one reader, or chunks for it
_MAX_REQUEST_BYTES = 4096

MAX_READERS = 16  # chunks in memory: at most this many times `_OUTBOX_BOUND`
MAX_WAITING = 1024  # readers that wait for their turn
READER_IDLE_S = 5.0  # a reader that asks for nothing for so long has gone, and frees its place


@dataclass
class Readers:
    """Who may read now, and who waits: `MAX_READERS` at a time, the others in order of arrival.

    A reader is a key's name, or a connection where there are no keys. It keeps its place until it
    asked for the snapshot's last chunk, or for nothing during `READER_IDLE_S`.
    """

    _last_asked: dict[str | bytes, float] = field(default_factory=dict[str | bytes, float])
    _waiting: OrderedDict[str | bytes, tuple[bytes, Fetch]] = field(
        default_factory=OrderedDict[str | bytes, tuple[bytes, Fetch]]
    )

    def ask(self, reader: str | bytes, peer: bytes, fetch: Fetch, now: float) -> None:
        """Queue a request; a reader has one at a time, and the latest counts."""
        if reader in self._waiting or len(self._waiting) < MAX_WAITING:
            self._waiting[reader] = (peer, fetch)
        if reader in self._last_asked:
            self._last_asked[reader] = now
            self._waiting.move_to_end(reader, last=False)

    def due(self, now: float) -> list[tuple[str | bytes, bytes, Fetch]]:
        """Take the requests that may be answered now: (reader, peer, fetch)."""
        for reader, asked in list(self._last_asked.items()):
            if now - asked > READER_IDLE_S:
                del self._last_asked[reader]

        taken: list[tuple[str | bytes, bytes, Fetch]] = []
        for reader in list(self._waiting):
            if reader not in self._last_asked:
                if len(self._last_asked) >= MAX_READERS:
                    break
                self._last_asked[reader] = now
            taken.append((reader, *self._waiting.pop(reader)))
        return taken

    def finished(self, reader: str | bytes) -> None:
        """Free the place of a reader that has asked for its last chunk."""
        self._last_asked.pop(reader, None)


class SnapshotServer:
    """A ROUTER that answers `Fetch` with `Chunk`, from files registered by version and digest.

    It serves in the background inside its `async with`. Bad frames are counted in `refusals` and
    not answered. Chunks for a peer whose outbox is full are dropped; it will ask again. At most
    `MAX_READERS` are served at a time.
    """

    def __init__(self, endpoint: str, *, keys: str | Path | None = None) -> None:
        self.endpoint = endpoint
        self.refusals: Counter[str] = Counter()
        self._keys = keys
        self._paths: dict[tuple[int, str], Path] = {}
        self._readers = Readers()
        self._resources = AsyncExitStack()

    def register(self, version: int, digest: str, path: Path) -> None:
        """Serve the file at `path`; it must not change while it is registered."""
        self._paths[version, digest] = path

    def unregister(self, version: int, digest: str) -> None:
        """Stop serving a snapshot; those who are fetching it are told."""
        self._paths.pop((version, digest), None)

    async def __aenter__(self) -> Self:
        """Bind and serve; raise `ChannelError` that names the endpoint if it cannot be bound."""
        async with AsyncExitStack() as stack:
            bound = stack.enter_context(
                bound_socket(
                    [self.endpoint],
                    self._keys,
                    max_message_bytes=_MAX_REQUEST_BYTES,
                    outbox_bound=_OUTBOX_BOUND,
                )
            )
            (self.endpoint,) = bound.endpoints
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            tasks.start_soon(self._serve, bound)
            self._resources = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop serving at once."""
        try:
            await self._resources.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            if only_leaf(group) is not error:  # do not wrap the body's own error in a group
                raise

    async def _serve(self, bound: BoundSocket) -> None:
        while True:
            await anyio.lowlevel.checkpoint()
            with anyio.move_on_after(1.0):  # then places of readers that have gone are free
                self._ask(await bound.receive())

            for reader, peer, fetch in self._readers.due(time.monotonic()):
                chunk = self._chunk(fetch)
                bound.send(peer, wire.encode(chunk))
                if chunk.offset + len(chunk.data) >= chunk.total:
                    self._readers.finished(reader)

    def _ask(self, received: Received) -> None:
        try:
            if received.name is None:
                raise WireError("snapshot socket: the key is no longer admitted", kind="key")
            data = endpoints.single_frame(received.frames)
            message = wire.decode_snapshot(data, max_bytes=_MAX_REQUEST_BYTES)
            if not isinstance(message, Fetch):
                raise WireError("snapshot socket: required Fetch, got Chunk", kind="unknown")
        except WireError as error:
            self.refusals[error.kind] += 1
        else:
            reader = received.name or received.peer
            self._readers.ask(reader, received.peer, message, time.monotonic())

    def _chunk(self, fetch: Fetch) -> Chunk:
        """Read the part of the file that was asked for; total 0 if it is not served."""
        total, data = 0, b""
        path = self._paths.get((fetch.version, fetch.digest))
        if path is not None and fetch.offset >= 0:
            try:
                with path.open("rb") as file:
                    total = os.fstat(file.fileno()).st_size
                    length = max(0, min(fetch.length, wire.MAX_CHUNK_BYTES))
                    data = os.pread(file.fileno(), length, min(fetch.offset, total))
            except FileNotFoundError:
                self.unregister(fetch.version, fetch.digest)
        return Chunk(
            version=fetch.version,
            digest=fetch.digest,
            offset=fetch.offset,
            total=total,
            data=data,
        )


async def fetch_snapshot(
    endpoint: str,
    policy: Policy,
    *,
    keys: ClientKeys | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    timeout_s: float = TIMEOUT_S,
) -> bytes:
    """Fetch the snapshot of `policy` in chunks and return its `policy.size` bytes.

    A chunk that does not come is asked for again. Raise `SnapshotError` when none has come for
    `timeout_s`, when the snapshot is no longer served, or when it has another size.
    """
    chunk_bytes = min(chunk_bytes, wire.MAX_CHUNK_BYTES)
    received = bytearray()

    with endpoints.connected_socket(
        endpoint,
        keys,
        max_message_bytes=wire.MAX_SNAPSHOT_MESSAGE_BYTES,
        outbox_bound=_OUTBOX_BOUND,
    ) as socket:
        while len(received) < policy.size:
            fetch = Fetch(
                version=policy.version,
                digest=policy.digest,
                offset=len(received),
                length=min(chunk_bytes, policy.size - len(received)),
            )

            try:
                chunk = await _pull(socket, fetch, timeout_s)
            except WireError as error:
                raise SnapshotError(
                    f"snapshot of version {policy.version}: {endpoint} does not serve snapshots: "
                    f"{error}; check the endpoint and both versions"
                ) from error
            if chunk is None:
                raise SnapshotError(
                    f"snapshot of version {policy.version} from {endpoint}: no chunk came for "
                    f"{timeout_s:g} s at byte {len(received)} of {policy.size}; is the learner "
                    "alive and reachable, and are the keys the right ones?"
                )

            _check(chunk, policy, endpoint)
            received += chunk.data[: fetch.length]
    return bytes(received)


async def _pull(socket: zmq.asyncio.Socket, fetch: Fetch, timeout_s: float) -> Chunk | None:
    """Ask until the chunk comes; None after `timeout_s`. Late answers to other asks are skipped."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        endpoints.send_now(socket, [wire.encode(fetch)])
        with anyio.move_on_after(min(left, _ASK_AGAIN_S)):
            while True:
                frames = await socket.recv_multipart()
                chunk = wire.decode_snapshot(endpoints.single_frame(frames))
                if (
                    isinstance(chunk, Chunk)
                    and (chunk.version, chunk.digest) == (fetch.version, fetch.digest)
                    and chunk.offset == fetch.offset
                ):
                    return chunk
    return None


def _check(chunk: Chunk, policy: Policy, endpoint: str) -> None:
    where = f"snapshot of version {policy.version} from {endpoint}"
    if chunk.total == 0:
        raise SnapshotError(f"{where}: it is no longer served; fetch a newer version")

    if chunk.total != policy.size or not chunk.data:
        raise SnapshotError(
            f"{where}: required {policy.size} bytes as announced, got {len(chunk.data)} of a file "
            f"of {chunk.total} bytes; fetch a newer version"
        )
