"""The channel between learner and actors: `Server` is the learner's end, `Client` an actor's.

Both are asynchronous context managers on asyncio. `send` never waits: each peer has its own bounded
outbox, and a peer that has gone or whose outbox is full is dropped without affecting the others.
Lost messages are not sent again here: actors keep their groups until they are acknowledged, and say
Hello again after a refusal. Within one process, `MemoryChannel` takes the place of both.
"""

from collections import Counter
from pathlib import Path
from typing import Protocol, Self

import anyio.lowlevel
import zmq
import zmq.asyncio

from protocol.errors import ChannelError, WireError
from protocol.messages import wire
from protocol.messages.messages import ActorMessage, Hello, LearnerMessage, Refuse
from protocol.transport import endpoints
from protocol.transport.bound_socket import BoundSocket, Received, bound_socket
from protocol.transport.curve_keys import ClientKeys
from protocol.transport.peers import PeerTable

OUTBOX_BOUND = 1024
_FAIRNESS = 64  # messages received before other tasks get a turn


class ClientChannel(Protocol):
    """The part of `Client` that an actor's I/O thread uses."""

    def limit_messages(self, max_bytes: int) -> None:
        """Send nothing above the learner's limit."""
        ...

    async def receive(self) -> LearnerMessage:
        """Wait for the next message."""
        ...

    def send(self, message: ActorMessage) -> bool:
        """Put into the outbox; False if it is full."""
        ...


class ServerChannel(Protocol):
    """The part of `Server` that the learner's I/O thread uses."""

    refusals: Counter[str]

    async def receive(self) -> tuple[bytes, ActorMessage]:
        """Wait for the next message: (peer, message)."""
        ...

    def send(self, peer: bytes, message: LearnerMessage) -> bool:
        """Put into the peer's outbox; False, and the peer is reported as gone, if that fails."""
        ...

    def take_gone(self) -> list[bytes]:
        """Return the peers dropped since the last call."""
        ...


class Server:
    """A ROUTER bound to the endpoints `bind`, `ipc://path` or `tcp://host:port`.

    `keys` is a folder made by `curve_keys.make_keys`; it guards tcp endpoints. An actor's name is
    bound to its key: a `Hello` with another name is refused, and so is one that comes without a key
    (over ipc) and claims the name of one. Frames that are not a message are counted in `refusals`
    by kind, and answered with `Refuse` within a rate limit. A peer is a ZMQ routing ID, which is
    new for each connection; `Hello` says who is behind it. Memory is bounded by the number of
    connections (`transport/connections.py`) times (16 received + `outbox_bound` outgoing) messages.
    """

    def __init__(
        self,
        bind: list[str],
        *,
        keys: str | Path | None = None,
        max_message_bytes: int = wire.MAX_MESSAGE_BYTES,
        outbox_bound: int = OUTBOX_BOUND,
    ) -> None:
        self.refusals: Counter[str] = Counter()
        self.endpoints = list(bind)
        self._max_message_bytes = max_message_bytes
        self._peers = PeerTable()
        self._opened = bound_socket(
            bind, keys, max_message_bytes=max_message_bytes, outbox_bound=outbox_bound
        )
        self._bound: BoundSocket | None = None
        self._received = 0

    @property
    def endpoint(self) -> str:
        """The first endpoint, with its actual port once bound."""
        return self.endpoints[0]

    async def __aenter__(self) -> Self:
        """Bind; raise `ChannelError` that names an endpoint that cannot be bound."""
        self._bound = self._opened.__enter__()
        self.endpoints = self._bound.endpoints
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close, after at most a second for what is in the outboxes, such as `Stop`."""
        if self._bound is not None:
            self._bound.socket.setsockopt(zmq.LINGER, 1_000)
        self._bound = None
        self._opened.__exit__(None, None, None)

    async def receive(self) -> tuple[bytes, ActorMessage]:
        """Wait for the next message: (peer, message). Refuse frames that are not one."""
        bound = endpoints.require_open(self._bound, "Server")
        while True:
            # A flood of messages never blocks in recv, so other tasks get their turn here.
            self._received += 1
            if self._received % _FAIRNESS == 0:
                await anyio.lowlevel.checkpoint()

            received = await bound.receive()
            self._peers.seen(received.peer)
            if self._peers.is_shut(received.peer):
                self.refusals["shut"] += 1
                bound.end(received)
                continue

            try:
                data = endpoints.single_frame(received.frames)
                message = wire.decode_actor(data, max_bytes=self._max_message_bytes)
            except WireError as error:
                code = "undecodable" if error.kind == "undecodable" else "invalid"
                self._refuse(received.peer, error.kind, Refuse(code=code, reason=str(error)))
                continue

            if problem := _key_error(received, message, bound):
                refuse = Refuse(code="key", reason=problem, fatal=True)
                self._refuse(received.peer, "key", refuse)
            else:
                return received.peer, message

    def send(self, peer: bytes, message: LearnerMessage) -> bool:
        """Put `message` into the peer's outbox.

        A peer that says more after a fatal refusal is disconnected. If its connection is gone or
        its outbox is full, drop the peer: return False and report it
        in `take_gone`. Raise `WireError` for a message above the limit.
        """
        bound = endpoints.require_open(self._bound, "Server")
        if bound.send(peer, wire.encode(message, max_bytes=self._max_message_bytes)):
            if isinstance(message, Refuse) and message.fatal:
                self._peers.shut(peer)
            return True
        self._peers.drop(peer)
        return False

    def take_gone(self) -> list[bytes]:
        """Return the peers dropped since the last call."""
        return self._peers.take_gone()

    def _refuse(self, peer: bytes, kind: str, refuse: Refuse) -> None:
        self.refusals[kind] += 1
        if self._peers.may_refuse(peer):
            self.send(peer, refuse)


def _key_error(received: Received, message: ActorMessage, bound: BoundSocket) -> str:
    """Return why a message may not come with the key that it came with, or ""."""
    if received.name is None:
        return "this actor's key is no longer admitted: its file has left the learner's folder"
    if not isinstance(message, Hello) or bound.admitted is None:
        return ""

    claimed = message.actor_id
    if received.name and claimed != received.name:
        return (
            f"an actor's name is that of its key: required {received.name!r}, got {claimed!r}; "
            "start it without --name, or with the key pair of that name"
        )
    if not received.name and bound.admitted.has(claimed):
        return f"the name {claimed!r} belongs to a key, and this actor came without; choose another"
    return ""


class Client:
    """A DEALER connected to a `Server`; ZMQ reconnects by itself and keeps the outbox."""

    def __init__(
        self,
        endpoint: str,
        *,
        keys: ClientKeys | None = None,
        max_message_bytes: int = wire.MAX_MESSAGE_BYTES,
        outbox_bound: int = OUTBOX_BOUND,
    ) -> None:
        self.endpoint = endpoint
        self._max_message_bytes = max_message_bytes
        self._opened = endpoints.connected_socket(
            endpoint, keys, max_message_bytes=max_message_bytes, outbox_bound=outbox_bound
        )
        self._socket: zmq.asyncio.Socket | None = None

    async def __aenter__(self) -> Self:
        """Start connecting; raise `ChannelError` for an endpoint or keys that cannot be used."""
        self._socket = self._opened.__enter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close, after at most a second for what is in the outbox, such as `Release`."""
        if self._socket is not None:
            self._socket.setsockopt(zmq.LINGER, 1_000)
        self._socket = None
        self._opened.__exit__(None, None, None)

    def limit_messages(self, max_bytes: int) -> None:
        """Use the learner's limit, which its `Welcome` gives."""
        self._max_message_bytes = max_bytes

    def send(self, message: ActorMessage) -> bool:
        """Put `message` into the outbox; False if it is full because the learner is away.

        Raise `WireError` for a message above the limit.
        """
        socket = endpoints.require_open(self._socket, "Client")
        data = wire.encode(message, max_bytes=self._max_message_bytes)
        return endpoints.send_now(socket, [data])

    async def receive(self) -> LearnerMessage:
        """Wait for the next message; raise `ChannelError` if it is not a learner's."""
        socket = endpoints.require_open(self._socket, "Client")
        frames = await socket.recv_multipart()
        try:
            return wire.decode_learner(
                endpoints.single_frame(frames), max_bytes=self._max_message_bytes
            )
        except WireError as error:
            raise ChannelError(
                f"{self.endpoint}: required a learner of the same version of Pippin, got a message "
                f"that is not its: {error}; check the endpoint and both versions"
            ) from error
