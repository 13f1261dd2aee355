"""Starts a reward server's worker process, talks to it, and kills it and all that it started.

The worker leads a process group, and its environment marks what leaves the group (`strays.py`). Two
things end them all: `kill`, and the end of a pipe that only this process holds open, so that
nothing outlives a server that is killed. In `function_worker.py`, a process that user code cannot
block watches the other end of the pipe. What the functions print passes through this process
(`printed.py`), so that the log stays bounded.
"""

import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress

import anyio
import anyio.abc
import msgspec
from anyio import to_thread
from anyio.streams.buffered import BufferedByteReceiveStream

from actors.rewards.function_worker import MAX_LINE, ScoreJob, WorkerMessage
from actors.rewards.printed import Relay
from actors.rewards.strays import MARK, end_marked
from protocol.errors import RewardError

log = logging.getLogger("pippin.rewards")

LOAD_TIMEOUT_S = 300.0
MAX_STARTS = 3
LAST_WORDS_S = 1.0
STDERR = 2


class WorkerDied(Exception):
    """The worker process ended, or wrote something unreadable, while it had work."""


class WorkerProcess:
    """One worker at a time: `ensure_running` starts it unless it runs, `kill` ends it."""

    def __init__(self, functions: Sequence[str]) -> None:
        self._functions = list(functions)
        self._process: anyio.abc.Process | None = None
        self._output: BufferedByteReceiveStream | None = None
        self._lifeline = -1
        self._printed: Relay | None = None
        self._mark = uuid.uuid4().hex
        self.names: list[str] = []

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def ensure_running(self) -> None:
        """Start a worker and load its functions, unless one runs; raise RewardError on failure."""
        if self._process is not None and self._process.returncode is None:
            return

        for _ in range(MAX_STARTS):
            await self.kill()
            with suppress(WorkerDied):
                await self._start()
                return

        await self.kill()
        raise RewardError(
            f"importing {', '.join(self._functions)} ended the worker process {MAX_STARTS} times; "
            "see what it printed above"
        )

    async def _start(self) -> None:
        guarded, self._lifeline = os.pipe()
        printed, output = os.pipe()
        self._printed = Relay(printed, STDERR)
        worker = [sys.executable, "-m", "actors.rewards.function_worker"]
        try:
            with anyio.CancelScope(shield=True):  # a half-started process could not be killed
                process = await anyio.open_process(
                    [*worker, str(guarded), *self._functions],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    start_new_session=True,
                    pass_fds=[guarded],
                    env={**os.environ, MARK: self._mark},
                )
                assert process.stdout is not None
                self._process = process
                self._output = BufferedByteReceiveStream(process.stdout)
        finally:
            os.close(guarded)
            os.close(output)

        try:
            with anyio.fail_after(LOAD_TIMEOUT_S):
                message = await self.receive()
        except TimeoutError:
            await self.kill()
            raise RewardError(
                f"the reward functions {', '.join(self._functions)} were not imported within "
                f"{LOAD_TIMEOUT_S:g} s; do slow work at the first call, not at import"
            ) from None

        if message.kind == "refused":
            await self.kill()
            raise RewardError(message.message)
        self.names = message.names

    async def send(self, job: ScoreJob) -> None:
        """Send a job; raise WorkerDied if the worker has ended."""
        if self._process is None or self._process.stdin is None:
            raise WorkerDied
        try:
            await self._process.stdin.send(msgspec.json.encode(job) + b"\n")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise WorkerDied from error

    async def receive(self) -> WorkerMessage:
        """Wait for the worker's next message; raise WorkerDied if none will come."""
        if self._output is None:
            raise WorkerDied
        try:
            line = await self._output.receive_until(b"\n", MAX_LINE)
            return msgspec.json.decode(line, type=WorkerMessage)
        except (
            anyio.EndOfStream,
            anyio.IncompleteRead,
            anyio.DelimiterNotFound,
            anyio.BrokenResourceError,
            msgspec.MsgspecError,
        ) as error:
            raise WorkerDied from error

    async def kill(self) -> None:
        """Kill the worker and everything that it started, whatever they are doing."""
        process, self._process, self._output = self._process, None, None
        lifeline, self._lifeline = self._lifeline, -1
        printed, self._printed = self._printed, None

        strays: list[str] = []
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with anyio.CancelScope(shield=True):
                await process.wait()
                await process.aclose()
                strays = await to_thread.run_sync(end_marked, self._mark, process.pid)
        if lifeline >= 0:
            os.close(lifeline)
        if printed is not None:
            # So that a worker's last words come before what is logged of its end.
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(printed.wait, LAST_WORDS_S)
        if strays:
            log.warning("ended what reward functions had left running: %s", ", ".join(strays))
