"""The learner's I/O thread: sockets on one side, the trainer's bridge on the other.

The trainer's commands come in through the bridge and what it waits for goes out through it; the
coordinator, which owns the ledger, decides in between. Everything here handles bytes and numpy.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import msgspec

from learner.ledger.journal import encode_line
from learner.online.commands import (
    Command,
    Evaluate,
    Exhausted,
    Finish,
    Publish,
    Rates,
    SourceState,
    WantBatch,
    WantState,
)
from learner.online.coordinator import Coordinator
from protocol.messages.messages import Policy
from protocol.transport.bridge import Bridge
from protocol.transport.channel import Server
from protocol.transport.snapshot_channel import SnapshotServer

log = logging.getLogger("pippin.learner")
TICK_S = 0.25


@dataclass
class Service:
    """Run the coordinator over sockets until the trainer says Finish."""

    coordinator: Coordinator
    endpoints: list[str]
    snapshot_endpoint: str
    bridge: Bridge
    journal: Path
    keys: str = ""
    max_message_bytes: int = 64 << 20
    wants_batch: bool = False
    _policies: dict[tuple[int, str], Path] = field(default_factory=dict)

    async def run(self) -> None:
        """Serve until Finish; errors end the bridge and are raised at the trainer."""
        async with (
            Server(
                self.endpoints, keys=self.keys or None, max_message_bytes=self.max_message_bytes
            ) as server,
            SnapshotServer(self.snapshot_endpoint, keys=self.keys or None) as snapshots,
        ):
            self._server, self._snapshots = server, snapshots
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._receive)
                tasks.start_soon(self._tick)
                await self._commands()
                tasks.cancel_scope.cancel()

    async def _receive(self) -> None:
        while True:
            peer, message = await self._server.receive()
            self.coordinator.receive(peer, message, time.monotonic())
            await self._flush()

    async def _tick(self) -> None:
        while True:
            await anyio.sleep(TICK_S)
            for peer in self._server.take_gone():
                self.coordinator.gone(peer, time.monotonic())
            self.coordinator.tick(time.monotonic())
            self._retire_snapshots()
            await self._flush()

    async def _commands(self) -> None:
        while True:
            command: Command = await self.bridge.aget()
            now = time.monotonic()
            match command:
                case WantBatch():
                    self.wants_batch = True
                case Publish(policy, path):
                    self._serve(policy, path)
                    self.coordinator.advance(self._announced(policy), now)
                case Evaluate(version):
                    self.coordinator.evaluate(version, now)
                case WantState():
                    await self.bridge.aput(self._state())
                case Finish(reason):
                    self.coordinator.stop(reason)
                    await self._flush()
                    return
            await self._flush()

    async def _flush(self) -> None:
        """Send what the coordinator decided, journal it, and hand over what is ready."""
        for peer, message in self.coordinator.take_outgoing():
            self._server.send(peer, message)
        self._write_journal()
        result = self.coordinator.next_eval(time.monotonic())
        if result is not None:
            await self.bridge.aput(result)
        if not self.wants_batch:
            return
        batch = self.coordinator.next_batch(time.monotonic())
        if batch is not None:
            self.wants_batch = False
            await self.bridge.aput(self._rates())
            await self.bridge.aput(batch)
        elif self.coordinator.ledger.finished:
            self.wants_batch = False
            await self.bridge.aput(Exhausted())

    def _rates(self) -> Rates:
        figures = self.coordinator.rates()
        for kind, count in self._server.refusals.items():
            figures[f"wire/refused_{kind}"] = float(count)
        return Rates(figures)

    def _state(self) -> SourceState:
        self._write_journal()  # what the state counts as journalled must be there
        return SourceState(msgspec.msgpack.encode(self.coordinator.state()))

    def _serve(self, policy: Policy, path: Path) -> None:
        self._policies[policy.version, policy.digest] = path
        self._snapshots.register(policy.version, policy.digest, path)

    def _announced(self, policy: Policy) -> Policy:
        return msgspec.structs.replace(policy, endpoint=self._snapshots.endpoint)

    def _retire_snapshots(self) -> None:
        """Delete superseded files that no actor can still ask for."""
        current = self.coordinator.policy
        if current is None:
            return
        keep_from = min(current.version, self.coordinator.oldest_needed())
        for key, path in list(self._policies.items()):
            if key[0] < keep_from:
                del self._policies[key]
                self._snapshots.unregister(*key)
                path.unlink(missing_ok=True)

    def _write_journal(self) -> None:
        events = self.coordinator.drain_journal()
        if events:
            incarnation = self.coordinator.terms.welcome.incarnation
            with self.journal.open("ab") as file:
                file.writelines(encode_line(incarnation, event) for event in events)
