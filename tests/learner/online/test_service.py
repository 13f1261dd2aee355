"""The I/O thread over an in-memory channel: what is journalled before what is sent, a full disk."""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import msgspec
import pytest

from learner.ledger.journal import Entry, JournalWriter
from learner.online.commands import (
    Command,
    EncodedState,
    EndRun,
    PublishPolicy,
    Reply,
    RequestBatch,
    RequestState,
)
from learner.online.experience import CoordinatorState
from learner.online.service import LearnerService
from protocol.errors import DiskError
from protocol.messages.messages import Ack, LearnerMessage, Request, Task
from protocol.transport.bridge import Bridge
from protocol.transport.memory_channel import MemoryChannel
from tests.learner.small_run import IDENTITY, coordinator, group, hello
from tests.protocol.builders import a_policy


class NotedJournal(JournalWriter):
    """A journal that notes its appends in `log`, and whose disk is full for `refusals` appends."""

    def __init__(self, folder: Path, log: list[str]) -> None:
        super().__init__(folder, IDENTITY, 0)
        self.log = log
        self.refusals = 0
        self.refused: Callable[[], None] = lambda: None

    def append(self, entries: Sequence[Entry]) -> None:
        names = [type(entry).__name__ for entry in entries]
        if entries and self.refusals:
            self.refusals -= 1
            self.refused()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().append(entries)
        self.log.extend(names)


class Bench:
    """A service with one actor that the test plays, and its journal."""

    def __init__(self, folder: Path) -> None:
        self.log: list[str] = []
        self.channel = MemoryChannel()
        self.journal = NotedJournal(folder, self.log)
        self.bridge = Bridge[Command, Reply]()
        self.service = LearnerService(
            coordinator(), [], "", self.bridge, journal=self.journal, in_process=self.channel.server
        )

    async def until(self, kind: type[LearnerMessage]) -> LearnerMessage:
        """Return the next message of a kind; those before it are noted."""
        while True:
            message = await self.channel.client.receive()
            self.log.append(type(message).__name__)
            if isinstance(message, kind):
                return message


def played(bench: Bench, play: Callable[[], object]) -> None:
    """Run the service, and an actor beside it in a loop of its own."""
    with bench.bridge:
        bench.bridge.start(lambda _: bench.service.run())
        play()
        bench.bridge.put(EndRun("over"))


def test_what_is_sent_is_in_the_journal_before(tmp_path: Path):
    bench = Bench(tmp_path)

    async def act() -> None:
        bench.channel.client.send(hello())
        bench.channel.client.send(Request(free_completions=2))
        task = await bench.until(Task)
        assert isinstance(task, Task)
        bench.channel.client.send(group(task))
        await bench.until(Ack)

    played(bench, lambda: anyio.run(act))
    log = [name for name in bench.log if name != "Policy"]
    assert log.index("TaskLeased") < log.index("Task")
    assert log.index("Group") + 1 == log.index("GroupReceived") < log.index("Ack")


def test_while_the_disk_is_full_nothing_is_acknowledged_and_then_all_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("learner.online.service.RETRY_S", 0.01)
    bench = Bench(tmp_path)
    acks_before: list[int] = []

    async def act() -> None:
        bench.channel.client.send(hello())
        bench.channel.client.send(Request(free_completions=2))
        task = await bench.until(Task)
        assert isinstance(task, Task)
        bench.journal.refused = lambda: acks_before.append(bench.log.count("Ack"))
        bench.journal.refusals = 3
        bench.channel.client.send(group(task))
        await bench.until(Ack)

    played(bench, lambda: anyio.run(act))
    assert acks_before == [0, 0, 0]
    assert [record.message for record in caplog.records if "journal" in record.message] == [
        "the journal cannot be written: [Errno 28] No space left on device. The run waits; free "
        "space within 60 s, or it ends",
        "the journal can be written again",
    ]
    assert bench.log.index("GroupReceived") < bench.log.index("Ack")


def test_a_disk_that_stays_full_ends_the_run_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("learner.online.service.RETRY_S", 0.01)
    bench = Bench(tmp_path)
    bench.service.disk_patience_s = 0.05
    bench.journal.refusals = 10**6

    def play() -> None:
        bench.channel.client.send(hello())
        bench.bridge.get(10.0)

    with pytest.raises(DiskError, match=r"could not be written for 0\.05 s: .*No space left"):
        played(bench, play)


def test_a_checkpoint_and_the_segment_that_it_begins_fit_together(tmp_path: Path):
    bench = Bench(tmp_path)

    def play() -> None:
        bench.bridge.put(PublishPolicy(a_policy(0), None, b""))
        bench.bridge.put(RequestState())
        state = bench.bridge.get(10.0)
        assert isinstance(state, EncodedState)
        decoded = msgspec.msgpack.decode(state.data, type=CoordinatorState)
        assert decoded.journal == len(bench.log) == bench.journal.number
        assert [name for name in bench.log if name == "TaskJoined"] == ["TaskJoined"] * 4
        bench.bridge.put(RequestBatch())

    played(bench, play)
