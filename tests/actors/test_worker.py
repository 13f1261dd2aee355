"""The worker over a fake engine and a fake I/O thread: what follows what."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors.bridge_messages import (
    Command,
    Event,
    FetchSnapshot,
    GroupScored,
    GroupScoreFailed,
    MessageReceived,
    ScoreGroup,
    Send,
    SnapshotFetched,
    SnapshotFetchFailed,
    UseRewards,
)
from actors.engine.base import EngineStep, GenerationRequest, GenerationResult
from actors.session import ActorIdentity, Session
from actors.worker import Worker, as_answers
from protocol.errors import DataError, RefusedError, SnapshotError
from protocol.messages.messages import (
    Ack,
    Applied,
    Cancel,
    Failed,
    Group,
    Heartbeat,
    Hello,
    Policy,
    Refuse,
    Release,
    Request,
    Stop,
)
from protocol.messages.parts import MemoryUse
from tests.protocol.builders import a_completion, a_policy, a_reward, a_task, a_welcome


@dataclass
class FakeEngine:
    """Finishes every request in two steps; records what was asked of it."""

    log: list[Any] = field(default_factory=list)
    version: int = -1
    held: dict[Hashable, int] = field(default_factory=dict)
    requests: dict[Hashable, GenerationRequest] = field(default_factory=dict)
    pinned: bool = False

    @property
    def free_completions(self) -> int:
        return 8 - 2 * len(self.held)

    def add(self, request: GenerationRequest) -> None:
        if request.prompt_ids == [99]:
            raise DataError("token IDs must lie in [0, 50), got 99")
        self.held[request.key] = 0
        self.log.append(("add", request.key))

    def cancel(self, key: Hashable) -> bool:
        self.log.append(("cancel", key))
        return self.held.pop(key, None) is not None

    def wants_policy(self, version: int) -> bool:
        return version > self.version and not self.pinned

    def set_policy(self, apply: Callable[[], None], version: int, digest: str) -> None:
        apply()
        self.version = version
        self.log.append(("policy", version, digest))

    def step(self) -> EngineStep:
        done = [key for key, steps in self.held.items() if steps == 1]
        running = len(self.held)
        self.held = {key: 1 for key in self.held if key not in done}
        return EngineStep(finished=[finished(key) for key in done], tokens=2 * running)

    def reset(self) -> None:
        self.held.clear()
        self.version = -1
        self.log.append("reset")


def finished(key: Hashable) -> GenerationResult:
    completions = [a_completion([1, 2]), a_completion([3])]
    return GenerationResult(key=key, completions=completions, started_at=1.0, finished_at=2.0)


@dataclass
class FakeIo:
    """Events are put in by the test; commands pile up."""

    events: list[Event] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)

    def poll(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def put(self, command: Command) -> None:
        self.commands.append(command)

    def take(self) -> list[Any]:
        commands, self.commands = self.commands, []
        return [c.message if isinstance(c, Send) else c for c in commands]


class House:
    """A worker with its fakes, joined to learner L1."""

    def __init__(self) -> None:
        self.now = 0.0
        self.applied: list[tuple[Any, str]] = []
        self.engine, self.io = FakeEngine(), FakeIo()
        session = Session(ActorIdentity("a0", "i0", "host", model_digest="m", tokenizer_digest="t"))
        self.worker = Worker(
            self.engine,
            session,
            self.io,
            decode=lambda ids: " ".join(str(i) for i in ids),
            load=self.load,
            memory=lambda: MemoryUse(active_bytes=int(self.now), peak_bytes=9),
            clock=lambda: self.now,
        )
        self.worker.start()
        self.hear(a_welcome())
        self.io.take()

    def load(self, policy: Policy, source: bytes) -> Callable[[], None]:
        if source == b"bad":
            raise SnapshotError("digest differs")
        return lambda: self.applied.append((source, policy.digest))

    @property
    def beat(self) -> Heartbeat:
        assert self.worker.heartbeat is not None
        return self.worker.heartbeat

    def hear(self, *messages: Any) -> bool:
        self.io.events.extend(MessageReceived(message) for message in messages)
        return self.worker.advance()

    def tell(self, *events: Event) -> bool:
        self.io.events.extend(events)
        return self.worker.advance()


REWARD = a_reward([1.0, 0.0])


def test_joining_says_hello_then_uses_the_rewards_then_asks_for_work():
    house = House()
    worker = Worker(
        FakeEngine(),
        Session(ActorIdentity("a0", "i0", "h", model_digest="m", tokenizer_digest="t")),
        house.io,
        decode=str,
        load=house.load,
        clock=lambda: 0.0,
    )
    worker.start()
    house.io.events.append(MessageReceived(a_welcome()))
    assert worker.advance()
    hello, rewards, request = house.io.take()
    assert isinstance(hello, Hello)
    assert rewards == UseRewards(a_welcome().rewards)
    assert request == Request(free_completions=8)
    assert not worker.advance()
    assert worker.heartbeat is not None
    assert worker.heartbeat.progress == 2


def test_a_group_from_lease_to_acknowledgement():
    house = House()
    lease = a_task(trainer_state={"global_step": 3})
    key = (lease.task, 1)
    assert house.hear(lease)
    assert house.engine.log == ["reset", ("add", key)]
    assert (house.beat.groups_held, house.beat.groups_sampling) == (1, 0)  # its policy is to come
    house.io.take()
    house.worker.advance()
    score, request = house.io.take()
    assert score == ScoreGroup(
        key=key,
        row=lease.row,
        completions=["1 2", "3"],
        completion_ids=[[1, 2], [3]],
        trainer_state={"global_step": 3},
    )
    assert request == Request(free_completions=8)
    house.tell(GroupScored(key, REWARD, 0.5))
    (group,) = house.io.take()
    assert isinstance(group, Group)
    assert (group.reward, group.reward_s) == (REWARD, 0.5)
    house.now = 5.0
    house.worker.advance()
    assert house.io.take() == [group]
    house.hear(Ack(task=lease.task, attempt=1))
    house.now = 50.0
    house.worker.advance()
    assert house.io.take() == []
    assert house.beat.groups_held == 0
    assert (house.beat.tokens_sampled, house.beat.tokens_read) == (4, 0)
    assert house.beat.memory == MemoryUse(active_bytes=50, peak_bytes=9)


def test_what_fails_here_is_reported_and_the_rest_goes_on():
    house = House()
    bad, good = a_task(1, prompt=(99,)), a_task(2)
    house.hear(bad, good)
    failed = next(m for m in house.io.take() if isinstance(m, Failed))
    assert failed.reason == "token IDs must lie in [0, 50), got 99"
    house.worker.advance()
    house.tell(GroupScoreFailed((good.task, 1), "no server"))
    failed = next(m for m in house.io.take() if isinstance(m, Failed))
    assert (failed.task, failed.reason) == (good.task, "scoring failed: no server")


def test_a_policy_is_fetched_put_in_force_and_reported():
    house = House()
    house.hear(a_policy(0))
    assert house.io.take() == [FetchSnapshot(a_policy(0))]
    house.tell(SnapshotFetched(a_policy(0), b"p0"))
    assert house.applied == [(b"p0", "d0")]
    assert house.io.take() == [Applied(version=0, digest="d0")]
    house.engine.pinned = True
    house.hear(a_policy(1))
    assert house.io.take() == []
    house.engine.pinned = False
    house.worker.advance()
    assert house.io.take() == [FetchSnapshot(a_policy(1))]
    house.tell(SnapshotFetchFailed(a_policy(1), "no longer served"))
    assert house.io.take() == []
    house.now = 1.0
    house.worker.advance()
    assert house.io.take() == [FetchSnapshot(a_policy(1))]
    with pytest.raises(SnapshotError):
        house.tell(SnapshotFetched(a_policy(1), b"bad"))
    assert house.engine.version == 0


def test_a_new_learner_starts_everything_anew():
    house = House()
    house.hear(a_policy(7))
    house.tell(SnapshotFetched(a_policy(7), b"w"))
    house.hear(a_task())
    house.io.take()
    house.engine.log.clear()
    house.hear(a_welcome("L2"), a_policy(0))
    assert house.engine.log == [("cancel", (a_task().task, 1)), "reset"]
    rewards, hello, fetch = house.io.take()
    assert (rewards, fetch) == (UseRewards(a_welcome().rewards), FetchSnapshot(a_policy(0)))
    assert isinstance(hello, Hello)
    house.tell(SnapshotFetched(a_policy(0), b"w0"))
    assert house.engine.version == 0


def test_cancel_stop_and_refusal():
    house = House()
    lease = a_task()
    house.hear(lease, Cancel(task=lease.task, attempt=1))
    assert house.engine.log[-1] == ("cancel", (lease.task, 1))
    assert house.worker.stopped is None
    house.hear(Stop(reason="done"))
    assert house.worker.stopped == "done"
    house.io.take()
    house.worker.leave("done")
    assert house.io.take() == [Release(reason="done")]
    with pytest.raises(RefusedError, match="protocol_version"):
        house.hear(Refuse(code="protocol_version", reason="1, not 2", fatal=True))


def test_completions_match_the_prompts_form():
    assert as_answers(b'{"prompt":"2+2="}', ["4", "5"]) == ["4", "5"]
    row = b'{"prompt":[{"role":"user","content":"2+2"}],"answer":4}'
    assert as_answers(row, ["4", "5"]) == [
        [{"role": "assistant", "content": "4"}],
        [{"role": "assistant", "content": "5"}],
    ]
