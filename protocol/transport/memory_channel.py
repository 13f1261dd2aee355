"""The channel without sockets: for one-process runs and for tests.

Messages are encoded and decoded as on the wire, so that what works here works there. Use both
ends from one event loop.
"""

import asyncio
import time
from collections import Counter, deque
from typing import Self

from protocol.errors import ChannelError
from protocol.messages import wire
from protocol.messages.messages import ActorMessage, LearnerMessage
from protocol.transport.channel import OUTBOX_BOUND


class MemoryServer:
    """`channel.Server` for clients made by `connect`."""

    def __init__(self, *, outbox_bound: int = OUTBOX_BOUND) -> None:
        self.refusals: Counter[str] = Counter()
        self.endpoint = "memory"
        self.endpoints = ["memory"]
        self._outbox_bound = outbox_bound
        self._inbox: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue(outbox_bound)
        self._clients: dict[bytes, MemoryClient] = {}
        self._seen: dict[bytes, float] = {}
        self._gone: deque[bytes] = deque()
        self._made = 0

    def connect(self) -> "MemoryClient":
        """Make a client of this server, as one more peer."""
        self._made += 1
        peer = self._made.to_bytes(4, "big")
        client = MemoryClient(self, peer, self._outbox_bound)
        self._clients[peer] = client
        return client

    async def __aenter__(self) -> Self:
        """Return the server, which is open from the start."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Forget the clients."""
        self._clients.clear()

    async def receive(self) -> tuple[bytes, ActorMessage]:
        """Wait for the next message: (peer, message)."""
        peer, data = await self._inbox.get()
        self._seen[peer] = time.monotonic()
        return peer, wire.decode_actor(data)

    def send(self, peer: bytes, message: LearnerMessage) -> bool:
        """Put into the peer's outbox; False, and the peer is dropped, if it is full or gone."""
        client = self._clients.get(peer)
        if client is not None and client.deliver(wire.encode(message)):
            return True
        self.drop(peer)
        return False

    def last_seen(self, peer: bytes) -> float | None:
        """`time.monotonic()` of the peer's newest message; None if unknown or dropped."""
        return self._seen.get(peer)

    def take_gone(self) -> list[bytes]:
        """Peers dropped since the last call."""
        gone = list(self._gone)
        self._gone.clear()
        return gone

    def take_in(self, peer: bytes, data: bytes) -> bool:
        """Accept what a client sends; False if the server is full or closed."""
        if self._clients.get(peer) is None or self._inbox.full():
            return False
        self._inbox.put_nowait((peer, data))
        return True

    def drop(self, peer: bytes) -> None:
        """Forget a peer and report it in `take_gone`, once."""
        if self._seen.pop(peer, None) is not None:
            self._gone.append(peer)

    def leave(self, peer: bytes) -> None:
        """Have a client go."""
        self._clients.pop(peer, None)


class MemoryClient:
    """`channel.Client` of a `MemoryServer`; made by its `connect`."""

    def __init__(self, server: MemoryServer, peer: bytes, outbox_bound: int) -> None:
        self.refusals: Counter[str] = Counter()
        self.endpoint = server.endpoint
        self._server = server
        self._peer = peer
        self._inbox: asyncio.Queue[bytes] = asyncio.Queue(outbox_bound)
        self._open = True

    async def __aenter__(self) -> Self:
        """Return the client, which is open from the start."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Leave the server."""
        self._open = False
        self._server.leave(self._peer)

    def send(self, message: ActorMessage) -> bool:
        """Put into the server's inbox; False if it is full or the server has closed."""
        if not self._open:
            raise ChannelError("MemoryClient: required an open channel, got one that is closed")
        return self._server.take_in(self._peer, wire.encode(message))

    async def receive(self) -> LearnerMessage:
        """Wait for the next message."""
        return wire.decode_learner(await self._inbox.get())

    def deliver(self, data: bytes) -> bool:
        """Accept what the server sends; False if there is no room."""
        if self._inbox.full():
            return False
        self._inbox.put_nowait(data)
        return True


def memory_pair(*, outbox_bound: int = OUTBOX_BOUND) -> tuple[MemoryServer, MemoryClient]:
    """Make a server and one client of it; `server.connect()` makes more."""
    server = MemoryServer(outbox_bound=outbox_bound)
    return server, server.connect()
