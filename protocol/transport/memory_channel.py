"""The channel between a learner and an actor in one process: messages pass by reference.

    learner's I/O thread  ── server.send ──▶ [ to the client ] ── client.receive ──▶  actor's I/O
                          ◀── server.receive ── [ to the server ] ◀── client.send ──  thread

It behaves as `Server` and `Client` of `protocol/transport/channel.py` do over a socket: `send`
never waits, a full queue loses the message, and a peer that cannot keep up is reported as gone.
Messages are immutable, so nothing is encoded or copied.
"""

import asyncio
import threading
from collections import Counter, deque
from typing import Generic, Self, TypeVar

import anyio.lowlevel

from protocol.messages.messages import ActorMessage, LearnerMessage
from protocol.transport.channel import OUTBOX_BOUND

# No socket's peer is called so: routing IDs that begin with a zero byte are ZMQ's own, of 5 bytes.
PEER = b"\0memory"

MessageT = TypeVar("MessageT")


class MemoryChannel:
    """Both ends of a channel; each queue holds at most `bound` messages.

    A full queue is emptied by the receiver alone. When an end is closed, messages sent before can
    still be received, and later ones are refused; a receiver goes on waiting, as on a socket whose
    peer has gone.
    """

    def __init__(self, *, bound: int = OUTBOX_BOUND) -> None:
        to_client, to_server = _Queue[LearnerMessage](bound), _Queue[ActorMessage](bound)
        self.client = MemoryClient(to_client, to_server)
        self.server = MemoryServer(to_client, to_server)


class MemoryClient:
    """The actor's end: a `ClientChannel`."""

    def __init__(
        self, incoming: "_Queue[LearnerMessage]", outgoing: "_Queue[ActorMessage]"
    ) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close; the server can still receive what was sent before."""
        self._outgoing.close()
        self._incoming.close()

    def limit_messages(self, max_bytes: int) -> None:
        """Do nothing: messages pass by reference, of any size."""

    def send(self, message: ActorMessage) -> bool:
        """Queue `message`; False if the queue is full or an end is closed."""
        return self._outgoing.put(message)

    async def receive(self) -> LearnerMessage:
        """Wait for the next message."""
        return await self._incoming.get()


class MemoryServer:
    """The learner's end: a `ServerChannel` with one peer, `PEER`."""

    def __init__(
        self, outgoing: "_Queue[LearnerMessage]", incoming: "_Queue[ActorMessage]"
    ) -> None:
        self.refusals: Counter[str] = Counter()  # stays empty: what arrives is always a message
        self._outgoing, self._incoming = outgoing, incoming
        self._dropped = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close; the client can still receive what was sent before."""
        self._outgoing.close()
        self._incoming.close()

    async def receive(self) -> tuple[bytes, ActorMessage]:
        """Wait for the next message: (peer, message)."""
        return PEER, await self._incoming.get()

    def send(self, peer: bytes, message: LearnerMessage) -> bool:
        """Queue `message`; if there is no room, return False and report the peer in `take_gone`.

        `peer` must be `PEER`.
        """
        assert peer == PEER
        sent = self._outgoing.put(message)
        self._dropped = self._dropped or not sent
        return sent

    def take_gone(self) -> list[bytes]:
        """Return `[PEER]` if it was dropped since the last call."""
        dropped, self._dropped = self._dropped, False
        return [PEER] if dropped else []


class _Queue(Generic[MessageT]):
    """One direction: `put` from any thread, `get` from one task of one event loop."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._items: deque[MessageT] = deque()
        self._closed = False
        self._lock = threading.Lock()
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, item: MessageT) -> bool:
        with self._lock:
            if self._closed or len(self._items) >= self._bound:
                return False
            self._items.append(item)
            # The loop cannot end before its waiting task has left `get`, under this lock.
            if self._waiting is not None:
                loop, arrived = self._waiting
                loop.call_soon_threadsafe(arrived.set)
            return True

    async def get(self) -> MessageT:
        # While messages keep coming nothing below waits, so other tasks get their turn here.
        await anyio.lowlevel.checkpoint()
        while True:
            with self._lock:
                if self._items:
                    return self._items.popleft()
                arrived = asyncio.Event()
                self._waiting = asyncio.get_running_loop(), arrived
            try:
                await arrived.wait()
            finally:
                with self._lock:
                    self._waiting = None

    def close(self) -> None:
        with self._lock:
            self._closed = True
