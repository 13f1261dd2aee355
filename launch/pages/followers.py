"""What follows a run while it grows: the display, and sinks that write its metrics elsewhere.

To add a sink, write a `Sink` whose `on_metrics` passes each line on, and list it in `SINKS`.
"""

import sys
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
        self._metrics.skip()  # written by an earlier learner, and shown then
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
            self.on_event(event)
        for line in lines:
            self.on_metrics(line)

    def on_metrics(self, line: dict[str, Any]) -> None:
        """Take one line of metrics: `step`, `time_s` and figures by name."""

    def on_event(self, event: AnyEvent) -> None:
        """Take one event."""


class Sink(Follower):
    """A follower that may fail: the run goes on, and the terminal says once what went wrong."""

    _failed = False

    def update(self) -> None:
        """Take in what was written since the last call, unless an earlier call failed."""
        if self._failed:
            return
        try:
            super().update()
        except Exception as error:  # noqa: BLE001 - whatever a sink raises, the run goes on
            self._failed = True
            sys.stderr.write(f"{type(self).__name__} stopped, the run goes on: {error!r}\n")


SINKS: tuple[type[Sink], ...] = ()  # called with the run folder, for every run
