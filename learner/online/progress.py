"""Whether an actor gets on with its work, judged by what it reports.

An actor that does not is *stalled*: its leases go to others, and it gets none until it shows that
it works again.

| stall | what was seen | what ends it |
|---|---|---|
| loop | no sign of its main thread for `lease_s` | any such sign |
| engine | its main thread turns, but no token of its tasks came for `lease_s` | a token, a group |
| policy | nothing newer was applied for `policy_timeout_s` after an announcement | a newer policy |
| overdue | a lease reached `max_lease_s` | a group |

A group that is being scored or waits for its acknowledgement is nothing that the engine could
advance: while there are only such groups, turns of the main thread are progress.
"""

from dataclasses import dataclass
from typing import Literal

from protocol.messages.messages import Heartbeat

Stall = Literal["loop", "engine", "policy", "overdue"]

# Such an actor keeps working on what it has, because a group of it would show that it works again.
KEEPS_WORK: tuple[Stall, ...] = ("engine", "overdue")

NO_BEAT = Heartbeat(progress=-1)


@dataclass
class ActorProgress:
    """What an actor reported. Times are the caller's `now`.

    `turned_at` is when a heartbeat last said that its main thread turns. `applied` is the newest
    policy that it applied, `behind_since` when a newer one was announced, or when it last applied
    one that was not the newest.
    """

    turned_at: float
    beat: Heartbeat = NO_BEAT
    applied: int = -1
    behind_since: float | None = None
    stall: Stall | None = None

    def heartbeat(self, beat: Heartbeat, now: float) -> bool:
        """Take in a heartbeat; return whether the actor's leases are renewed by it."""
        last, self.beat = self.beat, beat
        turned = beat.progress != last.progress
        sampled = (beat.tokens_sampled, beat.tokens_read) != (last.tokens_sampled, last.tokens_read)
        if turned:
            self.turned_at = now
            self.turned()
        if sampled and self.stall == "engine":
            self.stall = None
        return turned and (sampled or beat.groups_sampling == 0)

    def turned(self) -> None:
        """Note a sign of life of the main thread: only that sends requests, groups and failures."""
        if self.stall == "loop":
            self.stall = None

    def delivered(self) -> None:
        """Note a group that it was asked for."""
        if self.stall in ("engine", "overdue"):
            self.stall = None

    def announced(self, version: int, now: float) -> None:
        """Note that a policy was announced."""
        if version > self.applied and self.behind_since is None:
            self.behind_since = now

    def has_applied(self, version: int, newest: int, now: float) -> None:
        """Note that the actor samples with a policy; `newest` is the newest announced."""
        version = min(version, newest)
        if version <= self.applied:
            return
        self.applied = version
        self.behind_since = now if version < newest else None
        if self.stall == "policy":
            self.stall = None

    def cannot_fetch(self, now: float, policy_timeout_s: float) -> bool:
        """Whether it has been behind the newest policy for too long, with nothing new applied."""
        return self.behind_since is not None and now - self.behind_since > policy_timeout_s

    def expired(self, now: float, lease_s: float, overdue: bool) -> Stall:
        """Return what the end of a lease for want of progress, or by its age, says of the actor."""
        if overdue:
            return "overdue"
        return "engine" if now - self.turned_at < lease_s else "loop"
