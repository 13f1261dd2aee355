"""Snapshots travel over their own socket, in chunks, so that no message waits behind one.

`SnapshotServer` serves registered files; `fetch_snapshot` asks for one chunk at a time, and again
for a chunk that did not come. The digest is checked when the snapshot is applied.
"""

import os
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
import zmq.asyncio

from protocol.errors import SnapshotError, WireError, only_leaf
from protocol.messages import wire
from protocol.messages.messages import Chunk, Fetch, Policy
from protocol.transport import endpoints

CHUNK_BYTES = 4 * wire.MIB
TIMEOUT_S = 60.0
_ASK_AGAIN_S = 2.0
_OUTBOX_BOUND = 4  # chunks for one peer
_MAX_REQUEST_BYTES = 4096


class SnapshotServer:
    """A ROUTER that answers `Fetch` with `Chunk`, from files registered by version and digest.

    It serves in the background inside its `async with`. Bad frames are counted in `refusals` and
    not answered. Chunks for a peer whose outbox is full are dropped; it will ask again.
    """

    def __init__(self, endpoint: str, *, keys: str | Path | None = None) -> None:
        self.endpoint = endpoint
        self.refusals: Counter[str] = Counter()
        self._keys = keys
        self._paths: dict[tuple[int, str], Path] = {}
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
            socket, (self.endpoint,) = stack.enter_context(
                endpoints.bound_socket(
                    [self.endpoint],
                    self._keys,
                    max_message_bytes=_MAX_REQUEST_BYTES,
                    outbox_bound=_OUTBOX_BOUND,
                )
            )
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            tasks.start_soon(self._serve, socket)
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

    async def _serve(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            await anyio.lowlevel.checkpoint()
            peer, *frames = await socket.recv_multipart()
            try:
                data = endpoints.single_frame(frames)
                message = wire.decode_snapshot(data, max_bytes=_MAX_REQUEST_BYTES)
                if not isinstance(message, Fetch):
                    raise WireError("snapshot socket: required Fetch, got Chunk", kind="unknown")
            except WireError as error:
                self.refusals[error.kind] += 1
                continue
            endpoints.send_now(socket, [peer, wire.encode(self._chunk(message))])

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
    keys: str | Path | None = None,
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
