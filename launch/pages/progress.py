"""The display of a running run: its metrics and events as they are written.

On a terminal, a panel (rich) that is redrawn as lines arrive; elsewhere, one line per step.
"""

import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from launch.pages.followers import Follower
from launch.run_folder.tail import number
from protocol.errors import ConfigError
from protocol.run_record import (
    RUN,
    AnyEvent,
    CheckpointFailed,
    CheckpointSaved,
    EvaluationFinished,
    EvaluationStarted,
    Notice,
    StartUp,
    read_run,
)

BLOCKS = "▁▂▃▄▅▆▇█"
MEMORY = ("memory/peak_gb", "actors/memory_peak_gb")  # of the learner, and of all actors together
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
    *MEMORY,
)
PREFERENCES = ("rewards/accuracies", "rewards/margins")
UNITS = {"step_time": " s"} | dict.fromkeys(MEMORY, " GB")
HELD_OUT = ("eval/reward", "eval/rewards/accuracies", "eval/loss")  # the first found is shown


def sparkline(values: list[float], width: int = 48) -> str:
    """Draw values as blocks between their minimum and maximum, at most `width` of them.

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


class Progress(Follower):
    """Shows a run; where `max_steps` is not positive, the learner says how many steps there are.

    The launcher shows faults and restarts of processes itself, with `say`.
    """

    def __init__(self, folder: Path, *, max_steps: int = -1, out: TextIO | None = None) -> None:
        super().__init__(folder)
        self._max_steps = max_steps
        self._console = Console(file=out or sys.stdout, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._latest: dict[str, Any] = {}
        self._rewards: list[float] = []
        self._evals: list[float] = []
        self._eval_name = "eval"
        self._times: list[tuple[float, float]] = []
        self._evaluating: int | None = None  # the step whose evaluation is under way
        self._announced: int | None = None  # the last such step that was shown as a line

    def __enter__(self) -> Self:
        super().__enter__()
        self.say(f"run: {self.folder}")
        if self._console.is_terminal:
            self._live = Live(self._panel(), console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Show a message, above the panel on a terminal."""
        self._console.print(Text(text))

    def update(self) -> None:
        """Take in and show what was written since the last call."""
        super().update()

        if self._live is not None:
            self._live.update(self._panel(), refresh=True)
        elif self._evaluating not in (None, self._announced):
            self._announced = self._evaluating
            self.say(f"evaluating step {self._evaluating}")

    def on_event(self, event: AnyEvent) -> None:
        """Show notices, times of start, and whether saving fails or works; note evaluations."""
        match event:
            case Notice() | CheckpointFailed() | CheckpointSaved(again=True) | StartUp():
                self.say(event.text)
            case EvaluationStarted():
                self._evaluating = event.step
            case EvaluationFinished():
                self._evaluating = None
            case _:
                pass

    def on_metrics(self, line: dict[str, Any]) -> None:
        """Add a line of metrics to the curves; without a terminal, show it."""
        if self._max_steps < 1 and (self.folder / RUN).exists():
            with suppress(ConfigError):  # damaged: the run goes on, only the total is unknown
                self._max_steps = read_run(self.folder).total_steps or -1

        # Actors may finish an evaluation after later steps, whose line must not set the step back.
        step, seconds = number(line, "step"), number(line, "time_s")
        late = step is not None and bool(self._times) and step < self._times[-1][0]
        kept = {key: value for key, value in line.items() if value is not None}
        self._latest |= {key: value for key, value in kept.items() if key != "step" or not late}
        reward = number(line, "reward")
        curve = number(line, "loss") if reward is None else reward
        self._rewards += [] if curve is None else [curve]
        held_out = [(key, value) for key in HELD_OUT if (value := number(line, key)) is not None]
        for self._eval_name, value in held_out[:1]:
            self._evals.append(value)

        if step is not None and seconds is not None and not late:
            self._times.append((step, seconds))
        if self._live is None:
            self.say(self.line(line))

    def line(self, line: dict[str, Any]) -> str:
        """Return a line of metrics in words."""
        known = [name for name in BRIEF if number(line, name) is not None]
        known += [name for name in line if name.endswith("tokens_per_s")]
        parts = [f"{name} {number(line, name) or 0.0:.4g}{UNITS.get(name, '')}" for name in known]

        left = self.time_left()
        parts += [f"left {duration(left)}"] if left is not None else []
        total = f"/{self._max_steps}" if self._max_steps > 0 else ""
        return f"step {line.get('step', '?')}{total}  " + "  ".join(parts)

    def time_left(self) -> float | None:
        """Return the seconds to the last step at the pace so far, None if unknown or after it."""
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
        shown = ("tokens_per_s", "staleness/mean", "staleness/max", "memory_peak_gb", *PREFERENCES)
        for name, value in sorted(self._latest.items()):
            if name.endswith(shown) or name.startswith(("queue/", "memory/")):
                table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))

        left = self.time_left()
        now = [duration(left)] if left is not None else []
        now += [] if self._evaluating is None else [f"evaluating step {self._evaluating}"]
        table.add_row("time left", ", ".join(now) or "-")
        return Panel(table, title=self.folder.name, subtitle=time.strftime("%H:%M:%S"))

    def _curve(self, values: list[float]) -> str:
        return f"{sparkline(values)} {values[-1]:.4g}" if values else "-"
