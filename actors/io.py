"""The actor's I/O thread: the learner's socket, reward servers, snapshots; never MLX.

The main thread's commands come in through the bridge and events go back through it. Scoring and
fetching run concurrently with everything else, so a slow reward delays only its own group.
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
    FetchSnapshot,
    GroupScored,
    GroupScoreFailed,
    MessageReceived,
    NotSent,
    ScoreGroup,
    Send,
    SnapshotFetched,
    SnapshotFetchFailed,
    UseRewards,
)
from protocol.errors import PippinError, SnapshotError, WireError
from protocol.messages.messages import Failed, Group, Heartbeat, Policy, Welcome
from protocol.messages.parts import RewardResult, RewardService
from protocol.transport.bridge import Bridge, BridgeClosed
from protocol.transport.channel import ClientChannel
from protocol.transport.curve_keys import ClientKeys
from protocol.transport.endpoints import reachable
from protocol.transport.snapshot_channel import fetch_snapshot


class GroupScorer(Protocol):
    """The part of `rewards.client.RewardClient` that the I/O thread uses."""

    async def score(
        self,
        row: bytes,
        completions: list[Any],
        completion_ids: list[list[int]],
        trainer_state: dict[str, Any],
    ) -> RewardResult:
        """Return the rewards of one group; raises PippinError if it cannot be scored."""
        ...


class IoEnd(Protocol):
    """The I/O thread's end of `protocol.transport.bridge.Bridge`."""

    async def aget(self) -> Command: ...

    async def aput(self, item: Event) -> None: ...


@dataclass
class ActorIo:
    """Serves one actor until its main thread closes the bridge.

    `heartbeat` returns the main thread's latest report, or None before it has one. However busy the
    main thread is, the report is sent at the interval that the learner's Welcome gives.
    """

    connect: Callable[[], AbstractAsyncContextManager[ClientChannel]]
    make_scorer: Callable[[list[RewardService]], AbstractAsyncContextManager[GroupScorer]]
    heartbeat: Callable[[], Heartbeat | None]
    keys: ClientKeys | None = None
    endpoint: str = ""  # the learner's, as this actor reaches it
    _services: list[RewardService] = field(default_factory=list[RewardService])
    _scorer: GroupScorer | None = None
    _heartbeat_s: float | None = None

    async def run(self, bridge: IoEnd) -> None:
        """Serve; an error in any part ends the whole thread and is raised in the main thread."""
        async with self.connect() as channel, anyio.create_task_group() as tasks:
            tasks.start_soon(self._receive, channel, bridge, tasks)
            try:
                while True:
                    await self._command(await bridge.aget(), channel, bridge, tasks)
            except BridgeClosed:
                tasks.cancel_scope.cancel()

    async def _receive(
        self, channel: ClientChannel, bridge: IoEnd, tasks: anyio.abc.TaskGroup
    ) -> None:
        while True:
            message = await channel.receive()
            if isinstance(message, Welcome):
                if self._heartbeat_s is None:
                    tasks.start_soon(self._beat, channel)
                self._heartbeat_s = message.heartbeat_s
                channel.limit_messages(message.max_message_bytes)
            await bridge.aput(MessageReceived(message))

    async def _beat(self, channel: ClientChannel) -> None:
        while self._heartbeat_s is not None:
            await anyio.sleep(self._heartbeat_s)
            heartbeat = self.heartbeat()
            if heartbeat is not None:
                channel.send(heartbeat)

    async def _command(
        self,
        command: Command,
        channel: ClientChannel,
        bridge: IoEnd,
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        match command:
            case Send():
                self._send(command, channel, bridge, tasks)
            case FetchSnapshot(policy):
                tasks.start_soon(self._fetch, policy, bridge)
            case ScoreGroup():
                tasks.start_soon(self._score, command, bridge)
            case UseRewards(services):
                if services != self._services:
                    self._services = services
                    await tasks.start(self._serve_scorer)

    def _send(
        self,
        command: Send,
        channel: ClientChannel,
        bridge: IoEnd,
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        # A full outbox drops the message: the learner is unreachable, and the session resends what
        # matters.
        try:
            channel.send(command.message)
        except WireError as error:
            if not isinstance(command.message, Group | Failed):
                raise
            key = (command.message.task, command.message.attempt)
            tasks.start_soon(bridge.aput, NotSent(key, str(error)))

    async def _serve_scorer(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Keep a scorer open until the thread ends: a replaced one may still be scoring groups."""
        async with self.make_scorer(self._services) as scorer:
            self._scorer = scorer
            task_status.started()
            await anyio.sleep_forever()

    async def _score(self, command: ScoreGroup, bridge: IoEnd) -> None:
        start = time.perf_counter()
        if self._scorer is None:
            await bridge.aput(GroupScoreFailed(command.key, "the run has no reward service"))
            return

        try:
            reward = await self._scorer.score(
                command.row, command.completions, command.completion_ids, command.trainer_state
            )
        except PippinError as error:
            await bridge.aput(GroupScoreFailed(command.key, str(error)))
        else:
            await bridge.aput(GroupScored(command.key, reward, time.perf_counter() - start))

    async def _fetch(self, policy: Policy, bridge: IoEnd) -> None:
        try:
            data = await self._snapshot(policy)
        except PippinError as error:
            await bridge.aput(SnapshotFetchFailed(policy, str(error)))
        else:
            await bridge.aput(SnapshotFetched(policy, data))

    async def _snapshot(self, policy: Policy) -> bytes:
        """Return a snapshot's bytes: from its file if this host has it, else over the wire."""
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


class IoThreadHandle:
    """The main thread's handle on the I/O thread, over a bridge: the worker's `IoThread`."""

    def __init__(self, bridge: Bridge[Command, Event]) -> None:
        self._bridge = bridge
        self._first: Event | None = None

    def poll(self) -> list[Event]:
        """Return the events that have come, without waiting."""
        events = [] if self._first is None else [self._first]
        self._first = None
        while (event := self._bridge.get()) is not None:
            events.append(event)
        return events

    def put(self, command: Command) -> None:
        self._bridge.put(command)

    def wait(self, timeout_s: float) -> None:
        """Wait until there is an event to poll, or `timeout_s` has passed."""
        if self._first is None:
            self._first = self._bridge.get(timeout_s)
