"""Serves reward functions over ZMQ: this process holds the socket, a worker process runs user code.

    actors ──ScoreRequest──▶ FairQueue ──▶ WorkerScorer ──▶ worker process (user code)
           ◀──ScoreReply──── reply cache ◀──┘

A function that hangs, in whatever call, is cut off after the request's `timeout_s` by killing the
worker. Every request is answered at once: with its rewards, a refusal, or a report of progress
(protocol/REWARDS.md has the wire).
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import anyio
import msgspec

from actors.rewards.queue import FairQueue, QueuedRequest
from actors.rewards.scoring import Scores, WorkerScorer
from protocol.messages.rewards import (
    REWARD_PROTOCOL_VERSION,
    RewardMessage,
    ScoreProgress,
    ScoreRefusal,
    ScoreRequest,
)
from protocol.transport.bound_socket import bound_socket
from protocol.transport.endpoints import check_endpoint

MAX_REQUEST_BYTES = 32 << 20
MAX_QUEUED = 256
MAX_QUEUED_BYTES = 256 << 20
MAX_CACHED = 256  # replies kept for requests that are sent again
MAX_CACHED_BYTES = 64 << 20
MAX_TIMEOUT_S = 86_400.0


class _ReplyCache:
    """The last replies by request ID, bounded in number and bytes."""

    def __init__(self) -> None:
        self._replies: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def get(self, request_id: str) -> bytes | None:
        return self._replies.get(request_id)

    def add(self, request_id: str, reply: bytes) -> None:
        self._replies[request_id] = reply
        self._bytes += len(reply)
        while len(self._replies) > MAX_CACHED or self._bytes > MAX_CACHED_BYTES:
            self._bytes -= len(self._replies.popitem(last=False)[1])


class RewardServer:
    """A ROUTER bound to `endpoint`; use as an async context manager, then `run`.

    One request is scored at a time, and peers take turns. At most `max_queued` requests wait;
    further ones are refused and may be sent again later. `refusals` counts by kind.
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
        self.scorer = WorkerScorer(functions)
        self._queue = FairQueue(max_queued, MAX_QUEUED_BYTES)
        self._done = _ReplyCache()
        self._askers: dict[str, bytes] = {}  # by request ID, the peer that asked last
        self._current = ""  # the ID of the request that is being scored
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Load the functions and bind; raise RewardError or ChannelError."""
        async with AsyncExitStack() as stack:
            check_endpoint(self.endpoint, keys=self._keys is not None)
            stack.push_async_callback(self.scorer.worker.kill)
            await self.scorer.worker.ensure_running()

            opened = bound_socket(
                [self.endpoint],
                self._keys,
                max_message_bytes=MAX_REQUEST_BYTES,
                outbox_bound=MAX_QUEUED,
            )
            self._bound = stack.enter_context(opened)
            (self.endpoint,) = self._bound.endpoints

            self._resources = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._resources.aclose()

    @property
    def names(self) -> list[str]:
        return self.scorer.worker.names

    async def run(self) -> None:
        """Serve until cancelled; raise RewardError if the functions can no longer be loaded."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._score_queued)
            while True:
                received = await self._bound.receive()
                if received.name is None:
                    self._refuse(received.peer, "key", "this key is no longer admitted")
                else:
                    self._handle(received.peer, b"".join(received.frames[-1:]))

    def _handle(self, peer: bytes, data: bytes) -> None:
        """Answer one message: queue it, refuse it, or repeat the answer to a known request."""
        parsed = self._parse(peer, data)
        if parsed is None:
            return

        request, line = parsed
        if reply := self._done.get(request.id):
            self._bound.send(peer, reply)
        elif not request.completions:  # a question for the functions' names
            self._send(peer, Scores().reply(request.id, self.names, 0, 0.0))
        elif request.id in self._askers or self._enqueue(peer, request, line):
            self._askers[request.id] = peer
            ahead = 0 if request.id == self._current else len(self._queue)
            self._send(peer, ScoreProgress(id=request.id, ahead=ahead))

    def _parse(self, peer: bytes, data: bytes) -> tuple[ScoreRequest, bytes] | None:
        """Return a valid request, also as one line of JSON for the worker; refuse others."""
        if len(data) > MAX_REQUEST_BYTES:
            reason = f"a request has at most {MAX_REQUEST_BYTES} bytes, got {len(data)}"
            return self._refuse(peer, "oversized", reason)

        try:
            request = msgspec.json.decode(data, type=ScoreRequest)
            line = msgspec.json.encode(request)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            return self._refuse(peer, "undecodable", f"not a ScoreRequest: {error}")

        version = request.reward_protocol_version
        if version != REWARD_PROTOCOL_VERSION:
            reason = f"this server speaks reward protocol {REWARD_PROTOCOL_VERSION}, got {version}"
            return self._refuse(peer, "version", reason, request.id)
        if problem := _request_error(request):
            return self._refuse(peer, "invalid", problem, request.id)
        return request, line

    def _enqueue(self, peer: bytes, request: ScoreRequest, line: bytes) -> bool:
        queued = QueuedRequest(request.id, len(request.completions), request.timeout_s, line)
        if self._queue.put(peer, queued):
            return True
        reason = f"{len(self._queue)} requests are already waiting ({self._queue.bytes} bytes)"
        self._refuse(peer, "full", reason, request.id, retry=True)
        return False

    def _refuse(
        self, peer: bytes, kind: str, reason: str, request_id: str = "", *, retry: bool = False
    ) -> None:
        self.refusals[kind] += 1
        self._send(peer, ScoreRefusal(id=request_id, reason=reason[:500], retry=retry))

    def _send(self, peer: bytes, message: RewardMessage) -> None:
        self._bound.send(peer, msgspec.json.encode(message))

    async def _score_queued(self) -> None:
        while True:
            request = await self._queue.get()
            self._current = request.id

            started = time.perf_counter()
            scores = await self.scorer.score(request)
            elapsed_s = time.perf_counter() - started

            reply = msgspec.json.encode(
                scores.reply(request.id, self.names, request.count, elapsed_s)
            )
            self._done.add(request.id, reply)
            self._current = ""
            self._bound.send(self._askers.pop(request.id), reply)

            await self.scorer.worker.ensure_running()  # before the next request needs it


def _request_error(request: ScoreRequest) -> str:
    """Return what is wrong with a request that could be decoded, or ""."""
    count = len(request.completions)
    lengths = {"prompts": len(request.prompts), "completion_ids": len(request.completion_ids)}
    lengths |= {f"columns.{name}": len(values) for name, values in request.columns.items()}

    wrong = [f"{name} has {n}" for name, n in lengths.items() if n != count]
    if wrong:
        return f"completions has {count} entries, but {', '.join(wrong)}; all must agree"
    if 0 < request.timeout_s <= MAX_TIMEOUT_S:
        return ""
    return f"timeout_s must be above 0 and at most {MAX_TIMEOUT_S:g}, got {request.timeout_s}"
