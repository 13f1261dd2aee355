"""The learner's I/O thread: sockets to the actors on one side, the trainer's bridge on the other.

The coordinator, which owns the ledger, decides; the service moves bytes. After every message,
command and tick, `_flush` writes what the coordinator decided to the journal, then sends it, and
hands finished batches and evaluations to the trainer.

If the journal cannot be written (the disk is full), nothing is sent, received or decided until it
can (`learner/full_disk.py`); a disk that stays full ends the run, which can be resumed.
"""

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
from msgspec import structs

from learner.full_disk import PATIENCE_S, RETRY_S, DiskWait
from learner.ledger.journal import Entry, JournalWriter
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
    RestorePolicy,
    ReturnBatch,
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
SYNC_S = 1.0  # between two times that the journal is made to survive a power cut
SnapshotKey = tuple[int, str]  # version and digest


@dataclass
class LearnerService:
    """Runs the coordinator over sockets until the trainer ends the run.

    `in_process` is the channel to an actor in this process; with it there may be no `endpoints`,
    and then no socket is opened. Without `journal`, a run cannot be continued.
    `drop_old_segments` is called when a checkpoint is made.
    """

    coordinator: Coordinator
    endpoints: list[str]
    snapshot_endpoint: str
    bridge: Bridge[Command, Reply]
    journal: JournalWriter | None = None
    keys: str = ""
    max_message_bytes: int = 64 << 20
    in_process: MemoryServer | None = None
    batch_requested: bool = False
    drop_old_segments: Callable[[], None] = lambda: None
    disk_patience_s: float = PATIENCE_S
    _flushing: anyio.Lock = field(default_factory=anyio.Lock)
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
                if self.journal is not None:
                    tasks.start_soon(self._sync, self.journal)
                tasks.start_soon(self._learn_reward_names)
                await self._commands()
                tasks.cancel_scope.cancel()
        if self.journal is not None:
            self.journal.close()

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
        keys, names = own_client_keys(self.keys), self.coordinator.deliveries.reward_names
        while True:
            names.learned(await reward_names(services, keys), time.monotonic())
            while not names.doubted:  # noqa: ASYNC110 - the coordinator knows no events
                await anyio.sleep(TICK_S)

    async def _commands(self) -> None:
        while True:
            command = await self.bridge.aget()
            now = time.monotonic()

            match command:
                case RequestBatch():
                    self.batch_requested = True
                case PublishPolicy(policy, path, tensors):
                    announced = self._serve_snapshot(policy, path)
                    self.coordinator.publish(announced, now, tensors)
                case RestorePolicy(policy, path):
                    self.coordinator.restore_policy(self._serve_snapshot(policy, path), now)
                case StartEvaluation(version):
                    self.coordinator.evaluate(version, now)
                case RequestState():
                    await self.bridge.aput(await self._state())
                case ReturnBatch(reason):
                    self.coordinator.return_batch(reason, now)
                case EndRun(reason):
                    self.coordinator.connected.send_all(Stop(reason=reason))
                    await self._flush()
                    return

            await self._flush()

    async def _flush(self) -> None:
        """Journal what the coordinator decided, then send it, and hand over what is ready."""
        async with self._flushing:
            replies = self._replies()
            entries = self.coordinator.drain_entries()
            outgoing = self.coordinator.connected.take_outgoing()

            await self._write(entries)
            for peer, message in outgoing:
                server = self.in_process if peer == PEER else self._server
                if server is not None:
                    server.send(peer, message)
            for reply in replies:
                await self.bridge.aput(reply)

    def _replies(self) -> list[Reply]:
        """Return a finished evaluation and, if the trainer waits for one, a batch; or their end."""
        replies: list[Reply] = []
        result = self.coordinator.next_eval(time.monotonic())
        if result is not None:
            replies.append(result)

        # A batch that is formed counts as in training, so the trainer must be free for it.
        if self.batch_requested:
            batch = self.coordinator.next_batch(time.monotonic())
            if batch is not None:
                replies += [self._metrics(), batch]
                self.batch_requested = False
            elif self.coordinator.ledger.is_finished():
                replies.append(NoMoreBatches())
                self.batch_requested = False
        return replies

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

    # ---- the journal ---------------------------------------------------------------------

    async def _write(self, entries: list[Entry]) -> None:
        """Append to the journal; while the disk does not take it, wait, and let nothing go on."""
        if self.journal is None:
            return

        wait = DiskWait("the journal", self.disk_patience_s)
        while True:
            try:
                self.journal.append(entries)
            except OSError as error:
                wait.refused(error)
                await anyio.sleep(RETRY_S)
            else:
                wait.taken()
                return

    async def _sync(self, journal: JournalWriter) -> None:
        while True:
            await anyio.sleep(SYNC_S)
            await anyio.to_thread.run_sync(journal.sync)

    async def _state(self) -> EncodedState:
        """Return the state for a checkpoint, with which a segment of the journal begins."""
        async with self._flushing:
            while entries := self.coordinator.drain_entries():
                await self._write(entries)
            number, settings = 0, ""
            if self.journal is not None:
                number = self.journal.begin_segment(self.coordinator.ledger.state.version)
                settings = self.journal.identity.settings
                self.drop_old_segments()
            state = self.coordinator.state(number, settings)
            return EncodedState(msgspec.msgpack.encode(state))
