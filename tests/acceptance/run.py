"""A run of launch/grpo.py seen from outside: its processes by `ps`, its progress by its records."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from learner.ledger.events import IncarnationBegan, LedgerEvent
from learner.ledger.journal_reader import JournalReader

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.05
STALL_S = 240.0
Json = dict[str, Any]


class CheckFailed(Exception):
    """Something that the run had to show, and did not."""


def check(condition: object, text: str) -> None:
    """Raise `CheckFailed` unless `condition` holds."""
    if not condition:
        raise CheckFailed(text)


def lines(path: Path) -> list[Json]:
    """Return the whole lines of a JSONL file that may still be written."""
    data = path.read_bytes() if path.exists() else b""
    return [msgspec.json.decode(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def ledger_events(run: Path) -> list[Json]:
    """Return the events in a run's journal: {"incarnation", "event"} each, in order."""
    found: list[Json] = []
    incarnation = ""
    for _, entry in JournalReader(run / "journal"):
        if isinstance(entry, IncarnationBegan):
            incarnation = entry.incarnation
        if isinstance(entry, LedgerEvent):
            found.append({"incarnation": incarnation, "event": msgspec.to_builtins(entry)})
    return found


class Launcher:
    """launch/grpo.py as a child; `folder` is its run folder."""

    def __init__(self, folder: Path, flags: Iterable[str]) -> None:
        self.folder = folder
        output = folder.with_name(f"{folder.name}.out")
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "launch/grpo.py", *flags], cwd=ROOT, stdout=file, stderr=file
            )
        self.output = output

    def steps(self) -> list[Json]:
        """Return the metrics of the steps so far."""
        return [line for line in lines(self.folder / "metrics.jsonl") if "loss" in line]

    def events(self) -> list[Json]:
        """Return the ledger's events so far, each with the incarnation that it belongs to."""
        return ledger_events(self.folder)

    def child(self, name: str) -> tuple[int, str] | None:
        """Return (process ID, command) of the live child whose command holds `name`."""
        return next((found for found in self._children() if name in found[1]), None)

    def _children(self) -> list[tuple[int, str]]:
        listing = subprocess.run(
            ["ps", "-axww", "-o", "pid=,ppid=,command="],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        found: list[tuple[int, str]] = []
        for line in listing.splitlines():
            pid, parent, command = line.split(maxsplit=2)
            if int(parent) == self.process.pid and "<defunct>" not in command:
                found.append((int(pid), command))
        return found

    def until(self, ready: Callable[[], object], what: str, *, stall_s: float = STALL_S) -> Any:
        """Wait until `ready` is true and return its value; fails if the launcher ends or stalls."""
        deadline = time.monotonic() + stall_s
        while not (value := ready()):
            check(self.process.poll() is None, f"the run ended before {what}; see {self.output}")
            check(time.monotonic() < deadline, f"no {what} within {stall_s:g} s")
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(POLL_S)
        return value

    def wait(self, limit_s: float) -> int:
        """Return the exit status."""
        return self.process.wait(limit_s)

    def end(self) -> None:
        """Kill what is left of the run, with its children."""
        if self.process.poll() is None:
            for pid, _ in self._children():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()


def resident_mb(pid: int) -> float:
    """Return the memory that a process holds, in MiB; 0 if it is gone."""
    text = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return int(text) / 1024 if text.strip() else 0.0
