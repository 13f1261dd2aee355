"""Endpoints: which are allowed, and how sockets are bound and connected.

`ipc://` is guarded by the mode of its folder (`ipc_folder`), `tcp://` by CURVE keys, which are
required for addresses other than loopback. Keys apply to tcp only, so one socket can serve both.
"""

import asyncio
import errno
import socket as sockets
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import zmq
import zmq.asyncio

from protocol.errors import ChannelError, WireError
from protocol.hosts import is_loopback_host
from protocol.transport.curve_keys import ClientKeys, KeyPair
from protocol.transport.socket_folders import PARENT, PREFIX, held, remove_dead

MAX_IPC_PATH_BYTES = 103  # sun_path on macOS, less its terminator
ZAP_DOMAIN = b"pippin"
HEARTBEAT_INTERVAL_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 20_000
RECONNECT_MS = 100
RECONNECT_TCP_MS = 2_000  # the longest, to which it doubles

SocketT = TypeVar("SocketT")


@contextmanager
def ipc_folder() -> Generator[Path]:
    """Make a 0700 folder under /tmp for a run's sockets; it is removed at the end.

    Those of runs that were killed are removed now.
    """
    remove_dead(PARENT)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=PARENT) as name, held(Path(name)):
        yield Path(name)


def is_loopback(endpoint: str) -> bool:
    """Say whether a `tcp://` endpoint stays on this machine."""
    return is_loopback_host(endpoint.removeprefix("tcp://").rpartition(":")[0])


def reachable(endpoint: str, through: str) -> str:
    """Return `endpoint` with an address at which a peer can reach it.

    A wildcard host (0.0.0.0, ::, *) says where the owner listens, not where it is: the host of
    `through`, an endpoint at which the peer has reached the same owner, takes its place.

    Example: reachable("tcp://0.0.0.0:7001", "tcp://10.0.0.1:7000") is "tcp://10.0.0.1:7001".
    """
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or host.strip("[]") not in ("0.0.0.0", "::", "*", ""):
        return endpoint
    if not through.startswith("tcp://"):
        return f"tcp://127.0.0.1:{port}"
    return f"tcp://{through.removeprefix('tcp://').rpartition(':')[0]}:{port}"


def check_endpoint(endpoint: str, *, keys: bool) -> None:
    """Raise `ChannelError` for a malformed endpoint, or one that needs keys and has none."""
    scheme, _, address = endpoint.partition("://")

    if scheme == "ipc" and address:
        size = len(address.encode())
        if size > MAX_IPC_PATH_BYTES:
            raise ChannelError(
                f"endpoint {endpoint}: a socket path may have at most {MAX_IPC_PATH_BYTES} bytes, "
                f"got {size}; use a shorter folder, such as one under /tmp"
            )
    elif scheme == "tcp" and address:
        port = address.rpartition(":")[2]
        if not (port == "*" or (port.isdecimal() and int(port) < 65536)):
            raise ChannelError(f"endpoint {endpoint}: required tcp://host:port, got no valid port")
        if not keys and not is_loopback(endpoint):
            raise ChannelError(
                f"endpoint {endpoint} can be reached from other machines: CURVE keys are required, "
                "got none; make them with launch/keys.py and set transport.keys"
            )
    else:
        raise ChannelError(
            f"endpoint {endpoint!r}: required ipc://path or tcp://host:port; correct it"
        )


def set_limits(socket: zmq.asyncio.Socket, *, max_message_bytes: int, outbox_bound: int) -> None:
    """Bound what a socket holds per peer, and detect peers that vanish."""
    # Above the limit we refuse with a reason; above twice the limit ZMQ drops the connection.
    socket.setsockopt(zmq.MAXMSGSIZE, 2 * max_message_bytes)
    socket.setsockopt(zmq.RCVHWM, 16)
    socket.setsockopt(zmq.SNDHWM, outbox_bound)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


def bind_all(socket: zmq.asyncio.Socket, endpoints: list[str], keys: KeyPair | None) -> list[str]:
    """Bind every endpoint, each checked before, and return them with their actual ports.

    Raise `ChannelError` that names the endpoint that cannot be bound.
    """
    # An option applies to endpoints bound after it was set: ipc first, then CURVE for tcp.
    bound: dict[int, str] = {}
    indices = sorted(range(len(endpoints)), key=lambda i: endpoints[i].startswith("tcp://"))

    for index in indices:
        endpoint = endpoints[index]
        if endpoint.startswith("ipc://"):
            _refuse_live_ipc(endpoint)
        elif keys is not None:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        bound[index] = _bind(socket, endpoint)

    return [bound[index] for index in range(len(endpoints))]


def _bind(socket: zmq.asyncio.Socket, endpoint: str) -> str:
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE:
            raise _in_use(endpoint) from error
        raise ChannelError(
            f"endpoint {endpoint}: required an address of this machine that can be bound, got: "
            f"{error.strerror}"
        ) from error

    last = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(last, bytes)
    return last.rstrip(b"\0").decode()


def _in_use(endpoint: str) -> ChannelError:
    return ChannelError(
        f"endpoint {endpoint}: required a free address, got one in use; stop the process that "
        "holds it, or choose another port (tcp://host:* takes any)"
    )


def _refuse_live_ipc(endpoint: str) -> None:
    """Raise if another process listens there: ZMQ would silently take over the path."""
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(endpoint.removeprefix("ipc://"))
        except OSError:
            return
    raise _in_use(endpoint)


def connect(socket: zmq.asyncio.Socket, endpoint: str, keys: ClientKeys | None) -> None:
    """Connect a socket to a checked endpoint; ZMQ keeps trying by itself."""
    if keys is not None and endpoint.startswith("tcp://"):
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    # A local learner that is still starting is asked again at once: only tcp backs off.
    longest = RECONNECT_TCP_MS if endpoint.startswith("tcp://") else 0
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, longest)

    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise ChannelError(
            f"endpoint {endpoint}: required an address to connect to, got: {error.strerror}"
        ) from error


@contextmanager
def connected_socket(
    endpoint: str, keys: ClientKeys | None, *, max_message_bytes: int, outbox_bound: int
) -> Generator[zmq.asyncio.Socket]:
    """Open a DEALER, in a context of its own, that connects to `endpoint`; close it at the end.

    Raise `ChannelError` for an endpoint that cannot be used.
    """
    check_endpoint(endpoint, keys=keys is not None)
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    try:
        set_limits(socket, max_message_bytes=max_message_bytes, outbox_bound=outbox_bound)
        connect(socket, endpoint, keys)
        yield socket
    finally:
        socket.close()
        context.term()


def send_now(socket: zmq.asyncio.Socket, frames: list[bytes]) -> bool:
    """Send without waiting; False if the peer is gone or its outbox is full."""
    send = cast(
        "Callable[..., asyncio.Future[object]]",
        socket.send_multipart,  # pyright: ignore[reportUnknownMemberType]
    )
    error = send(frames, flags=zmq.NOBLOCK).exception()  # with NOBLOCK the future is done

    if error is None:
        return True
    if isinstance(error, zmq.ZMQError) and error.errno in (errno.EAGAIN, errno.EHOSTUNREACH):
        return False
    raise error


def single_frame(frames: list[bytes]) -> bytes:
    """Return the only frame of a message; raise `WireError("undecodable")` for any other count."""
    if len(frames) != 1:
        raise WireError(
            f"required a message of one frame, got {len(frames)} frames; the peer speaks another "
            "protocol",
            kind="undecodable",
        )
    return frames[0]


def require_open(socket: SocketT | None, owner: str) -> SocketT:
    """Return the open socket; raise `ChannelError` outside the owner's `async with`."""
    if socket is None:
        raise ChannelError(f"{owner}: required an open channel, got one that is closed")
    return socket
