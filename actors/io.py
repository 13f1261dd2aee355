"""The actor's I/O thread: the learner's socket, reward servers, snapshots. Bytes and numpy only.

The main thread's commands come in through the bridge and events go out through it. Scoring and
fetching run concurrently with everything else, so a slow reward delays its own group alone.
"""

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
import anyio.abc

from actors.bridge_messages import (
    Command,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    NotSent,
    Received,
    Score,
    Scored,
    ScoreFailed,
    Send,
    UseRewards,
)
from protocol.errors import PippinError, SnapshotError, WireError
from protocol.messages.messages import Failed, Group, Heartbeat, Policy
from protocol.messages.parts import RewardResult, RewardService
from protocol.transport.bridge import Bridge, BridgeClosed
from protocol.transport.channel import ClientChannel
from protocol.transport.endpoints import reachable
from protocol.transport.snapshot_channel import fetch_snapshot

HEARTBEAT_S = 2.0


class Scorer(Protocol):
    """What the I/O thread needs of `reward_client.RewardClient`."""

    async def score(
        self,
        row: bytes,
        completions: list[Any],
        completion_ids: list[list[int]],
        trainer_state: dict[str, Any],
    ) -> RewardResult:
        """Return the rewards of one group; raises PippinError if none can be had."""
        ...


class IoBridge(Protocol):
    """The I/O side of `protocol.transport.bridge.Bridge`."""

    async def aget(self) -> Command:
        """Take the main thread's next command; BridgeClosed at its end."""
        ...

    async def aput(self, item: Event) -> None:
        """Queue an event for the main thread."""
        ...


@dataclass
class ActorIo:
    """Serves one actor until its main thread closes the bridge.

    `heartbeat` returns what the main thread last said of itself, or None while nothing is to be
    said; it goes out every `heartbeat_s`, however busy the main thread is.
    """

    connect: Callable[[], AbstractAsyncContextManager[ClientChannel]]
    make_scorer: Callable[[list[RewardService]], AbstractAsyncContextManager[Scorer]]
    heartbeat: Callable[[], Heartbeat | None]
    keys: str | None = None
    heartbeat_s: float = HEARTBEAT_S
    endpoint: str = ""  # the learner's, as this actor reaches it
    _services: list[RewardService] = field(default_factory=list)
    _scorer: Scorer | None = None

    async def run(self, bridge: IoBridge) -> None:
        """Serve; errors of any part end all of it and are raised at the main thread."""
        async with self.connect() as channel, anyio.create_task_group() as tasks:
            tasks.start_soon(self._receive, channel, bridge)
            tasks.start_soon(self._beat, channel)
            try:
                while True:
                    await self._command(await bridge.aget(), channel, bridge, tasks)
            except BridgeClosed:
                tasks.cancel_scope.cancel()

    async def _receive(self, channel: ClientChannel, bridge: IoBridge) -> None:
        while True:
            await bridge.aput(Received(await channel.receive()))

    async def _beat(self, channel: ClientChannel) -> None:
        while True:
            await anyio.sleep(self.heartbeat_s)
            heartbeat = self.heartbeat()
            if heartbeat is not None:
                channel.send(heartbeat)

    async def _command(
        self,
        command: Command,
        channel: ClientChannel,
        bridge: IoBridge,
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        match command:
            case Send():
                self._send(command, channel, bridge, tasks)
            case Fetch(policy):
                tasks.start_soon(self._fetch, policy, bridge)
            case Score():
                tasks.start_soon(self._score, command, bridge)
            case UseRewards(services):
                if services != self._services:
                    self._services = services
                    await tasks.start(self._serve_scorer)

    def _send(
        self,
        command: Send,
        channel: ClientChannel,
        bridge: IoBridge,
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        # A full outbox means that the learner is away: what matters is sent again later.
        try:
            channel.send(command.message)
        except WireError as error:
            if not isinstance(command.message, Group | Failed):
                raise
            key = (command.message.task, command.message.attempt)
            tasks.start_soon(bridge.aput, NotSent(key, str(error)))

    async def _serve_scorer(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Hold a scorer open for as long as the actor runs: groups may still be in its hands."""
        async with self.make_scorer(self._services) as scorer:
            self._scorer = scorer
            task_status.started()
            await anyio.sleep_forever()

    async def _score(self, command: Score, bridge: IoBridge) -> None:
        start = time.perf_counter()
        if self._scorer is None:
            await bridge.aput(ScoreFailed(command.key, "the run has no reward service"))
            return
        try:
            reward = await self._scorer.score(
                command.row, command.completions, command.completion_ids, command.trainer_state
            )
        except PippinError as error:
            await bridge.aput(ScoreFailed(command.key, str(error)))
        else:
            await bridge.aput(Scored(command.key, reward, time.perf_counter() - start))

    async def _fetch(self, policy: Policy, bridge: IoBridge) -> None:
        try:
            data = await self._snapshot(policy)
        except PippinError as error:
            await bridge.aput(FetchFailed(policy, str(error)))
        else:
            await bridge.aput(Fetched(policy, data))

    async def _snapshot(self, policy: Policy) -> bytes:
        """Return a snapshot's bytes: from its file on the learner's host, else over the wire."""
        problem = "the learner named neither a file nor an endpoint"
        if policy.path:
            try:
                data = await anyio.Path(policy.path).read_bytes()
            except OSError as error:
                problem = f"{policy.path}: {error.strerror}"
            else:
                if len(data) == policy.size:
                    return data
                problem = f"{policy.path} holds {len(data)} bytes, not {policy.size}"
        if policy.endpoint:
            keys = self.keys if policy.endpoint.startswith("tcp://") else None
            endpoint = reachable(policy.endpoint, self.endpoint)
            return await fetch_snapshot(endpoint, policy, keys=keys)
        raise SnapshotError(f"policy version {policy.version} cannot be fetched: {problem}")


class BridgePort:
    """The main thread's end of a bridge, as the worker's `Port`."""

    def __init__(self, bridge: Bridge[Command, Event]) -> None:
        self._bridge = bridge
        self._first: Event | None = None

    def poll(self) -> list[Event]:
        """Return what has come, without waiting."""
        events = [] if self._first is None else [self._first]
        self._first = None
        while (event := self._bridge.get()) is not None:
            events.append(event)
        return events

    def put(self, command: Command) -> None:
        """Hand over a command, waiting for room."""
        self._bridge.put(command)

    def wait(self, timeout_s: float) -> None:
        """Wait until there is something to poll, or `timeout_s` has passed."""
        if self._first is None:
            self._first = self._bridge.get(timeout_s)
