"""Asks reward services for the rewards of a group: `RewardClient.score`.

All services are asked at once. The endpoints of one service share the load: a request goes to the
one with the fewest outstanding, and to the next if it is silent for long. Whatever happens, a group
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
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.abc
import msgspec
import numpy as np
import zmq
import zmq.asyncio

from protocol import endpoints
from protocol.keys import load_client_keys
from protocol.messages import (
    RewardFault,
    RewardResult,
    RewardService,
    ScoreRefusal,
    ScoreReply,
    ScoreRequest,
    floats_bytes,
)

log = logging.getLogger("pippin.rewards")

MAX_BYTES = 64 << 20
RESERVED = ("prompt", "completion", "completions", "completion_ids")
RESEND_S = 5.0  # a silent endpoint may have been restarted, and then knows nothing of the request
SLACK_S = 30.0  # for a server that restarts its worker
_REPLIES = ScoreReply | ScoreRefusal


@dataclass
class _Endpoint:
    """A connected socket, and the requests that it owes an answer to."""

    address: str
    socket: zmq.asyncio.Socket
    outstanding: set[str] = field(default_factory=set)


@dataclass
class _Service:
    timeout_s: float
    endpoints: list[_Endpoint]
    names: list[str] = field(default_factory=list)


@dataclass
class _Pending:
    answered: anyio.Event = field(default_factory=anyio.Event)
    reply: ScoreReply | ScoreRefusal | None = None


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

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        replies: list[ScoreReply | None] = [None] * len(self._services)

        async def ask(index: int) -> None:
            service = self._services[index]
            await self._learn_names(service)
            request = ScoreRequest(
                id=next(self._ids),
                prompts=[values.get("prompt")] * count,
                completions=completions,
                completion_ids=completion_ids,
                columns=columns,
                trainer_state=trainer_state,
                timeout_s=service.timeout_s,
            )
            replies[index] = await self._ask(service, request)

        async with anyio.create_task_group() as tasks:
            for index in range(len(self._services)):
                tasks.start_soon(ask, index)
        merged = [r for r in replies if r is not None]
        return _merged(merged, count, time.perf_counter() - started)

    async def _learn_names(self, service: _Service) -> None:
        """Ask for the functions' names once: a request of no completions is answered with them."""
        if service.names:
            return
        request = ScoreRequest(
            id=next(self._ids), prompts=[], completions=[], completion_ids=[], timeout_s=1.0
        )
        reply = await self._ask(service, request, within_s=self._slack_s)
        if not reply.faults:
            service.names = reply.names

    async def _ask(
        self, service: _Service, request: ScoreRequest, within_s: float | None = None
    ) -> ScoreReply:
        """Send until answered, or until every function has had its time."""
        functions = max(1, len(service.names))
        limit = within_s or service.timeout_s * (functions + 1) + self._slack_s
        pending = self._pending[request.id] = _Pending()
        data = msgspec.json.encode(request)
        tried: _Endpoint | None = None
        try:
            with anyio.move_on_after(limit):
                while pending.reply is None:
                    tried = self._send(service, request.id, data, tried)
                    with anyio.move_on_after(self._resend_s):
                        await pending.answered.wait()
        finally:
            del self._pending[request.id]
            for endpoint in service.endpoints:
                endpoint.outstanding.discard(request.id)
        where = ", ".join(endpoint.address for endpoint in service.endpoints)
        match pending.reply:
            case ScoreReply() as reply:
                if all(len(r) == len(request.completions) for r in reply.rewards) and len(
                    reply.rewards
                ) == len(reply.names):
                    return reply
                message = f"{where} answered with rewards that fit neither names nor completions"
            case ScoreRefusal(reason=reason):
                message = f"{where} refused: {reason}"
            case None:
                message = f"{where} gave no answer within {limit:g} s"
        kind = "unreachable" if pending.reply is None else "contract"
        names = service.names or [where]
        return ScoreReply(
            id=request.id,
            names=names,
            rewards=[[None] * len(request.completions) for _ in names],
            faults=[
                RewardFault(
                    function=name,
                    kind=kind,
                    message=message,
                )
                for name in names
            ],
        )

    def _send(
        self, service: _Service, request_id: str, data: bytes, tried: _Endpoint | None
    ) -> _Endpoint:
        """Send to the endpoint with the fewest outstanding, another than the silent one if any."""
        others = [e for e in service.endpoints if e is not tried] or service.endpoints
        chosen = min(others, key=lambda e: len(e.outstanding))
        endpoints.send_now(chosen.socket, [data])
        chosen.outstanding.add(request_id)
        return chosen

    async def _receive(self, endpoint: _Endpoint) -> None:
        while True:
            frames = await endpoint.socket.recv_multipart()
            try:
                reply = msgspec.json.decode(frames[-1], type=_REPLIES)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                log.warning("%s sent something that is no reply: %s", endpoint.address, error)
                continue
            endpoint.outstanding.discard(reply.id)
            pending = self._pending.get(reply.id)
            if pending is not None and pending.reply is None:
                pending.reply = reply
                pending.answered.set()


def _merged(replies: Sequence[ScoreReply], count: int, elapsed_s: float) -> RewardResult:
    """Put the services' functions side by side, in order."""
    names = [name for reply in replies for name in reply.names]
    columns = [column for reply in replies for column in reply.rewards]
    table = np.full((count, len(columns)), np.nan, np.float32)
    for place, column in enumerate(columns):
        table[:, place] = [np.nan if value is None else value for value in column]
    extra: dict[str, list[Any]] = {}
    metrics: dict[str, float] = {}
    for reply in replies:
        extra |= reply.log_extra
        metrics |= reply.log_metric
    return RewardResult(
        names=names,
        rewards=floats_bytes(table.reshape(-1)),
        log_extra=extra,
        log_metric=metrics,
        faults=[fault for reply in replies for fault in reply.faults],
        elapsed_s=elapsed_s,
    )
