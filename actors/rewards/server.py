"""Serves reward functions over ZMQ: this process holds the socket, a worker process runs user code.

A function that hangs is cut off after the request's `timeout_s` by killing the worker, whatever it
blocks in; a new worker runs the functions that were still to come. protocol/REWARDS.md has the
wire: every request is answered at once, with its rewards, a refusal or word of its progress.
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import anyio
import msgspec
import zmq

from actors.rewards.function_worker import Job, Note
from actors.rewards.process import WorkerDied, WorkerProcess
from actors.rewards.queue import FairQueue, Waiting
from protocol.messages.rewards import (
    REWARD_PROTOCOL_VERSION,
    RewardFault,
    RewardMessage,
    ScoreProgress,
    ScoreRefusal,
    ScoreReply,
    ScoreRequest,
)
from protocol.transport import endpoints
from protocol.transport.curve_keys import load_server_keys

log = logging.getLogger("pippin.rewards")

MAX_REQUEST_BYTES = 32 << 20
MAX_QUEUED = 256
MAX_QUEUED_BYTES = 256 << 20
MAX_REMEMBERED = 256  # replies kept for a request that is sent again
MAX_REMEMBERED_BYTES = 64 << 20
MAX_TIMEOUT_S = 86_400.0
MAX_DEATHS = 2  # of the worker while a function runs, before the function is blamed
MAX_SHOWN = 1000


@dataclass
class _Answer:
    """What came back so far, by function index."""

    outcomes: dict[int, Note] = field(default_factory=dict)
    faults: dict[int, RewardFault] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)

    def missing(self, count: int) -> list[int]:
        return [i for i in range(count) if i not in self.outcomes and i not in self.faults]


class _Remembered:
    """The last replies, bounded in number and bytes."""

    def __init__(self) -> None:
        self._replies: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def get(self, request_id: str) -> bytes | None:
        return self._replies.get(request_id)

    def add(self, request_id: str, reply: bytes) -> None:
        self._replies[request_id] = reply
        self._bytes += len(reply)
        while len(self._replies) > MAX_REMEMBERED or self._bytes > MAX_REMEMBERED_BYTES:
            self._bytes -= len(self._replies.popitem(last=False)[1])


class RewardServer:
    """A ROUTER bound to `endpoint`; use as an async context manager, then `run`.

    One request is scored at a time and peers take turns. `max_queued` requests wait; the next are
    refused, to be sent again later. `refusals` counts by kind.
    """

    def __init__(
        self,
        functions: Sequence[str],
        endpoint: str,
        *,
        keys: str | Path | None = None,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        self.endpoint = endpoint
        self.refusals: Counter[str] = Counter()
        self._keys = keys
        self._worker = WorkerProcess(functions)
        self._shown: set[tuple[str, str]] = set()
        self._queue = FairQueue(max_queued, MAX_QUEUED_BYTES)
        self._done = _Remembered()
        self._askers: dict[str, bytes] = {}  # who is to have the reply, by request
        self._current = ""
        self._running: list[int] = []  # functions under way, by index
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Load the functions and bind; raise RewardError or ChannelError."""
        endpoints.check_endpoint(self.endpoint, keys=self._keys is not None)
        keys = load_server_keys(self._keys) if self._keys is not None else None
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._worker.kill)
            await self._worker.ensure()
            self._socket = stack.enter_context(endpoints.open_socket(zmq.ROUTER, keys))
            endpoints.set_limits(
                self._socket, max_message_bytes=MAX_REQUEST_BYTES, outbox_bound=MAX_QUEUED
            )
            self.endpoint = endpoints.bind_all(self._socket, [self.endpoint], keys)[0]
            self._resources = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the socket and end the worker."""
        await self._resources.aclose()

    @property
    def names(self) -> list[str]:
        """The functions' names, in order."""
        return self._worker.names

    @property
    def worker_pid(self) -> int | None:
        """The process ID of the worker, which a function may change by hanging."""
        return self._worker.pid

    async def run(self) -> None:
        """Serve until cancelled; raise RewardError where the functions no longer load."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._work)
            while True:
                peer, *frames = await self._socket.recv_multipart()
                self._take(peer, b"".join(frames[-1:]))

    def _take(self, peer: bytes, data: bytes) -> None:
        """Queue a request or refuse it; answer one that is known already."""
        if len(data) > MAX_REQUEST_BYTES:
            reason = f"a request has at most {MAX_REQUEST_BYTES} bytes, got {len(data)}"
            return self._refuse(peer, "oversized", reason)
        try:
            request = msgspec.json.decode(data, type=ScoreRequest)
            data = msgspec.json.encode(request)  # on one line, for the worker
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            return self._refuse(peer, "undecodable", f"not a ScoreRequest: {error}")
        version = request.reward_protocol_version
        if version != REWARD_PROTOCOL_VERSION:
            reason = f"this server speaks reward protocol {REWARD_PROTOCOL_VERSION}, got {version}"
            return self._refuse(peer, "version", reason, request.id)
        if fault := _misfit(request):
            return self._refuse(peer, "invalid", fault, request.id)
        if reply := self._done.get(request.id):
            endpoints.send_now(self._socket, [peer, reply])
            return None
        if not request.completions:
            return self._send(peer, self._reply(request.id, 0, _Answer(), 0.0))
        if request.id not in self._askers:
            waiting = Waiting(request.id, len(request.completions), request.timeout_s, data)
            if not self._queue.put(peer, waiting):
                reason = f"{len(self._queue)} requests wait already ({self._queue.bytes} bytes)"
                return self._refuse(peer, "full", reason, request.id, retry=True)
        self._askers[request.id] = peer
        ahead = 0 if request.id == self._current else len(self._queue)
        return self._send(peer, ScoreProgress(id=request.id, ahead=ahead))

    def _refuse(
        self, peer: bytes, kind: str, reason: str, request_id: str = "", *, retry: bool = False
    ) -> None:
        self.refusals[kind] += 1
        self._send(peer, ScoreRefusal(id=request_id, reason=reason[:500], retry=retry))

    def _send(self, peer: bytes, message: RewardMessage) -> None:
        endpoints.send_now(self._socket, [peer, msgspec.json.encode(message)])

    async def _work(self) -> None:
        while True:
            request = await self._queue.get()
            self._current = request.id
            started = time.perf_counter()
            answer = await self._score(request)
            elapsed_s = time.perf_counter() - started
            reply = msgspec.json.encode(self._reply(request.id, request.count, answer, elapsed_s))
            self._done.add(request.id, reply)
            self._current = ""
            endpoints.send_now(self._socket, [self._askers.pop(request.id), reply])
            await self._worker.ensure()  # before the next request needs it

    async def _score(self, request: Waiting) -> _Answer:
        """Run every function; after a time-out or death, the rest in a fresh worker."""
        answer = _Answer()
        while missing := answer.missing(len(self.names)):
            self._running = []
            try:
                await self._worker.ensure()
                await self._listen(request, missing, answer)
                continue
            except WorkerDied:
                # Killed from outside, perhaps: a function is blamed when it happens again.
                ended = self._running or missing
                answer.deaths.update(ended)
                blamed = [i for i in ended if answer.deaths[i] >= MAX_DEATHS]
                self._blame(answer, blamed, "died", f"the process that ran it ended {MAX_DEATHS} x")
            except TimeoutError:
                message = f"no answer within {request.timeout_s:g} s; its process was killed"
                self._blame(answer, self._running or missing[:1], "timeout", message)
            await self._worker.kill()
        return answer

    async def _listen(self, request: Waiting, asked: list[int], answer: _Answer) -> None:
        """Collect outcomes until all are there; each function has `timeout_s`, or TimeoutError."""
        with anyio.fail_after(request.timeout_s):
            await self._worker.tell(Job(msgspec.Raw(request.data), asked))
        done = False
        while not done:
            with anyio.fail_after(request.timeout_s):
                done = await self._hear(asked, answer)

    async def _hear(self, asked: list[int], answer: _Answer) -> bool:
        """Listen until a function starts (False) or all have ended (True)."""
        while True:
            note = await self._worker.hear()
            if note.kind == "done":
                return True
            if note.kind == "started":
                left = [i for i in asked if i not in answer.outcomes and i not in answer.faults]
                self._running = left if note.index == -1 else [note.index]
                return False
            answer.outcomes[note.index] = note
            self._running = [i for i in self._running if i != note.index]
            if note.fault is not None:
                self._show(note.fault, note.where, note.traceback)

    def _blame(
        self, answer: _Answer, blamed: list[int], kind: Literal["died", "timeout"], message: str
    ) -> None:
        for index in blamed:
            fault = RewardFault(function=self.names[index], kind=kind, message=message)
            answer.faults[index] = fault
            self._show(fault)

    def _show(self, fault: RewardFault, where: str = "", traceback: str = "") -> None:
        """Log a fault in full the first time that its kind is seen."""
        key = (fault.function, f"{fault.kind} {where}")
        if key not in self._shown and len(self._shown) < MAX_SHOWN:
            self._shown.add(key)
            text = traceback or fault.message
            log.error("reward %s: %s: %s", fault.function, fault.kind, text)

    def _reply(self, request_id: str, count: int, answer: _Answer, elapsed_s: float) -> ScoreReply:
        notes = [answer.outcomes.get(index, _SILENT) for index in range(len(self.names))]
        faults = [answer.faults.get(index) or note.fault for index, note in enumerate(notes)]
        extra: dict[str, list[object]] = {}
        metrics: dict[str, list[float]] = {}
        for note in notes:
            for column, values in note.log_extra.items():
                extra.setdefault(column, []).extend(values)
            for name, numbers in note.log_metric.items():
                metrics.setdefault(name, []).extend(numbers)
        return ScoreReply(
            id=request_id,
            names=self.names,
            rewards=[n.rewards if n.rewards is not None else [None] * count for n in notes],
            log_extra=extra,
            log_metric={name: sum(numbers) / len(numbers) for name, numbers in metrics.items()},
            faults=[fault for fault in faults if fault is not None],
            elapsed_s=elapsed_s,
        )


_SILENT = Note("outcome")


def _misfit(request: ScoreRequest) -> str:
    """Say what is wrong with a request that could be read, or nothing."""
    count = len(request.completions)
    lengths = {"prompts": len(request.prompts), "completion_ids": len(request.completion_ids)}
    lengths |= {f"columns.{name}": len(values) for name, values in request.columns.items()}
    wrong = [f"{name} has {n}" for name, n in lengths.items() if n != count]
    if wrong:
        return f"completions has {count} entries, but {', '.join(wrong)}; all must agree"
    if 0 < request.timeout_s <= MAX_TIMEOUT_S:
        return ""
    return f"timeout_s must be above 0 and at most {MAX_TIMEOUT_S:g}, got {request.timeout_s}"
