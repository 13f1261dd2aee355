"""A bound socket: its connections are bounded, and it knows which key each message came with."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import zmq
import zmq.asyncio
import zmq.auth.asyncio

from protocol.transport import endpoints
from protocol.transport.connections import ConnectionGuard
from protocol.transport.curve_keys import AdmittedKeys, load_server_keys


@dataclass(frozen=True)
class Received:
    """What came from a peer, a ZMQ routing ID that is new for each connection.

    `name` is that of the key it came with, "" where no keys are asked for (ipc, or tcp without
    keys), and None if the key is no longer admitted.
    """

    peer: bytes
    frames: list[bytes]
    name: str | None
    descriptor: int = -1  # of the connection that it came over


@dataclass
class BoundSocket:
    """A ROUTER and the endpoints that it is bound to, with their actual ports."""

    socket: zmq.asyncio.Socket
    endpoints: list[str]
    guard: ConnectionGuard
    admitted: AdmittedKeys | None = None

    async def receive(self) -> Received:
        """Wait for the next message of any kind."""
        peer, *frames = await self.socket.recv_multipart(copy=False)
        descriptor = frames[-1].get(zmq.SRCFD) if frames else -1
        self.guard.proved(descriptor)
        data = [frame.bytes for frame in frames]
        return Received(peer.bytes, data, self._name(frames), descriptor)

    def end(self, received: Received) -> None:
        """End the tcp connection that a message came over."""
        self.guard.end(received.descriptor)

    def send(self, peer: bytes, data: bytes) -> bool:
        """Send without waiting; False if the peer is gone or its outbox is full."""
        return endpoints.send_now(self.socket, [peer, data])

    def _name(self, frames: list[zmq.Frame]) -> str | None:
        if self.admitted is None or not frames:
            return ""
        try:
            key = cast("str", frames[-1].get("User-Id"))
        except zmq.ZMQError:  # it came over ipc, where no key is asked for
            return ""
        return self.admitted.name_of(key.encode()) or None


class _KeyCheck:
    """Tells ZMQ's authenticator whether a public key (Z85) is admitted, at each handshake."""

    def __init__(self, admitted: AdmittedKeys) -> None:
        self._admitted = admitted

    def callback(self, domain: str, key: bytes) -> bool:
        return bool(self._admitted.name_of(key))


@contextmanager
def bound_socket(
    bind: list[str], keys: str | Path | None, *, max_message_bytes: int, outbox_bound: int
) -> Generator[BoundSocket]:
    """Open a ROUTER bound to the endpoints `bind`, in a context of its own; close it at the end.

    `keys` is a folder made by `curve_keys.make_keys`: only holders of the keys in it can connect to
    tcp endpoints. Raise `ChannelError` that names an endpoint or a key file that cannot be used.
    """
    for endpoint in bind:
        endpoints.check_endpoint(endpoint, keys=keys is not None)
    pair = load_server_keys(keys) if keys is not None else None
    admitted = AdmittedKeys(Path(keys)) if keys is not None else None

    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    authenticator, guard = None, ConnectionGuard()
    try:
        if admitted is not None:
            authenticator = zmq.auth.asyncio.AsyncioAuthenticator(context)
            authenticator.start()
            authenticator.configure_curve_callback(
                endpoints.ZAP_DOMAIN.decode(), _KeyCheck(admitted)
            )

        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        endpoints.set_limits(socket, max_message_bytes=max_message_bytes, outbox_bound=outbox_bound)
        guard.watch(context, socket)
        bound = endpoints.bind_all(socket, bind, pair)
        for endpoint in bound:
            guard.bound(endpoint)
        yield BoundSocket(socket, bound, guard, admitted)
    finally:
        socket.close()
        if authenticator is not None:
            authenticator.stop()
        context.term()
