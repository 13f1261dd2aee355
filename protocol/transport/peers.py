"""What a server remembers of its peers: bounded, whatever connects."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

MAX_PEERS = 4096
REFUSAL_BURST = 8
REFUSALS_PER_S = 1.0


@dataclass
class _Peer:
    last_seen: float
    refusals_left: float
    refilled_at: float


class Peers:
    """Signs of life and refusal budgets by routing ID.

    Beyond `bound` peers, the one that was silent longest is forgotten (not dropped).
    """

    def __init__(
        self, *, bound: int = MAX_PEERS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bound = bound
        self._clock = clock
        self._peers: OrderedDict[bytes, _Peer] = OrderedDict()
        self._gone: deque[bytes] = deque(maxlen=bound)

    def seen(self, peer: bytes) -> None:
        """Record a sign of life."""
        now = self._clock()
        known = self._peers.get(peer)
        if known is None:
            self._peers[peer] = _Peer(now, REFUSAL_BURST, now)
            if len(self._peers) > self._bound:
                self._peers.popitem(last=False)
        else:
            known.last_seen = now
            self._peers.move_to_end(peer)

    def last_seen(self, peer: bytes) -> float | None:
        """Clock of the newest sign of life; None if unknown."""
        known = self._peers.get(peer)
        return None if known is None else known.last_seen

    def drop(self, peer: bytes) -> None:
        """Forget a peer and report it in `take_gone`, once."""
        if self._peers.pop(peer, None) is not None:
            self._gone.append(peer)

    def take_gone(self) -> list[bytes]:
        """Peers dropped since the last call."""
        gone = list(self._gone)
        self._gone.clear()
        return gone

    def may_refuse(self, peer: bytes) -> bool:
        """Spend one refusal of the peer's budget: a burst of 8, then one a second."""
        known = self._peers.get(peer)
        if known is None:
            return False
        now = self._clock()
        refill = (now - known.refilled_at) * REFUSALS_PER_S
        known.refusals_left = min(REFUSAL_BURST, known.refusals_left + refill)
        known.refilled_at = now
        if known.refusals_left < 1:
            return False
        known.refusals_left -= 1
        return True
