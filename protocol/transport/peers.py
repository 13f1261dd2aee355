"""What a server remembers of its peers: bounded however many connect."""

import time
from collections import OrderedDict, deque
from dataclasses import dataclass

MAX_PEERS = 4096
REFUSAL_BURST = 8
REFUSALS_PER_S = 1.0
LEAVE_S = 1.0


@dataclass
class _RefusalBudget:
    left: float
    refilled_at: float
    shut_at: float = float("inf")


class PeerTable:
    """Known peers by routing ID, each with a budget of refusals, so that no peer is flooded.

    Beyond `MAX_PEERS`, the one that was silent longest is forgotten, but not reported as gone.
    """

    def __init__(self) -> None:
        self._budgets: OrderedDict[bytes, _RefusalBudget] = OrderedDict()
        self._gone: deque[bytes] = deque(maxlen=MAX_PEERS)

    def seen(self, peer: bytes) -> None:
        """Note that bytes came from a peer."""
        if peer in self._budgets:
            self._budgets.move_to_end(peer)
            return

        self._budgets[peer] = _RefusalBudget(REFUSAL_BURST, time.monotonic())
        if len(self._budgets) > MAX_PEERS:
            self._budgets.popitem(last=False)

    def shut(self, peer: bytes) -> None:
        """Note that a peer was told that it is not wanted; it has `LEAVE_S` to hear of it."""
        if peer in self._budgets:
            budget = self._budgets[peer]
            budget.shut_at = min(budget.shut_at, time.monotonic() + LEAVE_S)

    def is_shut(self, peer: bytes) -> bool:
        """Whether the peer should have left by now."""
        return peer in self._budgets and time.monotonic() >= self._budgets[peer].shut_at

    def drop(self, peer: bytes) -> None:
        """Forget a peer and report it in `take_gone`, once."""
        if self._budgets.pop(peer, None) is not None:
            self._gone.append(peer)

    def take_gone(self) -> list[bytes]:
        """Return the peers dropped since the last call."""
        gone = list(self._gone)
        self._gone.clear()
        return gone

    def may_refuse(self, peer: bytes) -> bool:
        """Spend one refusal of the peer's budget: a burst of 8, then one per second."""
        budget = self._budgets.get(peer)
        if budget is None:
            return False

        now = time.monotonic()
        refill = (now - budget.refilled_at) * REFUSALS_PER_S
        budget.left = min(REFUSAL_BURST, budget.left + refill)
        budget.refilled_at = now

        if budget.left < 1:
            return False
        budget.left -= 1
        return True
