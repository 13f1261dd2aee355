"""How often, and after which delay, a process that died is started again: without a clock."""

from dataclasses import dataclass, field

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
HEALTHY_S = 60.0  # a helper that ran for so long had come to its work


@dataclass(frozen=True)
class RestartLimit:
    """At most `count` restarts within `window_s` seconds."""

    count: int = 0
    window_s: float = 3600.0

    def __str__(self) -> str:
        return f"{self.count} restarts within {self.window_s:g} s"


NO_RESTARTS = RestartLimit()


@dataclass
class Restarts:
    """The restarts of one process.

    The delay doubles with each, and starts again at `first_delay_s` once the process has done
    healthy work. Older restarts than the window are forgotten only then, too: a process that gets
    nowhere is given up, however slowly it dies.
    """

    limit: RestartLimit
    first_delay_s: float = FIRST_DELAY_S
    _times: list[float] = field(default_factory=list[float])
    _delay_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._delay_s = self.first_delay_s

    @property
    def count(self) -> int:
        """How many restarts count at present."""
        return len(self._times)

    def died(self, now: float, *, healthy: bool) -> float | None:
        """Note a death at `now`; return the delay before the restart, None if there is none left.

        `healthy`: the process had done its work since its last start.
        """
        if healthy:
            self._times = [time for time in self._times if now - time < self.limit.window_s]
            self._delay_s = self.first_delay_s
        if len(self._times) >= self.limit.count:
            return None

        self._times.append(now)
        delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, LONGEST_DELAY_S)
        return delay_s
