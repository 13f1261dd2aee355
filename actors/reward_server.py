"""Serves reward functions over ZMQ: this process holds the socket, a worker process runs user code.

A function that hangs is cut off after the request's `timeout_s` by killing the worker, whatever it
blocks in; a new worker runs the functions that were still to come. See protocol/REWARDS.md for the
wire.
"""

import logging
import signal
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
import anyio.abc
import msgspec
import zmq
from anyio.streams.buffered import BufferedByteReceiveStream

from actors.reward_worker import Job, Note
from protocol import endpoints
from protocol.errors import RewardError
from protocol.keys import load_server_keys
from protocol.messages import (
    REWARD_PROTOCOL_VERSION,
    RewardFault,
    ScoreRefusal,
    ScoreReply,
    ScoreRequest,
)

log = logging.getLogger("pippin.rewards")

MAX_LINE = 64 << 20
QUEUED = 256  # requests waiting; the sender's next are refused
REMEMBERED = 256  # replies kept for a request that is sent again
LOAD_TIMEOUT_S = 300.0
MAX_DEATHS = 3
MAX_SHOWN = 1000


class WorkerDied(Exception):
    """The worker process ended while something was asked of it."""


class WorkerProcess:
    """One worker: started by `start`, killed by `kill`."""

    def __init__(self, functions: Sequence[str]) -> None:
        self._functions = list(functions)
        self._process: anyio.abc.Process | None = None
        self._output: BufferedByteReceiveStream | None = None
        self.names: list[str] = []

    async def start(self) -> None:
        """Start the process and wait until its functions are loaded, or raise RewardError."""
        command = [sys.executable, "-m", "actors.reward_worker", *self._functions]
        process = await anyio.open_process(command, stderr=None, cwd=None)
        if process.stdout is None:
            raise RewardError("the reward worker has no output pipe")
        self._process = process
        self._output = BufferedByteReceiveStream(process.stdout)
        try:
            with anyio.fail_after(LOAD_TIMEOUT_S):
                note = await self.hear()
        except TimeoutError:
            await self.kill()
            raise RewardError(
                f"the reward functions were not imported within {LOAD_TIMEOUT_S:g} s"
            ) from None
        except WorkerDied:
            raise RewardError("importing the reward functions ended their process") from None
        if note.kind == "refused":
            await self.kill()
            raise RewardError(note.message)
        self.names = note.names

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
            line = await self._output.receive_until(b"\n", MAX_LINE)
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError) as error:
            raise WorkerDied from error
        return msgspec.json.decode(line, type=Note)

    async def kill(self) -> None:
        """End the process at once, whatever it is doing."""
        process, self._process, self._output = self._process, None, None
        if process is not None:
            with anyio.CancelScope(shield=True):
                if process.returncode is None:
                    process.send_signal(signal.SIGKILL)
                await process.wait()
                await process.aclose()


@dataclass
class _Answer:
    """What came back so far, by function index."""

    outcomes: dict[int, Note] = field(default_factory=dict)
    faults: dict[int, RewardFault] = field(default_factory=dict)

    def missing(self, count: int) -> list[int]:
        return [i for i in range(count) if i not in self.outcomes and i not in self.faults]


class RewardServer:
    """A ROUTER bound to `endpoint`; use as an async context manager, then `run`.

    Requests are answered once each, in the order in which they came. At most `QUEUED` wait.
    """

    def __init__(
        self, functions: Sequence[str], endpoint: str, *, keys: str | Path | None = None
    ) -> None:
        self.endpoint = endpoint
        self.refusals: Counter[str] = Counter()
        self._keys = keys
        self._worker = WorkerProcess(functions)
        self._shown: set[tuple[str, str]] = set()
        self._done: OrderedDict[str, bytes] = OrderedDict()
        self._busy: set[str] = set()
        self._resources = AsyncExitStack()
        self._running: list[int] = []  # functions under way, by index

    async def __aenter__(self) -> Self:
        """Load the functions and bind; raise RewardError or ChannelError."""
        endpoints.check_endpoint(self.endpoint, keys=self._keys is not None)
        keys = load_server_keys(self._keys) if self._keys is not None else None
        await self._worker.start()
        try:
            async with AsyncExitStack() as stack:
                self._socket = stack.enter_context(endpoints.open_socket(zmq.ROUTER, keys))
                endpoints.set_limits(self._socket, max_message_bytes=MAX_LINE, outbox_bound=QUEUED)
                self.endpoint = endpoints.bind_all(self._socket, [self.endpoint], keys)[0]
                self._resources = stack.pop_all()
        except BaseException:
            await self._worker.kill()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the socket and end the worker."""
        await self._resources.aclose()
        await self._worker.kill()

    @property
    def names(self) -> list[str]:
        """The functions' names, in order."""
        return self._worker.names

    async def run(self) -> None:
        """Serve until cancelled."""
        send, receive = anyio.create_memory_object_stream[tuple[bytes, ScoreRequest]](QUEUED)
        async with anyio.create_task_group() as tasks, send, receive:
            tasks.start_soon(self._work, receive)
            while True:
                peer, *frames = await self._socket.recv_multipart()
                request = self._read(peer, frames)
                if request is None:
                    continue
                try:
                    send.send_nowait((peer, request))
                    self._busy.add(request.id)
                except anyio.WouldBlock:
                    self._refuse(peer, "full", f"{QUEUED} requests wait already", request.id)

    def _read(self, peer: bytes, frames: list[bytes]) -> ScoreRequest | None:
        """Return a request that is to be scored; answer or refuse everything else."""
        try:
            request = msgspec.json.decode(b"".join(frames[-1:]), type=ScoreRequest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._refuse(peer, "undecodable", f"not a ScoreRequest: {error}")
            return None
        if request.reward_protocol_version != REWARD_PROTOCOL_VERSION:
            self._refuse(
                peer,
                "version",
                f"this server speaks reward protocol {REWARD_PROTOCOL_VERSION}, the request is of "
                f"{request.reward_protocol_version}",
                request.id,
            )
            return None
        fault = _misaligned(request)
        if fault:
            self._refuse(peer, "invalid", fault, request.id)
            return None
        if request.id in self._done:
            endpoints.send_now(self._socket, [peer, self._done[request.id]])
            return None
        return None if request.id in self._busy else request

    def _refuse(self, peer: bytes, kind: str, reason: str, request_id: str = "") -> None:
        self.refusals[kind] += 1
        reply = ScoreRefusal(id=request_id, reason=reason[:500])
        endpoints.send_now(self._socket, [peer, msgspec.json.encode(reply)])

    async def _work(
        self, requests: anyio.abc.ObjectReceiveStream[tuple[bytes, ScoreRequest]]
    ) -> None:
        async for peer, request in requests:
            started = time.perf_counter()
            answer = _Answer()
            if request.completions:
                await self._score(request, answer)
            reply = self._reply(request, answer, time.perf_counter() - started)
            data = msgspec.json.encode(reply)
            self._done[request.id] = data
            self._busy.discard(request.id)
            if len(self._done) > REMEMBERED:
                self._done.popitem(last=False)
            endpoints.send_now(self._socket, [peer, data])

    async def _score(self, request: ScoreRequest, answer: _Answer) -> None:
        """Run every function; after a time-out or death, the rest in a fresh worker."""
        count, deaths = len(self.names), 0
        while missing := answer.missing(count):
            self._running = []
            try:
                await self._worker.tell(Job(request, missing))
                await self._listen(request, missing, answer)
                continue
            except WorkerDied:
                deaths += 1
                # Killed from outside before a function ran: nobody's fault, try again.
                blamed = self._running or (missing if deaths > MAX_DEATHS else [])
                self._blame(answer, blamed, "died", "the process that ran it ended")
            except TimeoutError:
                seconds = f"no answer within {request.timeout_s:g} s; its process was killed"
                self._blame(answer, self._running or missing[:1], "timeout", seconds)
            await self._worker.kill()
            await self._worker.start()

    async def _listen(self, request: ScoreRequest, asked: list[int], answer: _Answer) -> None:
        """Collect outcomes until all are there; each function has `timeout_s`, or TimeoutError."""
        while True:
            with anyio.fail_after(request.timeout_s):
                note = await self._hear(asked, answer)
            if note.kind == "done":
                return

    async def _hear(self, asked: list[int], answer: _Answer) -> Note:
        """Return the next note that restarts the clock."""
        while True:
            note = await self._worker.hear()
            if note.kind == "started":
                left = [i for i in asked if i not in answer.outcomes and i not in answer.faults]
                self._running = left if note.index == -1 else [note.index]
                return note
            if note.kind == "done":
                return note
            answer.outcomes[note.index] = note
            self._running = [i for i in self._running if i != note.index]
            if note.fault is not None:
                self._show(note.fault, note.where, note.traceback)

    def _blame(self, answer: _Answer, running: list[int], kind: str, message: str) -> None:
        for index in running:
            fault = msgspec.convert(
                {"function": self.names[index], "kind": kind, "message": message}, RewardFault
            )
            answer.faults[index] = fault
            self._show(fault)

    def _show(self, fault: RewardFault, where: str = "", traceback: str = "") -> None:
        """Log a fault in full the first time that its kind is seen."""
        key = (fault.function, f"{fault.kind} {where}")
        if key not in self._shown and len(self._shown) < MAX_SHOWN:
            self._shown.add(key)
            text = traceback or fault.message
            log.error("reward %s: %s: %s", fault.function, fault.kind, text)

    def _reply(self, request: ScoreRequest, answer: _Answer, elapsed_s: float) -> ScoreReply:
        count = len(request.completions)
        rewards: list[list[float | None]] = []
        faults: list[RewardFault] = []
        extra: dict[str, list[object]] = {}
        metrics: dict[str, float] = {}
        for index in range(len(self.names)):
            note = answer.outcomes.get(index)
            fault = answer.faults.get(index) or (note.fault if note is not None else None)
            if fault is not None:
                faults.append(fault)
            given = note.rewards if note is not None and fault is None else None
            rewards.append(given if given is not None else [None] * count)
            if note is not None:
                extra |= note.log_extra
                metrics |= note.log_metric
        return ScoreReply(
            id=request.id,
            names=self.names,
            rewards=rewards,
            log_extra=extra,
            log_metric=metrics,
            faults=faults,
            elapsed_s=elapsed_s,
        )


def _misaligned(request: ScoreRequest) -> str:
    count = len(request.completions)
    lengths = {"prompts": len(request.prompts), "completion_ids": len(request.completion_ids)}
    lengths |= {f"columns.{name}": len(values) for name, values in request.columns.items()}
    wrong = [f"{name} has {n}" for name, n in lengths.items() if n != count]
    if wrong:
        return f"completions has {count} entries, but {', '.join(wrong)}; all must agree"
    return "" if request.timeout_s > 0 else "timeout_s must be above 0"
