"""The requests waiting at a reward server: bounded in number and bytes, fair to every peer."""

from collections import OrderedDict, deque
from dataclasses import dataclass

import anyio


@dataclass(frozen=True)
class QueuedRequest:
    """A valid request, as JSON."""

    id: str
    count: int  # completions
    timeout_s: float
    data: bytes


class FairQueue:
    """Peers take turns: one that sends a thousand requests delays another's by one.

    A full queue refuses (`put` returns False); `get` makes room.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._peers: OrderedDict[bytes, deque[QueuedRequest]] = OrderedDict()
        self._filled = anyio.Event()
        self._count = 0
        self.bytes = 0

    def __len__(self) -> int:
        return self._count

    def put(self, peer: bytes, request: QueuedRequest) -> bool:
        """Add a request; False if it does not fit. An empty queue accepts any size."""
        size = len(request.data)
        too_large = self._count > 0 and self.bytes + size > self._max_bytes
        if self._count >= self._max_requests or too_large:
            return False

        self._peers.setdefault(peer, deque()).append(request)
        self._count += 1
        self.bytes += size
        self._filled.set()
        return True

    async def get(self) -> QueuedRequest:
        """Wait for a request: the oldest of the peer whose turn it is."""
        while not self._count:
            self._filled = anyio.Event()
            await self._filled.wait()

        peer, requests = self._peers.popitem(last=False)
        request = requests.popleft()
        if requests:
            self._peers[peer] = requests
        self._count -= 1
        self.bytes -= len(request.data)
        return request
