"""Asks reward services for the rewards of a group: `RewardClient.score`.

    score ──▶ service A ──▶ endpoint with the fewest requests ──▶ (silent or full? another one)
         └──▶ service B ──▶ …                                         all replies ──▶ RewardResult

All services are asked at once, and the endpoints of one service share the load. Whatever happens, a
group gets an answer: a service that did not reply in time counts as None for all its functions.
"""

import itertools
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import anyio
import anyio.lowlevel
import msgspec
import zmq
import zmq.asyncio

from actors.rewards.replies import ServiceReply, decode_reply, merge_replies, reply_error
from protocol.messages.parts import RewardResult, RewardService
from protocol.messages.rewards import (
    RewardFault,
    ScoreProgress,
    ScoreRefusal,
    ScoreRequest,
)
from protocol.transport import endpoints
from protocol.transport.curve_keys import ClientKeys

MAX_BYTES = 64 << 20
RESERVED = ("prompt", "completion", "completions", "completion_ids")
RESEND_S = 5.0  # a silent endpoint may have been restarted, and then has lost the request
AVOID_S = 60.0  # how long other endpoints are preferred to a silent one
SLACK_S = 30.0  # for a server that restarts its worker
MAX_WAITS = 16  # a request's turn must come within so many times what it may take itself


@dataclass(eq=False)
class _Endpoint:
    """A connected socket, and the IDs of the requests that it has not answered yet."""

    address: str
    socket: zmq.asyncio.Socket
    outstanding: set[str] = field(default_factory=set[str])
    avoid_until: float = 0.0


@dataclass(eq=False)
class _Service:
    """A service's endpoints, and its functions' names once they are known."""

    timeout_s: float
    endpoints: list[_Endpoint]
    names: list[str] = field(default_factory=list[str])

    @property
    def where(self) -> str:
        return ", ".join(endpoint.address for endpoint in self.endpoints)

    def choose(self) -> _Endpoint:
        """Return the endpoint with the fewest outstanding requests; silent or full ones last."""
        now = anyio.current_time()
        return min(self.endpoints, key=lambda e: (max(now, e.avoid_until), len(e.outstanding)))

    def no_rewards(
        self, count: int, kind: Literal["unreachable", "contract"], message: str
    ) -> ServiceReply:
        """Return None for all functions, whose names may still be unknown, and the fault."""
        faulty = self.names or [self.where]
        return ServiceReply(
            id="",
            names=self.names,
            rewards=[[None] * count for _ in self.names],
            faults=[RewardFault(function=name, kind=kind, message=message) for name in faulty],
        )


@dataclass(eq=False)
class _PendingRequest:
    """A request under way: the endpoint that has it now, and what came back."""

    endpoint: _Endpoint
    limit_s: float
    latest: float  # whatever the endpoint reports, no answer is waited for after this
    scope: anyio.CancelScope
    in_progress: bool = False  # the endpoint said so since the request was last sent
    full: str = ""  # why the endpoint does not accept it now
    changed: anyio.Event = field(default_factory=anyio.Event)
    reply: ServiceReply | ScoreRefusal | None = None

    async def wait(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await self.changed.wait()
        self.changed = anyio.Event()


class RewardClient:
    """Use as an async context manager on the I/O thread; several `score` calls may run at once."""

    def __init__(
        self,
        services: Sequence[RewardService],
        keys: ClientKeys | None = None,
        *,
        resend_s: float = RESEND_S,
        slack_s: float = SLACK_S,
        max_waits: int = MAX_WAITS,
    ) -> None:
        self._specs = list(services)
        self._keys = keys
        self._resend_s = resend_s
        self._slack_s = slack_s
        self._max_waits = max_waits
        self._services: list[_Service] = []
        self._pending: dict[str, _PendingRequest] = {}
        self._ids = (f"{uuid.uuid4().hex}-{n}" for n in itertools.count())
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Connect to every endpoint; raise ChannelError for one that cannot be used."""
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)

            for spec in self._specs:
                connected = [self._connect(address, stack) for address in spec.endpoints]
                self._services.append(_Service(spec.timeout_s, connected))
                for endpoint in connected:
                    tasks.start_soon(self._receive, endpoint)

            self._resources = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._resources.aclose()

    async def score(
        self,
        row: bytes,
        completions: list[Any],
        completion_ids: list[list[int]],
        trainer_state: dict[str, Any],
    ) -> RewardResult:
        """Return the rewards of a group's N completions, from all functions of all services.

        `row` is the dataset row as JSON; its columns go to the functions, each value repeated N
        times. Names that TRL uses for its own arguments (`RESERVED`) are left out.
        """
        started = time.perf_counter()
        values: dict[str, Any] = msgspec.json.decode(row)
        count = len(completions)
        columns = {k: [v] * count for k, v in values.items() if k not in RESERVED}
        replies = [service.no_rewards(count, "unreachable", "") for service in self._services]

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
            failure = await self._fetch_names(service)
            replies[index] = failure or await self._ask(service, request)

        async with anyio.create_task_group() as tasks:
            for index in range(len(self._services)):
                tasks.start_soon(ask, index)
        return merge_replies(replies, count, time.perf_counter() - started)

    async def _fetch_names(self, service: _Service) -> ServiceReply | None:
        """Ask for the functions' names, once; return the reply if that failed."""
        if service.names:
            return None

        # A request without completions is answered at once, with the names.
        request = ScoreRequest(
            id=next(self._ids), prompts=[], completions=[], completion_ids=[], timeout_s=1.0
        )
        reply = await self._ask(service, request)

        if reply.faults:
            return reply
        service.names = reply.names
        return None

    async def _ask(self, service: _Service, request: ScoreRequest) -> ServiceReply:
        """Send a request until it is answered, or every function has had its time.

        That time starts when the request's turn comes, which is waited for at most `MAX_WAITS`
        times as long: a server that reports progress forever would hold up the queue of the run.
        """
        limit_s = service.timeout_s * (len(service.names) + 1) + self._slack_s
        count = len(request.completions)
        data = msgspec.json.encode(request)
        asked = anyio.current_time()
        scope = anyio.CancelScope(deadline=asked + limit_s)
        pending = _PendingRequest(
            service.choose(), limit_s, asked + self._max_waits * limit_s, scope
        )
        self._pending[request.id] = pending

        try:
            with scope:
                await self._send_until_answered(service, request.id, pending, data)
        finally:
            del self._pending[request.id]
            pending.endpoint.outstanding.discard(request.id)

        match pending.reply:
            case ServiceReply() as reply:
                problem = reply_error(reply, service.names, count)
                if not problem:
                    return reply
                return service.no_rewards(count, "contract", f"{service.where} {problem}")
            case ScoreRefusal(reason=reason):
                return service.no_rewards(count, "contract", f"{service.where} refused: {reason}")
            case None:
                waited_s = anyio.current_time() - asked
                silence = f"{service.where} gave no answer within {waited_s:.3g} s {pending.full}"
                return service.no_rewards(count, "unreachable", silence)

    async def _send_until_answered(
        self, service: _Service, request_id: str, pending: _PendingRequest, data: bytes
    ) -> None:
        """Resend until answered: to the same endpoint while it reports progress, else to others."""
        while True:
            endpoint, pending.in_progress, pending.full = pending.endpoint, False, ""
            endpoint.outstanding.add(request_id)
            # At an actor's end, what was just begun is cancelled after the sockets were closed.
            await anyio.lowlevel.checkpoint_if_cancelled()
            endpoints.send_now(endpoint.socket, [data])
            await pending.wait(self._resend_s)
            if pending.reply is not None:
                return

            if pending.full:
                endpoint.avoid_until = anyio.current_time() + self._resend_s
                await pending.wait(self._resend_s / 10)
                if pending.reply is not None:
                    return
            elif pending.in_progress:
                continue
            else:
                endpoint.avoid_until = anyio.current_time() + AVOID_S

            endpoint.outstanding.discard(request_id)
            pending.endpoint = service.choose()

    async def _receive(self, endpoint: _Endpoint) -> None:
        while True:
            frames = await endpoint.socket.recv_multipart()
            endpoint.avoid_until = 0.0

            reply = decode_reply(endpoint.address, frames[-1])
            pending = None if reply is None else self._pending.get(reply.id)
            if reply is None or pending is None:
                continue

            match reply:
                case ServiceReply():
                    pending.reply = reply
                    pending.changed.set()
                case _ if endpoint is not pending.endpoint:
                    continue  # another endpoint has the request by now
                case ScoreRefusal(retry=True, reason=reason):
                    pending.full = reason
                    pending.changed.set()
                case ScoreRefusal():
                    pending.reply = reply
                    pending.changed.set()
                case ScoreProgress(ahead=ahead):
                    pending.in_progress = True
                    if ahead > 0:  # its time starts when its turn comes
                        due = anyio.current_time() + pending.limit_s
                        pending.scope.deadline = min(due, pending.latest)

    def _connect(self, address: str, stack: AsyncExitStack) -> _Endpoint:
        opened = endpoints.connected_socket(
            address, self._keys, max_message_bytes=MAX_BYTES, outbox_bound=256
        )
        return _Endpoint(address, stack.enter_context(opened))
