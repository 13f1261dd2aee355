"""The learner's I/O thread: sockets to the actors on one side, the trainer's bridge on the other.

The coordinator, which owns the ledger, decides; the service moves bytes. After every message,
command and tick, `_flush` sends what the coordinator decided, writes its events to the journal and
hands finished batches and evaluations to the trainer.
"""

import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import msgspec
from msgspec import structs

from learner.ledger.journal import encode_line
from learner.online.commands import (
    Command,
    EncodedState,
    EndRun,
    NoMoreBatches,
    PublishPolicy,
    QueueMetrics,
    Reply,
    RequestBatch,
    RequestState,
    StartEvaluation,
)
from learner.online.coordinator import Coordinator
from learner.online.reward_names import reward_names
from protocol.messages.messages import Policy, Stop
from protocol.transport.bridge import Bridge
from protocol.transport.channel import Server, ServerChannel
from protocol.transport.curve_keys import own_client_keys
from protocol.transport.memory_channel import PEER, MemoryServer
from protocol.transport.snapshot_channel import SnapshotServer

TICK_S = 0.25
SnapshotKey = tuple[int, str]  # version and digest


@dataclass
class LearnerService:
    """Runs the coordinator over sockets until the trainer ends the run.

    `in_process` is the channel to an actor in this process; with it there may be no `endpoints`,
    and then no socket is opened.
    """

    coordinator: Coordinator
    endpoints: list[str]
    snapshot_endpoint: str
    bridge: Bridge[Command, Reply]
    journal: Path
    keys: str = ""
    max_message_bytes: int = 64 << 20
    in_process: MemoryServer | None = None
    batch_requested: bool = False
    _server: Server | None = None
    _snapshots: SnapshotServer | None = None
    _snapshot_files: dict[SnapshotKey, Path] = field(default_factory=dict[SnapshotKey, Path])

    async def run(self) -> None:
        """Serve until `EndRun`; errors end the bridge and are raised at the trainer."""
        async with AsyncExitStack() as stack:
            if self.in_process is not None:
                await stack.enter_async_context(self.in_process)
            if self.endpoints:
                await self._open_sockets(stack)

            async with anyio.create_task_group() as tasks:
                for server in self._servers():
                    tasks.start_soon(self._receive, server)
                tasks.start_soon(self._tick)
                tasks.start_soon(self._learn_reward_names)
                await self._commands()
                tasks.cancel_scope.cancel()

    async def _open_sockets(self, stack: AsyncExitStack) -> None:
        keys = self.keys or None
        server = Server(self.endpoints, keys=keys, max_message_bytes=self.max_message_bytes)
        self._server = await stack.enter_async_context(server)
        snapshots = SnapshotServer(self.snapshot_endpoint, keys=keys)
        self._snapshots = await stack.enter_async_context(snapshots)

    def _servers(self) -> list[ServerChannel]:
        return [server for server in (self.in_process, self._server) if server is not None]

    async def _receive(self, server: ServerChannel) -> None:
        while True:
            peer, message = await server.receive()
            self.coordinator.receive(peer, message, time.monotonic())
            await self._flush()

    async def _tick(self) -> None:
        while True:
            await anyio.sleep(TICK_S)
            for server in self._servers():
                for peer in server.take_gone():
                    self.coordinator.actor_gone(peer, time.monotonic())
            self.coordinator.tick(time.monotonic())
            self._delete_old_snapshots()
            await self._flush()

    async def _learn_reward_names(self) -> None:
        services = self.coordinator.welcome.rewards
        keys = own_client_keys(self.keys)
        self.coordinator.reward_names = await reward_names(services, keys)

    async def _commands(self) -> None:
        while True:
            command = await self.bridge.aget()
            now = time.monotonic()

            match command:
                case RequestBatch():
                    self.batch_requested = True
                case PublishPolicy(policy, path):
                    self.coordinator.publish(self._serve_snapshot(policy, path), now)
                case StartEvaluation(version):
                    self.coordinator.evaluate(version, now)
                case RequestState():
                    self._write_journal()  # the state counts the events that are journalled
                    data = msgspec.msgpack.encode(self.coordinator.state())
                    await self.bridge.aput(EncodedState(data))
                case EndRun(reason):
                    self.coordinator.connected.send_all(Stop(reason=reason))
                    await self._flush()
                    return

            await self._flush()

    async def _flush(self) -> None:
        """Send what the coordinator decided, journal it, and hand over what is ready."""
        for peer, message in self.coordinator.connected.take_outgoing():
            server = self.in_process if peer == PEER else self._server
            if server is not None:
                server.send(peer, message)
        self._write_journal()

        result = self.coordinator.next_eval(time.monotonic())
        if result is not None:
            await self.bridge.aput(result)

        # A batch that is formed counts as in training, so the trainer must be free for it.
        if not self.batch_requested:
            return

        batch = self.coordinator.next_batch(time.monotonic())
        if batch is not None:
            self.batch_requested = False
            await self.bridge.aput(self._metrics())
            await self.bridge.aput(batch)
        elif self.coordinator.ledger.is_finished():
            self.batch_requested = False
            await self.bridge.aput(NoMoreBatches())

    def _metrics(self) -> QueueMetrics:
        metrics = self.coordinator.metrics()
        for server in self._servers():
            for kind, count in server.refusals.items():
                metrics[f"wire/refused_{kind}"] = float(count)
        return QueueMetrics(metrics)

    def _serve_snapshot(self, policy: Policy, path: Path | None) -> Policy:
        """Serve a snapshot to remote actors; return the policy with the endpoint to fetch from."""
        if path is None or self._snapshots is None:
            return policy
        self._snapshot_files[policy.version, policy.digest] = path
        self._snapshots.register(policy.version, policy.digest, path)
        return structs.replace(policy, endpoint=self._snapshots.endpoint)

    def _delete_old_snapshots(self) -> None:
        """Delete superseded snapshots that no actor can still ask for."""
        current = self.coordinator.policy
        if current is None or self._snapshots is None:
            return
        keep_from = min(current.version, self.coordinator.oldest_needed())
        for key, path in list(self._snapshot_files.items()):
            if key[0] < keep_from:
                del self._snapshot_files[key]
                self._snapshots.unregister(*key)
                path.unlink(missing_ok=True)

    def _write_journal(self) -> None:
        events = self.coordinator.drain_journal()
        if events:
            incarnation = self.coordinator.welcome.incarnation
            with self.journal.open("ab") as file:
                file.writelines(encode_line(incarnation, event) for event in events)
