"""What a run writes as it goes: `metrics.jsonl` and `rollouts.jsonl`, one object a line."""

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec


class Records:
    """Appends to the run folder; each line is written whole and flushed.

    `started_at` is Unix time, so that `time_s` goes on where an earlier incarnation ended.
    """

    def __init__(self, folder: Path, started_at: float) -> None:
        self.folder = folder
        self.started_at = started_at
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            mend(folder / name)

    def metrics(self, step: int, values: Mapping[str, object]) -> None:
        """Append one line of metrics; numbers that are not finite become null."""
        line = {"step": step, "time_s": round(time.time() - self.started_at, 3)}
        self._append("metrics.jsonl", [{**line, **{k: _finite(v) for k, v in values.items()}}])

    def rollouts(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append groups: what was sampled, by which policy, and what it was worth."""
        self._append("rollouts.jsonl", lines)

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        with (self.folder / name).open("ab") as file:
            for line in lines:
                file.write(msgspec.json.encode(line, enc_hook=str) + b"\n")


def mend(path: Path) -> None:
    """Cut off a last line that a killed writer left unfinished, so that the next is not spoilt."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
