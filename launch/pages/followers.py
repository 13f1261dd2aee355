"""What follows a run while it grows: the display, and sinks that write its metrics elsewhere.

To add a sink, write a `Follower` whose `take` passes each line on, and list it in `SINKS`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import anyio

from launch.run_folder.tail import EventTail, JsonTail
from protocol.run_record import AnyEvent

POLL_S = 0.5


class Follower:
    """Reads what is added to a run's `metrics.jsonl` and `events.jsonl` after it was entered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = JsonTail(folder / "metrics.jsonl")
        self._events = EventTail(folder)

    def __enter__(self) -> Self:
        self._metrics.read()  # written by an earlier learner, and shown then
        return self

    def __exit__(self, *_: object) -> None:
        self.update()

    async def follow(self) -> None:
        """Update until cancelled."""
        while True:
            self.update()
            await anyio.sleep(POLL_S)

    def update(self) -> None:
        """Take in what was written since the last call."""
        # Metrics are read first but taken last: whatever was recorded before them comes before.
        lines = self._metrics.read()
        for event in self._events.read():
            self.hear(event)
        for line in lines:
            self.take(line)

    def take(self, line: dict[str, Any]) -> None:
        """Take one line of metrics: `step`, `time_s` and figures by name."""

    def hear(self, event: AnyEvent) -> None:
        """Take one event."""


SINKS: tuple[Callable[[Path], Follower], ...] = ()  # called with the run folder, for every run
