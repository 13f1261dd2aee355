"""The display of a running run, fed by the learner's metrics.jsonl and by its log.

On a terminal a panel (rich) that is drawn again as lines arrive; elsewhere one line a step.
"""

import sys
import time
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import anyio
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from launch.processes.log_ending import LogTail
from launch.run_folder.tail import Tail, number

POLL_S = 0.5
BLOCKS = "▁▂▃▄▅▆▇█"
BRIEF = (
    "loss",
    "reward",
    "eval/reward",
    "eval/loss",
    "rewards/accuracies",
    "rewards/margins",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "staleness/mean",
    "completions/mean_length",
    "step_time",
)
PREFERENCES = ("rewards/accuracies", "rewards/margins")
UNITS = {"step_time": " s"}
EVALUATING = "evaluating step "  # as the learner logs it
HELD_OUT = ("eval/reward", "eval/rewards/accuracies", "eval/loss")  # the first that is there


def sparkline(values: list[float], width: int = 48) -> str:
    """Draw values as blocks from their least to their greatest, at most `width` of them.

    Longer series are averaged over equal stretches.
    """
    if not values:
        return ""
    if len(values) > width:
        cuts = [i * len(values) // width for i in range(width + 1)]
        parts = [values[a:b] for a, b in pairwise(cuts)]
        values = [sum(part) / len(part) for part in parts]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in values)


def duration(seconds: float) -> str:
    """Write seconds as `m:ss` or `h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """Follows a run folder and shows it; with `max_steps` -1 the learner says how many there are.

    What it logs is shown as it is written.
    """

    def __init__(self, folder: Path, *, max_steps: int = -1, out: TextIO | None = None) -> None:
        self._tail = Tail(folder / "metrics.jsonl")
        self._log = LogTail(folder / "logs" / "learner.log")
        self._folder = folder
        self._max_steps = max_steps
        self._console = Console(file=out or sys.stdout, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._latest: dict[str, Any] = {}
        self._rewards: list[float] = []
        self._evals: list[float] = []
        self._eval_name = "eval"
        self._times: list[tuple[float, float]] = []
        self._asked = self._evaluated = -1  # the newest steps whose evaluation began, and ended
        self._said = -1  # the newest whose evaluation was shown as a line

    def __enter__(self) -> "Progress":
        self.say(f"run: {self._folder}")
        self._tail.read()  # what an earlier incarnation wrote was shown then
        (self._folder / "total_steps").unlink(missing_ok=True)
        if self._console.is_terminal:
            self._live = Live(self._panel(), console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.update()
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Show an event, above the panel on a terminal."""
        self._console.print(Text(text))

    async def follow(self) -> None:
        """Show what is new until cancelled."""
        while True:
            self.update()
            await anyio.sleep(POLL_S)

    def update(self) -> None:
        """Take in and show what was written since the last call."""
        for message in self._log.read():
            if message.startswith(EVALUATING):
                self._asked = int(message.removeprefix(EVALUATING))
            else:
                self.say(message)
        for line in self._tail.read():
            self._learn_total()
            self._take(line)
            if self._live is None:
                self.say(self.line(line))
        if self._live is not None:
            self._live.update(self._panel(), refresh=True)
        elif self._asked > max(self._evaluated, self._said):
            self._said = self._asked
            self.say(f"{EVALUATING}{self._said}")

    def _learn_total(self) -> None:
        path = self._folder / "total_steps"
        if self._max_steps < 1 and path.exists():
            self._max_steps = int(path.read_text())

    def _take(self, line: dict[str, Any]) -> None:
        self._latest.update({key: value for key, value in line.items() if value is not None})
        reward = number(line, "reward")
        curve = number(line, "loss") if reward is None else reward
        self._rewards += [] if curve is None else [curve]
        held_out = [(key, value) for key in HELD_OUT if (value := number(line, key)) is not None]
        for self._eval_name, value in held_out[:1]:
            self._evals.append(value)
        step, seconds = number(line, "step"), number(line, "time_s")
        if step is not None and any(key.startswith("eval/") for key in line):
            self._evaluated = max(self._evaluated, round(step))
        if step is not None and seconds is not None:
            self._times.append((step, seconds))

    def line(self, line: dict[str, Any]) -> str:
        """Return one line for one record."""
        known = [name for name in BRIEF if number(line, name) is not None]
        known += [name for name in line if name.endswith("tokens_per_s")]
        parts = [f"{name} {number(line, name) or 0.0:.4g}{UNITS.get(name, '')}" for name in known]
        left = self.time_left()
        parts += [f"left {duration(left)}"] if left is not None else []
        total = f"/{self._max_steps}" if self._max_steps > 0 else ""
        return f"step {line.get('step', '?')}{total}  " + "  ".join(parts)

    def time_left(self) -> float | None:
        """Seconds to the last step at the pace so far, or None after it or where none is known."""
        if self._max_steps < 1 or len(self._times) < 2:
            return None
        (first, began), (last, now) = self._times[0], self._times[-1]
        if last <= first or last >= self._max_steps:
            return None
        return (now - began) / (last - first) * (self._max_steps - last)

    def _panel(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        total = self._max_steps if self._max_steps > 0 else "?"
        table.add_row("step", f"{self._latest.get('step', '-')} of {total}")
        table.add_row("reward" if "reward" in self._latest else "loss", self._curve(self._rewards))
        table.add_row(self._eval_name, self._curve(self._evals))
        shown = ("tokens_per_s", "staleness/mean", "staleness/max", *PREFERENCES)
        for name, value in sorted(self._latest.items()):
            if name.endswith(shown) or name.startswith("queue/"):
                table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        left = self.time_left()
        now = [duration(left)] if left is not None else []
        now += [f"{EVALUATING}{self._asked}"] if self._asked > self._evaluated else []
        table.add_row("time left", ", ".join(now) or "-")
        return Panel(table, title=self._folder.name, subtitle=time.strftime("%H:%M:%S"))

    def _curve(self, values: list[float]) -> str:
        return f"{sparkline(values)} {values[-1]:.4g}" if values else "-"
