"""Times the stages from a process's start to its first result, for the event that shows them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.run_record import StartUp


@dataclass
class Stages:
    """A stopwatch of stages, each of which begins where the one before it ended."""

    process: str
    clock: Callable[[], float] = time.monotonic
    parts: dict[str, float] = field(default_factory=dict[str, float])
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def done(self, name: str, ago_s: float = 0.0) -> None:
        """Note that stage `name` has ended, `ago_s` seconds ago."""
        ended = max(self._since, self.clock() - ago_s)
        self.parts[name] = self.parts.get(name, 0.0) + ended - self._since
        self._since = ended

    def event(self) -> StartUp:
        """Return the event that says what took how long."""
        parts = {name: round(seconds, 3) for name, seconds in self.parts.items()}
        return StartUp(process=self.process, parts=parts)
