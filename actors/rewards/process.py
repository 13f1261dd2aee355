"""A reward server's worker process: started, talked to, and killed with all that it started.

The worker leads a process group. Two things end the group: `kill`, and the end of a pipe that this
process alone holds open, so that nothing outlives a server that is killed (`reward_worker.py` has
the other end guarded by a process that user code cannot block).
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import anyio
import anyio.abc
import msgspec
from anyio.streams.buffered import BufferedByteReceiveStream

from actors.rewards.function_worker import MAX_LINE, Job, Note
from protocol.errors import RewardError

LOAD_TIMEOUT_S = 300.0
MAX_STARTS = 3


class WorkerDied(Exception):
    """The worker process ended, or said what cannot be read, while something was asked of it."""


class WorkerProcess:
    """One worker at a time: `ensure` starts it where none runs, `kill` ends it."""

    def __init__(self, functions: Sequence[str]) -> None:
        self._functions = list(functions)
        self._process: anyio.abc.Process | None = None
        self._output: BufferedByteReceiveStream | None = None
        self._lifeline = -1
        self.names: list[str] = []

    @property
    def pid(self) -> int | None:
        """The worker's process ID, which is its group's too."""
        return None if self._process is None else self._process.pid

    async def ensure(self) -> None:
        """Have a worker with its functions loaded, or raise RewardError."""
        if self._process is not None and self._process.returncode is None:
            return
        for _ in range(MAX_STARTS):
            await self.kill()
            try:
                await self._start()
            except WorkerDied:
                continue
            return
        await self.kill()
        raise RewardError(
            f"importing {', '.join(self._functions)} ended the process that did it, {MAX_STARTS} "
            "times; see what it printed above"
        )

    async def _start(self) -> None:
        guarded, self._lifeline = os.pipe()
        try:
            with anyio.CancelScope(shield=True):  # a process half started could not be killed
                await self._open(guarded)
        finally:
            os.close(guarded)
        try:
            with anyio.fail_after(LOAD_TIMEOUT_S):
                note = await self.hear()
        except TimeoutError:
            await self.kill()
            raise RewardError(
                f"the reward functions {', '.join(self._functions)} were not imported within "
                f"{LOAD_TIMEOUT_S:g} s; do slow work at the first call, not at import"
            ) from None
        if note.kind == "refused":
            await self.kill()
            raise RewardError(note.message)
        self.names = note.names

    async def _open(self, guarded: int) -> None:
        command = [
            sys.executable,
            "-m",
            "actors.rewards.function_worker",
            str(guarded),
            *self._functions,
        ]
        process = await anyio.open_process(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
            start_new_session=True,
            pass_fds=[guarded],
        )
        assert process.stdout is not None
        self._process = process
        self._output = BufferedByteReceiveStream(process.stdout)

    async def tell(self, job: Job) -> None:
        """Send a job."""
        if self._process is None or self._process.stdin is None:
            raise WorkerDied
        try:
            await self._process.stdin.send(msgspec.json.encode(job) + b"\n")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise WorkerDied from error

    async def hear(self) -> Note:
        """Wait for the worker's next note."""
        if self._output is None:
            raise WorkerDied
        try:
            return msgspec.json.decode(await self._output.receive_until(b"\n", MAX_LINE), type=Note)
        except (
            anyio.EndOfStream,
            anyio.IncompleteRead,
            anyio.DelimiterNotFound,
            anyio.BrokenResourceError,
            msgspec.MsgspecError,
        ) as error:
            raise WorkerDied from error

    async def kill(self) -> None:
        """End the worker and what it started at once, whatever they are doing."""
        process, self._process, self._output = self._process, None, None
        lifeline, self._lifeline = self._lifeline, -1
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with anyio.CancelScope(shield=True):
                await process.wait()
                await process.aclose()
        if lifeline >= 0:
            os.close(lifeline)
