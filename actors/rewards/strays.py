"""Ends what reward functions started, in whatever session it runs: by a mark in its environment.

A worker gets `MARK` in its environment, with a value of its own, and everything that it starts
inherits it. Run as a program, this file is the guard of a worker: when the pipe on its standard
input closes, it ends all of them and its own process group. It imports nothing of ours, and so
starts at once.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MARK = "PIPPIN_REWARD_WORKER"
ROUNDS = 20  # of looking for what was started meanwhile


def end_marked(mark: str, group: int) -> list[str]:
    """Kill every process with this mark but our own.

    Return those outside the worker's process group, each as its ID and command.
    """
    strays: dict[int, str] = {}
    for _ in range(ROUNDS):
        found = [pid for pid in _marked(mark) if pid != os.getpid()]
        if not found:
            break
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) != group and pid not in strays:
                    strays[pid] = _command(pid)
                os.kill(pid, signal.SIGKILL)
    return [f"{pid} ({command})" for pid, command in strays.items()]


def _marked(mark: str) -> Iterator[int]:
    """Find the processes with this mark; one that cleared its environment has none."""
    entry = f"{MARK}={mark}"
    if not Path("/proc/self/environ").exists():  # macOS
        listing = _output("ps", "-A", "-E", "-ww", "-o", "pid=,command=")
        yield from (int(line.split()[0]) for line in listing.splitlines() if entry in line)
        return

    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if entry.encode() in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def _command(pid: int) -> str:
    return _output("ps", "-ww", "-o", "command=", "-p", str(pid)).strip()[:200] or "ended"


def _output(*command: str) -> str:
    with suppress(OSError):  # without ps
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return ""


if __name__ == "__main__":
    while os.read(sys.stdin.fileno(), 4096):
        pass
    end_marked(os.environ[MARK], os.getpgrp())
    os.killpg(0, signal.SIGKILL)
