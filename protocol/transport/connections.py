"""Bounds a bound socket's tcp connections, so that strangers cannot use up this process's files.

ZMQ accepts whoever connects, without a bound, and lets each take its time over the handshake. It
tells a monitor of every connection that it accepts and loses; `ConnectionGuard` counts them on a
thread of its own and ends those above the bounds:

- at most `MAX_CONNECTIONS` in all: above, the newest is ended;
- at most `MAX_UNPROVEN` that have sent no message yet and are younger than `HANDSHAKE_S`: above,
  the oldest from the address that has most of them. So a flood from one address does not shut out
  the others, and even from its own address a handshake has time while that many others arrive.

After `HANDSHAKE_S`, ZMQ itself ends a connection whose handshake is not finished. When the guard
falls behind, ZMQ's thread waits for it once `UNSEEN` events are queued and accepts nothing: a
socket never holds more than `MAX_CONNECTIONS` + `UNSEEN` files. Sockets of `ipc://` are guarded by
the mode of their folder and not counted.
"""

import logging
import socket as sockets
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

import zmq
import zmq.asyncio

log = logging.getLogger("pippin.transport")

HANDSHAKE_S = 10.0
MAX_CONNECTIONS = 1536
MAX_UNPROVEN = 256
UNSEEN = 1001  # a monitor's queue: ZMQ's default of 1,000, and 1 at our end
BACKLOG = 1024  # beside a flood, a full one costs whoever joins a second or more
REPORT_S = 60.0

_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
_EVENT = struct.Struct("=HI")


class ConnectionTable:
    """The tcp connections of a socket by file descriptor; decides which to end. No sockets here."""

    def __init__(
        self, *, max_connections: int = MAX_CONNECTIONS, max_unproven: int = MAX_UNPROVEN
    ) -> None:
        self._max_connections = max_connections
        self._max_unproven = max_unproven
        self._proven: set[int] = set()
        self._unproven: OrderedDict[int, tuple[str, float]] = OrderedDict()
        self._by_address: dict[str, OrderedDict[int, None]] = {}

    def __len__(self) -> int:
        return len(self._proven) + len(self._unproven)

    def accepted(self, descriptor: int, address: str, now: float) -> int | None:
        """Note a new connection; return the one to end because of it, if there is one."""
        self.closed(descriptor)  # ZMQ told of its end too late, or not at all
        self._prove_old(now)
        if len(self) >= self._max_connections:
            return descriptor

        self._unproven[descriptor] = (address, now)
        self._by_address.setdefault(address, OrderedDict())[descriptor] = None
        if len(self._unproven) <= self._max_unproven:
            return None
        crowd = max(self._by_address.values(), key=len)
        victim = next(iter(crowd))
        self.closed(victim)
        return victim

    def proved(self, descriptor: int) -> None:
        """Note that a message came over a connection."""
        if descriptor in self._unproven:
            self.closed(descriptor)
            self._proven.add(descriptor)

    def closed(self, descriptor: int) -> None:
        """Forget a connection."""
        self._proven.discard(descriptor)
        address, _ = self._unproven.pop(descriptor, ("", 0.0))
        if crowd := self._by_address.get(address):
            crowd.pop(descriptor, None)
            if not crowd:
                del self._by_address[address]

    def _prove_old(self, now: float) -> None:
        """Count those as proven that ZMQ would have ended, had they not finished the handshake."""
        while self._unproven:
            descriptor, (_, since) = next(iter(self._unproven.items()))
            if now - since < HANDSHAKE_S + 1:
                return
            self.proved(descriptor)


class ConnectionGuard:
    """Watches a socket until its context ends; `ended` counts the connections that it ended."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.ended = 0
        self._clock = clock
        self._table = ConnectionTable()
        self._lock = threading.Lock()
        self._ports: set[int] = set()
        self._reported_at = float("-inf")

    def watch(self, context: zmq.asyncio.Context, socket: zmq.asyncio.Socket) -> None:
        """Watch `socket` of `context`, which is not bound yet."""
        socket.setsockopt(zmq.BACKLOG, BACKLOG)
        socket.setsockopt(zmq.HANDSHAKE_IVL, round(HANDSHAKE_S * 1000))
        address = f"inproc://connections-{id(self)}"
        socket.monitor(address, _EVENTS)

        monitor = zmq.Context(shadow=context.underlying).socket(zmq.PAIR)
        monitor.setsockopt(zmq.LINGER, 0)
        monitor.setsockopt(zmq.RCVHWM, 1)
        monitor.connect(address)
        threading.Thread(
            target=self._follow, args=(monitor,), name="connections", daemon=True
        ).start()

    def bound(self, endpoint: str) -> None:
        """Note an endpoint of the socket: only connections to its port are ever ended."""
        if endpoint.startswith("tcp://"):
            self._ports.add(int(endpoint.rpartition(":")[2]))

    def proved(self, descriptor: int) -> None:
        """Note that a message came over a connection."""
        with self._lock:
            self._table.proved(descriptor)

    def _follow(self, monitor: "zmq.Socket[bytes]") -> None:
        # It must read to the end: ZMQ's thread waits for room in the monitor's queue, and whoever
        # closes the socket or its context waits for ZMQ's thread.
        with monitor, suppress(zmq.ContextTerminated):
            while True:
                data, endpoint = monitor.recv_multipart()
                event, value = _EVENT.unpack(data)
                if event == zmq.EVENT_MONITOR_STOPPED:
                    return
                if not endpoint.startswith(b"ipc://"):
                    self._note(event, value)

    def _note(self, event: int, descriptor: int) -> None:
        with self._lock:
            if event == zmq.EVENT_DISCONNECTED:
                self._table.closed(descriptor)
                return
            now = self._clock()
            excess = self._table.accepted(descriptor, self._peer(descriptor), now)
        if excess is not None:
            self.end(excess)
            self._report(now)

    def end(self, descriptor: int) -> None:
        """End a connection: ZMQ sees that its peer has gone, and closes its file."""
        with suppress(OSError), _borrowed(descriptor) as connection:
            # The number may belong to another file by now; one of our ports is ours to end.
            name = connection.getsockname()
            if isinstance(name, tuple) and name[1] in self._ports:
                connection.shutdown(sockets.SHUT_RDWR)
                self.ended += 1

    def _peer(self, descriptor: int) -> str:
        with suppress(OSError), _borrowed(descriptor) as connection:
            return str(connection.getpeername()[0])
        return ""

    def _report(self, now: float) -> None:
        if now - self._reported_at >= REPORT_S:
            self._reported_at = now
            log.warning(
                "too many connections (at most %d, and %d that have sent nothing yet): %d were "
                "ended; who is connecting to this port?",
                MAX_CONNECTIONS,
                MAX_UNPROVEN,
                self.ended,
            )


@contextmanager
def _borrowed(descriptor: int) -> Generator[sockets.socket]:
    """Yield the socket of a file descriptor, which stays open; raise OSError if it is none."""
    connection = sockets.socket(fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()
