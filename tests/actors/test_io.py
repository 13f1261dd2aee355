"""The I/O thread's program over a fake channel: commands in, events out."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import anyio
import msgspec
import pytest

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
from actors.io import ActorIo, IoThreadHandle
from protocol.errors import ChannelError, RewardError
from protocol.messages.arrays import floats_bytes
from protocol.messages.messages import (
    ActorMessage,
    Heartbeat,
    LearnerMessage,
    Policy,
    Request,
    Stop,
)
from protocol.messages.parts import RewardResult, RewardService, TaskId
from protocol.transport.bridge import Bridge, BridgeClosed
from protocol.transport.channel import Client, Server
from protocol.transport.endpoints import ipc_folder
from tests.protocol.builders import a_completion, a_group, a_welcome

KEY = (TaskId(run="r", incarnation="L1", number=1), 1)


@dataclass
class FakeBridge:
    """Both queues on one event loop; `end` closes the main side."""

    inward: asyncio.Queue[Command | None] = field(default_factory=asyncio.Queue)
    outward: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    async def aget(self) -> Command:
        command = await self.inward.get()
        if command is None:
            raise BridgeClosed("the main side has ended")
        return command

    async def aput(self, item: Event) -> None:
        await self.outward.put(item)

    def end(self) -> None:
        self.inward.put_nowait(None)


@dataclass
class FakeChannel:
    """A client channel: `sent` is what the learner gets, `incoming` what it says."""

    sent: asyncio.Queue[ActorMessage] = field(default_factory=asyncio.Queue)
    incoming: asyncio.Queue[LearnerMessage] = field(default_factory=asyncio.Queue)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def limit_messages(self, max_bytes: int) -> None:
        pass

    def send(self, message: ActorMessage) -> bool:
        self.sent.put_nowait(message)
        return True

    async def receive(self) -> LearnerMessage:
        return await self.incoming.get()


@dataclass
class FakeScorer:
    """Fails for completions "bad"; waits for `gate` for "slow" ones."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def score(
        self,
        row: bytes,
        completions: list[Any],
        completion_ids: list[list[int]],
        trainer_state: dict[str, Any],
    ) -> RewardResult:
        if completions == ["bad"]:
            raise RewardError("no server answers")
        if completions == ["slow"]:
            await self.gate.wait()
        return RewardResult(names=[row.decode()], rewards=floats_bytes([float(len(completions))]))


class House:
    """The program with its fakes on one event loop."""

    def __init__(self) -> None:
        self.channel = FakeChannel()
        self.bridge = FakeBridge()
        self.scorer = FakeScorer()
        self.opened: list[list[RewardService]] = []
        self.heartbeat: Heartbeat | None = None
        self.io = ActorIo(
            connect=lambda: self.channel,
            make_scorer=self.make_scorer,
            heartbeat=lambda: self.heartbeat,
        )

    @asynccontextmanager
    async def make_scorer(self, services: list[RewardService]) -> AsyncGenerator[FakeScorer]:
        self.opened.append(services)
        yield self.scorer

    async def run(self, scenario) -> None:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.io.run, self.bridge)
                await scenario(self)
                self.bridge.end()


def score(text: str, number: int = 1) -> ScoreGroup:
    return ScoreGroup(
        key=(TaskId(run="r", incarnation="L1", number=number), 1),
        row=b"row",
        completions=[text],
        completion_ids=[[1]],
        trainer_state={},
    )


def test_messages_pass_both_ways_and_heartbeats_come_as_often_as_the_learner_says():
    async def scenario(house: House) -> None:
        house.bridge.inward.put_nowait(Send(Request(free_completions=4)))
        assert await house.channel.sent.get() == Request(free_completions=4)
        house.channel.incoming.put_nowait(Stop(reason="done"))
        assert await house.bridge.outward.get() == MessageReceived(Stop(reason="done"))
        welcome = a_welcome(heartbeat_s=0.001)
        house.channel.incoming.put_nowait(welcome)
        assert await house.bridge.outward.get() == MessageReceived(welcome)
        house.heartbeat = Heartbeat(progress=7, groups_held=2)
        assert await house.channel.sent.get() == Heartbeat(progress=7, groups_held=2)

    house = House()
    anyio.run(house.run, scenario)


def test_a_slow_reward_delays_its_own_group_alone():
    services = [RewardService(endpoints=["ipc://x"], timeout_s=1.0)]

    async def scenario(house: House) -> None:
        for command in (
            score("early", 0),
            UseRewards(services),
            UseRewards(services),
            score("slow", 1),
            score("bad", 2),
            score("good", 3),
        ):
            house.bridge.inward.put_nowait(command)
        early = await house.bridge.outward.get()
        assert isinstance(early, GroupScoreFailed)
        failed = await house.bridge.outward.get()
        assert failed == GroupScoreFailed(score("bad", 2).key, "no server answers")
        good = await house.bridge.outward.get()
        assert isinstance(good, GroupScored)
        assert good.key == score("good", 3).key
        house.scorer.gate.set()
        slow = await house.bridge.outward.get()
        assert isinstance(slow, GroupScored)
        assert slow.key == score("slow", 1).key
        assert slow.reward == RewardResult(names=["row"], rewards=floats_bytes([1.0]))
        assert house.opened == [services]

    house = House()
    anyio.run(house.run, scenario)


def test_snapshots_are_read_from_the_file_if_it_is_the_right_one(tmp_path):
    path = tmp_path / "p1"
    path.write_bytes(b"weights")

    async def scenario(house: House) -> None:
        whole = Policy(version=1, digest="d", size=7, path=str(path))
        house.bridge.inward.put_nowait(FetchSnapshot(whole))
        assert await house.bridge.outward.get() == SnapshotFetched(whole, b"weights")
        for policy, reason in (
            (msgspec.structs.replace(whole, size=8), "holds 7 bytes, not 8"),
            (msgspec.structs.replace(whole, path=str(path) + "x"), "No such file"),
            (msgspec.structs.replace(whole, path=""), "neither a file nor an endpoint"),
        ):
            house.bridge.inward.put_nowait(FetchSnapshot(policy))
            failed = await house.bridge.outward.get()
            assert isinstance(failed, SnapshotFetchFailed)
            assert reason in failed.reason

    house = House()
    anyio.run(house.run, scenario)


def test_over_a_real_bridge_errors_reach_the_main_thread():
    @asynccontextmanager
    async def unusable() -> AsyncGenerator[Any]:
        raise ChannelError("cannot connect")
        yield

    io = ActorIo(connect=unusable, make_scorer=House().make_scorer, heartbeat=lambda: None)

    def main_thread() -> None:
        with Bridge[Command, Event]() as bridge:
            bridge.start(io.run)
            IoThreadHandle(bridge).wait(10.0)
            raise AssertionError("the error did not come")

    with pytest.raises(ChannelError, match="cannot connect"):
        main_thread()


def test_the_handle_keeps_what_it_waited_for():
    async def announce(bridge: Any) -> None:
        await bridge.aput(MessageReceived(Stop(reason="1")))
        await bridge.aput(MessageReceived(Stop(reason="2")))
        with pytest.raises(BridgeClosed):
            await bridge.aget()

    with Bridge[Command, Event]() as bridge:
        bridge.start(announce)
        io = IoThreadHandle(bridge)
        seen: list[Event] = []
        while len(seen) < 2:
            io.wait(10.0)
            seen.extend(io.poll())
        assert seen == [MessageReceived(Stop(reason="1")), MessageReceived(Stop(reason="2"))]
        assert io.poll() == []


def test_a_group_above_the_learners_limit_is_refused_here_with_the_settings_name():
    group = a_group([a_completion(range(1000))])

    async def scenario() -> None:
        bridge = FakeBridge()
        with ipc_folder() as folder, anyio.fail_after(10):
            async with (
                Server([f"ipc://{folder}/s"], max_message_bytes=4000) as server,
                anyio.create_task_group() as tasks,
            ):
                io = ActorIo(lambda: Client(server.endpoint), House().make_scorer, lambda: None)
                tasks.start_soon(io.run, bridge)
                bridge.inward.put_nowait(Send(Request(free_completions=4)))
                peer, _ = await server.receive()
                server.send(peer, a_welcome(max_message_bytes=4000))
                assert isinstance(await bridge.outward.get(), MessageReceived)
                bridge.inward.put_nowait(Send(group))
                refused = await bridge.outward.get()
                assert isinstance(refused, NotSent)
                assert refused.key == (group.task, group.attempt)
                assert "at most 4000 bytes" in refused.reason
                assert "raise transport.max_message_mb" in refused.reason
                bridge.end()
        assert not server.refusals

    anyio.run(scenario)
