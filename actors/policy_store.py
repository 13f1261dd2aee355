"""Which snapshot to fetch and which to put in force: announced, on its way, here."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.messages.messages import Policy

log = logging.getLogger("pippin.actor")

RETRY_S = 1.0


@dataclass
class PolicyStore:
    """Policies newer than the one in force. One is fetched at a time; `wants` is the engine's."""

    wants: Callable[[int], bool]
    _announced: dict[int, Policy] = field(default_factory=dict)
    _fetching: Policy | None = None
    _here: tuple[Policy, bytes] | None = None
    _not_before: float = 0.0

    def announce(self, policy: Policy) -> None:
        """Note a policy that can be fetched."""
        self._announced[policy.version] = policy

    def next_fetch(self, now: float) -> Policy | None:
        """Return the newest policy that the engine would take, if it must be fetched now."""
        if self._fetching is not None or now < self._not_before:
            return None
        wanted = max((v for v in self._announced if self.wants(v)), default=None)
        if wanted is None or (self._here is not None and self._here[0].version == wanted):
            return None
        self._fetching = self._announced[wanted]
        return self._fetching

    def arrived(self, policy: Policy, source: bytes) -> None:
        """Keep a fetched snapshot until the engine takes it."""
        if policy == self._fetching:
            self._fetching = None
            self._here = (policy, source)

    def failed(self, policy: Policy, reason: str, now: float) -> None:
        """Give up a snapshot that a newer one supersedes; otherwise try again soon."""
        if policy != self._fetching:
            return
        self._fetching = None
        self._not_before = now + RETRY_S
        if max(self._announced) > policy.version:
            self._announced.pop(policy.version, None)
        else:
            log.warning("policy version %d could not be fetched: %s", policy.version, reason)

    def take(self) -> tuple[Policy, bytes] | None:
        """Return the snapshot to put in force now, once, if there is one."""
        if self._here is None or not self.wants(self._here[0].version):
            return None
        here, self._here = self._here, None
        version = here[0].version
        self._announced = {v: p for v, p in self._announced.items() if v > version}
        return here

    def reset(self) -> None:
        """Forget everything: another learner's versions begin anew."""
        self._announced.clear()
        self._fetching = self._here = None
        self._not_before = 0.0
