"""Asks reward services for the rewards of a group: `RewardClient.score`.

All services are asked at once. The endpoints of one service share the load: a request goes to the
one with the fewest outstanding, and to the next if it is full or silent. Whatever happens, a group
gets an answer: a service that gave none within its time gives None for all its functions.
"""

import itertools
import logging
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import anyio
import anyio.abc
import msgspec
import zmq
import zmq.asyncio

from actors.rewards.replies import merged, misfit, nothing
from protocol.messages.parts import RewardResult, RewardService
from protocol.messages.rewards import ScoreProgress, ScoreRefusal, ScoreReply, ScoreRequest
from protocol.transport import endpoints
from protocol.transport.curve_keys import load_client_keys

log = logging.getLogger("pippin.rewards")

MAX_BYTES = 64 << 20
RESERVED = ("prompt", "completion", "completions", "completion_ids")
RESEND_S = 5.0  # a silent endpoint may have been restarted, and then knows nothing of the request
AVOID_S = 60.0  # how long others are preferred to a silent endpoint
SLACK_S = 30.0  # for a server that restarts its worker
_REPLIES = ScoreReply | ScoreRefusal | ScoreProgress


class _Named(msgspec.Struct):
    """What can be read of a reply that cannot be read."""

    id: str


@dataclass(eq=False)
class _Endpoint:
    """A connected socket, and the requests that it owes an answer to."""

    address: str
    socket: zmq.asyncio.Socket
    outstanding: set[str] = field(default_factory=set)
    avoid_until: float = 0.0


@dataclass(eq=False)
class _Service:
    timeout_s: float
    endpoints: list[_Endpoint]
    names: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return ", ".join(endpoint.address for endpoint in self.endpoints)

    def choose(self) -> _Endpoint:
        """Return the endpoint with the fewest outstanding, a silent or full one last."""
        now = anyio.current_time()
        return min(self.endpoints, key=lambda e: (max(now, e.avoid_until), len(e.outstanding)))


@dataclass(eq=False)
class _Pending:
    """A request under way: who was asked, what came."""

    endpoint: _Endpoint
    limit_s: float
    scope: anyio.CancelScope
    heard: bool = False
    full: str = ""  # why the endpoint would not take it now
    changed: anyio.Event = field(default_factory=anyio.Event)
    reply: ScoreReply | ScoreRefusal | None = None

    async def wait(self, seconds: float) -> None:
        """Wait for a reply or refusal, at most so long."""
        with anyio.move_on_after(seconds):
            await self.changed.wait()
        self.changed = anyio.Event()


class RewardClient:
    """Use as an async context manager on the I/O thread; `score` may run many times at once."""

    def __init__(
        self,
        services: Sequence[RewardService],
        keys: str | Path | None = None,
        *,
        resend_s: float = RESEND_S,
        slack_s: float = SLACK_S,
    ) -> None:
        self._specs = list(services)
        self._keys = keys
        self._resend_s = resend_s
        self._slack_s = slack_s
        self._services: list[_Service] = []
        self._pending: dict[str, _Pending] = {}
        self._ids = (f"{uuid.uuid4().hex}-{n}" for n in itertools.count())
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Connect to every endpoint; raise ChannelError for one that cannot be used."""
        keys = load_client_keys(self._keys) if self._keys is not None else None
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            for spec in self._specs:
                service = _Service(spec.timeout_s, [])
                for address in spec.endpoints:
                    endpoints.check_endpoint(address, keys=keys is not None)
                    socket = stack.enter_context(endpoints.open_socket(zmq.DEALER, None))
                    endpoints.set_limits(socket, max_message_bytes=MAX_BYTES, outbox_bound=256)
                    encrypted = keys if address.startswith("tcp://") else None
                    endpoints.connect(socket, address, encrypted)
                    endpoint = _Endpoint(address, socket)
                    service.endpoints.append(endpoint)
                    tasks.start_soon(self._receive, endpoint)
                self._services.append(service)
            self._resources = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Disconnect."""
        await self._resources.aclose()

    async def score(
        self,
        row: bytes,
        completions: list[Any],
        completion_ids: list[list[int]],
        trainer_state: dict[str, Any],
    ) -> RewardResult:
        """Return the rewards of a group's N completions: all functions of all services.

        `row` is the dataset row as JSON; every column but the reserved ones goes to the functions,
        repeated N times.
        """
        started = time.perf_counter()
        values: dict[str, Any] = msgspec.json.decode(row)
        count = len(completions)
        columns = {k: [v] * count for k, v in values.items() if k not in RESERVED}
        replies = [
            nothing(service.names, service.where, count, "unreachable", "")
            for service in self._services
        ]

        async def ask(index: int) -> None:
            service = self._services[index]
            request = ScoreRequest(
                id=next(self._ids),
                prompts=[values.get("prompt")] * count,
                completions=completions,
                completion_ids=completion_ids,
                columns=columns,
                trainer_state=trainer_state,
                timeout_s=service.timeout_s,
            )
            refused = await self._learn_names(service)
            replies[index] = refused or await self._ask(service, request)

        async with anyio.create_task_group() as tasks:
            for index in range(len(self._services)):
                tasks.start_soon(ask, index)
        return merged(replies, count, time.perf_counter() - started)

    async def _learn_names(self, service: _Service) -> ScoreReply | None:
        """Ask for the functions' names once; return what went wrong, if anything did."""
        if service.names:
            return None
        # A request of no completions is answered at once.
        request = ScoreRequest(
            id=next(self._ids), prompts=[], completions=[], completion_ids=[], timeout_s=1.0
        )
        reply = await self._ask(service, request)
        if reply.faults:
            return reply
        service.names = reply.names
        return None

    async def _ask(self, service: _Service, request: ScoreRequest) -> ScoreReply:
        """Send until answered, or until every function has had its time."""
        limit_s = service.timeout_s * (len(service.names) + 1) + self._slack_s
        count = len(request.completions)
        data = msgspec.json.encode(request)
        scope = anyio.CancelScope(deadline=anyio.current_time() + limit_s)
        pending = self._pending[request.id] = _Pending(service.choose(), limit_s, scope)
        try:
            with scope:
                await self._converse(service, request.id, pending, data)
        finally:
            del self._pending[request.id]
            pending.endpoint.outstanding.discard(request.id)
        match pending.reply:
            case ScoreReply() as reply:
                problem = misfit(reply, service.names, count)
                if not problem:
                    return reply
                return nothing(
                    service.names, service.where, count, "contract", f"{service.where} {problem}"
                )
            case ScoreRefusal(reason=reason):
                return nothing(
                    service.names,
                    service.where,
                    count,
                    "contract",
                    f"{service.where} refused: {reason}",
                )
            case None:
                silence = f"{service.where} gave no answer within {limit_s:g} s {pending.full}"
                return nothing(service.names, service.where, count, "unreachable", silence)

    async def _converse(
        self, service: _Service, request_id: str, pending: _Pending, data: bytes
    ) -> None:
        """Send and send again: to the same endpoint while it says that it works on it."""
        while True:
            endpoint, pending.heard, pending.full = pending.endpoint, False, ""
            endpoint.outstanding.add(request_id)
            endpoints.send_now(endpoint.socket, [data])
            await pending.wait(self._resend_s)
            if pending.reply is not None:
                return
            if pending.full:
                endpoint.avoid_until = anyio.current_time() + self._resend_s
                await pending.wait(self._resend_s / 10)
                if pending.reply is not None:
                    return
            elif pending.heard:
                continue
            else:
                endpoint.avoid_until = anyio.current_time() + AVOID_S
            endpoint.outstanding.discard(request_id)
            pending.endpoint = service.choose()

    async def _receive(self, endpoint: _Endpoint) -> None:
        while True:
            frames = await endpoint.socket.recv_multipart()
            endpoint.avoid_until = 0.0
            reply = _read(endpoint.address, frames[-1])
            pending = None if reply is None else self._pending.get(reply.id)
            if pending is None:
                continue
            match reply:
                case ScoreReply():
                    pending.reply = reply
                    pending.changed.set()
                case _ if endpoint is not pending.endpoint:
                    continue  # it is in other hands by now
                case ScoreRefusal(retry=True, reason=reason):
                    pending.full = reason
                    pending.changed.set()
                case ScoreRefusal():
                    pending.reply = reply
                    pending.changed.set()
                case ScoreProgress(ahead=ahead):
                    pending.heard = True
                    if ahead > 0:  # its time begins when its turn comes
                        pending.scope.deadline = anyio.current_time() + pending.limit_s


def _read(address: str, data: bytes) -> ScoreReply | ScoreRefusal | ScoreProgress | None:
    """Return a message; one that cannot be read counts as a refusal of the request it names."""
    try:
        return msgspec.json.decode(data, type=_REPLIES)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        log.warning("%s sent something that is no reply: %s", address, error)
        try:
            named = msgspec.json.decode(data, type=_Named)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return None
        return ScoreRefusal(id=named.id, reason=f"it sent what is no reply: {error}")
