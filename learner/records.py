"""What a learner writes as it runs: `metrics.jsonl`, `rollouts.jsonl` and its events."""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import msgspec

from learner.full_disk import write_patiently
from protocol.run_record import BLOCK, AnyEvent, cut_partial_line, record_event

log = logging.getLogger("pippin.learner")


class Records:
    """Appends whole lines to the files of a run folder, one JSON object per line.

    Every step is in them once: what a resumed run repeats is first moved to
    `metrics.undone.jsonl` and `rollouts.undone.jsonl`. A full disk is waited for. `started_at` is
    Unix time, so that `time_s` continues where an earlier learner of the same run ended.
    """

    def __init__(self, folder: Path, started_at: float) -> None:
        self.folder = folder
        self.started_at = started_at
        self._unwritten: list[AnyEvent] = []
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            cut_partial_line(folder / name)

    def metrics(self, step: int, values: Mapping[str, object]) -> None:
        """Append one line of metrics; numbers that are not finite become null."""
        line: dict[str, object] = {"step": step, "time_s": round(time.time() - self.started_at, 3)}
        for name, value in values.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            line[name] = value if finite else None
        self._append("metrics.jsonl", [line])

    def rollouts(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append groups: what was sampled, by which policy version, and its rewards."""
        self._append("rollouts.jsonl", lines)

    def event(self, event: AnyEvent) -> None:
        """Append to `events.jsonl`, and log; what a full disk refuses comes with a later event."""
        written = record_event(self.folder, event, self._unwritten)
        self._unwritten = [] if written else [*self._unwritten, event]

    def newest(self) -> tuple[int, int]:
        """Return the newest recorded step, 0 if none is, and the newest evaluated one, or -1."""
        step, evaluated = 0, -1
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return step, evaluated

        with path.open("rb") as file:
            for data in file:
                try:
                    line = msgspec.json.decode(data, type=dict[str, Any])
                except msgspec.DecodeError:  # a power cut leaves anything
                    continue
                if any(key.startswith("eval/") for key in line):
                    evaluated = max(evaluated, int(line["step"]))
                else:
                    step = max(step, int(line["step"]))
        return step, evaluated

    def undo(self, step: int, evaluated: int) -> None:
        """Move aside the lines that came after a checkpoint, which the resumed run writes again.

        `step` is the checkpoint's; `evaluated` the step of the newest evaluation begun by then.
        Raises OSError if the disk is full; then nothing is moved.
        """

        def measured(line: dict[str, Any]) -> bool:
            held_out = any(key.startswith("eval/") for key in line)
            return line["step"] > (evaluated if held_out else step)

        def sampled(line: dict[str, Any]) -> bool:
            if line["kind"] == "eval":
                return line["trained_at"] > evaluated
            return line["trained_at"] >= step  # the version before the step

        for name, undone in (("metrics.jsonl", measured), ("rollouts.jsonl", sampled)):
            moved = move_lines(self.folder / name, undone)
            if moved:
                log.info("%s: %d lines after step %d moved to %s", name, moved, step, _aside(name))

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        data = b"".join(msgspec.json.encode(line, enc_hook=str) + b"\n" for line in lines)
        write_patiently(partial(_append_whole, self.folder / name, data), name)


def _append_whole(path: Path, data: bytes) -> None:
    """Append to a file, all or nothing; raises OSError if the disk does not take it."""
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def move_lines(path: Path, away: Callable[[dict[str, Any]], bool]) -> int:
    """Move the lines for which `away` holds to `<name>.undone.jsonl`, in order; return their count.

    A line that lacks the fields that `away` reads stays. A writer that is killed in between leaves
    the lines in the file, and perhaps in `<name>.undone.jsonl` too; the next call does not add them
    twice.
    """
    if not path.is_file():
        return 0

    moved = 0
    # A run has one learner at a time, so a killed one's temporary files may be overwritten.
    aside = path.with_name(_aside(path.name))
    stay, leave = path.with_name(f".{path.name}"), path.with_name(f".{aside.name}")
    try:
        with path.open("rb") as old, stay.open("wb") as staying, leave.open("wb") as leaving:
            for line in old:
                goes = _holds(away, line)
                moved += goes
                (leaving if goes else staying).write(line)
            _sync(staying)

        if moved:
            _add_once(aside, leave)
            stay.replace(path)
    finally:
        stay.unlink(missing_ok=True)
        leave.unlink(missing_ok=True)
    return moved


def _aside(name: str) -> str:
    return f"{name.removesuffix('.jsonl')}.undone.jsonl"


def _holds(away: Callable[[dict[str, Any]], bool], line: bytes) -> bool:
    try:
        return away(msgspec.json.decode(line, type=dict[str, Any]))
    except (msgspec.MsgspecError, KeyError, TypeError):
        return False


def _add_once(path: Path, added: Path) -> None:
    """Append what `added` holds to a file, unless the file ends with it."""
    with path.open("a+b") as file, added.open("rb") as new:
        start = path.stat().st_size - added.stat().st_size
        file.seek(max(0, start))
        blocks = iter(lambda: new.read(BLOCK), b"")
        if start < 0 or not all(file.read(len(block)) == block for block in blocks):
            new.seek(0)
            shutil.copyfileobj(new, file)
        _sync(file)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
