"""Tracks announced, in-flight and fetched snapshots: which to fetch, which to apply."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.messages.messages import Policy

log = logging.getLogger("pippin.actor")

RETRY_S = 1.0


@dataclass
class PolicyStore:
    """Policies newer than the engine's. Only the newest is fetched, one at a time.

        announce ──▶ next_fetch ──▶ fetched ──▶ take (the engine applies it)
                         ▲             │
                         └── failed ◀──┘

    `wants` is the engine's `wants_policy`.
    """

    wants: Callable[[int], bool]
    _announced: dict[int, Policy] = field(default_factory=dict[int, Policy])
    _fetching: Policy | None = None
    _fetched: tuple[Policy, bytes] | None = None
    _retry_at: float = 0.0

    def announce(self, policy: Policy) -> None:
        """Note a policy that can be fetched."""
        self._announced[policy.version] = policy

    def next_fetch(self, now: float) -> Policy | None:
        """Return the newest policy that the engine would take, if it should be fetched now."""
        if self._fetching is not None or now < self._retry_at:
            return None

        wanted = max((v for v in self._announced if self.wants(v)), default=None)
        if wanted is None or (self._fetched is not None and self._fetched[0].version == wanted):
            return None

        self._fetching = self._announced[wanted]
        return self._fetching

    def fetched(self, policy: Policy, data: bytes) -> None:
        """Keep a fetched snapshot until the engine takes it."""
        if policy == self._fetching:
            self._fetching = None
            self._fetched = (policy, data)

    def failed(self, policy: Policy, reason: str, now: float) -> None:
        """Retry in a moment, unless a newer snapshot has superseded this one."""
        if policy != self._fetching:
            return

        self._fetching = None
        self._retry_at = now + RETRY_S
        if max(self._announced) > policy.version:
            self._announced.pop(policy.version, None)
        else:
            log.warning("policy version %d could not be fetched: %s", policy.version, reason)

    def take(self) -> tuple[Policy, bytes] | None:
        """Return the snapshot that the engine should apply now, if there is one, and forget it."""
        if self._fetched is None or not self.wants(self._fetched[0].version):
            return None

        taken, self._fetched = self._fetched, None
        version = taken[0].version
        self._announced = {v: p for v, p in self._announced.items() if v > version}
        return taken

    def reset(self) -> None:
        """Forget everything, because a new learner counts versions from 0."""
        self._announced.clear()
        self._fetching = self._fetched = None
        self._retry_at = 0.0
