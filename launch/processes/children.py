"""Child processes: spawned with a pipe as lifeline, logged to a file, stopped or killed.

A child's standard input is its lifeline (`launch/processes/start.py`): a line asks it to stop, the
end of the pipe means that the launcher is gone. Its output goes to `logs/<name>.log`. Each child
leads its own session, so that Ctrl-C reaches only the launcher and a kill also ends the child's own
children.
"""

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio.abc import Process

from actors.rewards.printed import KEPT_AT_START, shorten
from launch.processes.restarts import NO_RESTARTS, RestartLimit
from launch.processes.start import STOP_TIMEOUT_S

TAIL_BYTES = 262_144  # of a log, in which its ending is looked for
MAX_REASON = 300  # characters of a logged error, in the reason of a restart
# Our processes log `date time LEVEL message`; tracebacks and libraries write other lines.
_ERROR = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ ERROR ")


@dataclass(frozen=True)
class ChildSpec:
    """What to start; `kind` groups interchangeable children: "learner", "actor", "reward server".

    A child that dies is restarted within `restarts`. `environment` is added to ours.
    """

    name: str
    kind: str
    command: Sequence[str]
    restarts: RestartLimit = NO_RESTARTS
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Processes:
    """The processes of a run: one learner, and helpers that can be replaced.

    `required` are the kinds of helper of which at least one must be left; without, the learner is
    asked to stop, and killed after `stop_timeout_s`. `notes` are told to the user when the run
    starts.
    """

    learner: ChildSpec
    helpers: Sequence[ChildSpec] = ()
    required: frozenset[str] = frozenset()
    notes: Sequence[str] = ()
    stop_timeout_s: float = STOP_TIMEOUT_S


@dataclass(frozen=True)
class Child:
    """A running process; its output begins at byte `log_start` of `log`."""

    spec: ChildSpec
    process: Process
    log: Path
    log_start: int

    async def wait(self) -> int:
        """Wait for the end; return the exit status, negative for a signal."""
        return await self.process.wait()

    async def ask_to_stop(self) -> None:
        """Send a line down the lifeline; a child that has ended does not get it."""
        if self.process.stdin is not None:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await self.process.stdin.send(b"stop\n")

    def kill(self) -> None:
        """Kill the child and what it started in its session, whether or not it has ended."""
        # PermissionError: macOS, of a group that has ended but for processes not waited for.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    async def end(self, grace_s: float) -> None:
        """Ask the child to stop, kill it after `grace_s`, and return when it has ended."""
        await self.ask_to_stop()
        with anyio.move_on_after(grace_s):
            await self.wait()
        self.kill()
        await self.wait()

    async def close(self) -> None:
        """Kill the child, if it has not ended, and what it left behind; close the pipe to it."""
        self.kill()
        await self.process.aclose()

    def reason(self, status: int) -> str:
        """Return in a line why the child ended with `status`: with the error that it logged."""
        found = [line for line in self.log_ending().splitlines() if line.strip()]
        if status <= 0 or not found:
            return describe_status(status)
        said = _ERROR.sub("", found[0]) if _ERROR.match(found[0]) else found[-1].strip()
        return f"{describe_status(status)} ({said[:MAX_REASON]})"

    def log_ending(self) -> str:
        """Return what the child's log says of its failure: its last error, or else its end."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self.log_start, size - TAIL_BYTES))
            return ending(file.read().decode("utf-8", errors="replace"))


async def start(spec: ChildSpec, logs: Path) -> Child:
    """Spawn a child; its output is appended to `logs/<name>.log`."""
    await anyio.Path(logs).mkdir(parents=True, exist_ok=True)

    # Appended to: a restarted child's log continues its predecessor's. Read from by reward servers,
    # which shorten it while they run; what they keep is longer than what is there at their start,
    # so that their own ending never lies before `log_start`.
    path = logs / f"{spec.name}.log"
    with path.open("a+b") as log:
        shorten(log.fileno(), KEPT_AT_START)
        log_start = log.seek(0, os.SEEK_END)
        process = await anyio.open_process(
            list(spec.command),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **spec.environment},
            start_new_session=True,
        )
    return Child(spec, process, path, log_start)


def describe_status(status: int) -> str:
    """Say how a process ended: `exit status 1`, `SIGKILL`."""
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def ending(text: str, count: int = 20) -> str:
    """Return at most `count` lines that say why a process failed: from its last ERROR on.

    The middle of a longer message is left out. Without an ERROR, the last lines are returned.
    """
    lines = text.splitlines()
    errors = [index for index, line in enumerate(lines) if _ERROR.match(line)]
    if not errors:
        return "\n".join(lines[-count:])
    return shortened("\n".join(lines[errors[-1] :]), count)


def shortened(text: str, count: int = 20) -> str:
    """Return `text`, without its middle where it has more than `count` lines."""
    lines = text.splitlines()
    if len(lines) <= count:
        return text

    half = count // 2
    return "\n".join([*lines[:half], f"… {len(lines) - 2 * half} lines …", *lines[-half:]])
