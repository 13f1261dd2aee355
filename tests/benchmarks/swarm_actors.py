"""The actors of `tests/benchmarks/swarm.py`: many, in one process and one thread.

Each has a DEALER socket of its own and says what an actor says, but samples nothing: it answers a
task with the same 64 completions of 256 tokens. The learner's process says, a line of JSON at a
time on standard input, what they do next; what was measured is a line on standard output.
"""

import contextlib
import random
import select
import sys
import time
from collections import deque
from dataclasses import dataclass, field

import msgspec
import numpy as np
import zmq

from protocol.messages import wire
from protocol.messages.arrays import floats_bytes, ids_bytes
from protocol.messages.messages import (
    PROTOCOL_VERSION,
    Ack,
    ActorMessage,
    Applied,
    Cancel,
    Group,
    Heartbeat,
    Hello,
    Policy,
    Refuse,
    Request,
    Task,
    Welcome,
)
from protocol.messages.parts import Completion, PolicySpan, RewardResult
from protocol.transport.endpoints import connect, set_limits

GENERATIONS, TOKENS, VOCAB = 64, 256, 32_000
ROOM = 4 * GENERATIONS  # completions that an actor samples at a time
HEARTBEAT_S = 2.0
MAX_MESSAGE_BYTES = 64 << 20


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """What all actors do next, for `seconds`.

    `rate`: groups per second, of all together, at random times; 0: none; None: as fast as the
    learner takes them, each actor waiting for the acknowledgement of its last. `heartbeats`: send
    so many in all, at once, and end when the learner has read them.
    """

    seconds: float = 0.0
    rate: float | None = 0.0
    heartbeats: int = 0


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a phase came to: seconds from each group that was sent to its acknowledgement."""

    elapsed_s: float
    waits_s: list[float] = []
    heartbeats: int = 0


@dataclass
class SimulatedActor:
    """One actor: its socket, the tasks that it has, and when it sent the groups that it is owed."""

    name: str
    socket: zmq.Socket[bytes]
    tasks: deque[Task] = field(default_factory=deque[Task])
    sent: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    turns: int = 0
    tokens: int = 0
    welcomes: int = 0

    def send(self, message: ActorMessage) -> None:
        self.socket.send(wire.encode(message))

    def hello(self, digest: str) -> None:
        self.send(
            Hello(
                protocol_version=PROTOCOL_VERSION,
                actor_id=self.name,
                actor_incarnation="1",
                model_digest=digest,
                tokenizer_digest=digest,
            )
        )

    def request(self) -> None:
        """Ask for as many completions as there is room for."""
        self.send(Request(free_completions=max(0, ROOM - GENERATIONS * len(self.tasks))))

    def beat(self) -> None:
        self.turns, self.tokens = self.turns + 1, self.tokens + 1
        held = len(self.tasks) + len(self.sent)
        self.send(Heartbeat(progress=self.turns, tokens_sampled=self.tokens, groups_held=held))


class Swarm:
    """The actors, and the loop that serves their sockets."""

    def __init__(self, endpoint: str, count: int) -> None:
        context = zmq.Context()
        context.set(zmq.MAX_SOCKETS, count + 64)
        self.actors: list[SimulatedActor] = []
        self._by_fd: dict[int, SimulatedActor] = {}
        self._events = select.epoll()
        self._unread: set[int] = set()  # a socket that sends may swallow its own wake-up
        self._policy: Policy | None = None
        self._completions: list[Completion] = []
        self._ready: deque[tuple[SimulatedActor, Task]] = deque()
        self._waits: list[float] = []
        self._free_running = False

        for number in range(count):
            socket = context.socket(zmq.DEALER)
            set_limits(socket, max_message_bytes=MAX_MESSAGE_BYTES, outbox_bound=1024)  # type: ignore[arg-type]
            connect(socket, endpoint, None)  # type: ignore[arg-type]
            actor = SimulatedActor(f"actor-{number}", socket)
            fd = int(socket.getsockopt(zmq.FD))
            self.actors.append(actor)
            self._by_fd[fd] = actor
            self._events.register(fd, select.EPOLLIN)
        self._fds = {actor.name: fd for fd, actor in self._by_fd.items()}

    def join(self) -> None:
        """Have all actors welcomed and asking for work."""
        for actor in self.actors:
            actor.hello("m")
            self._touch(actor)
        while any(actor.welcomes == 0 for actor in self.actors) or self._policy is None:
            self._serve(0.1)
        for actor in self.actors:
            actor.request()
            self._touch(actor)

    def run(self, phase: Phase) -> Measured:
        """Do what a phase says."""
        self._waits = []
        if phase.heartbeats:
            return self._beats(phase.heartbeats)

        began = now = time.monotonic()
        self._free_running = phase.rate is None
        beat_at, answer_at = now, now
        turn = 0

        while (now := time.monotonic()) < began + phase.seconds:
            while beat_at <= now:  # each actor's turn comes every HEARTBEAT_S
                actor = self.actors[turn % len(self.actors)]
                actor.beat()
                self._touch(actor)
                turn, beat_at = turn + 1, beat_at + HEARTBEAT_S / len(self.actors)

            if phase.rate is None:
                self._answer_all()
            while phase.rate and answer_at <= now:
                if self._ready:
                    self._answer(*self._ready.popleft())
                answer_at += random.expovariate(phase.rate)
            due = min(beat_at, answer_at) if phase.rate else beat_at
            self._serve(max(0.0, due - time.monotonic()))

        return Measured(elapsed_s=time.monotonic() - began, waits_s=self._waits)

    def _beats(self, count: int) -> Measured:
        """Send heartbeats from all actors in turn, and wait until the learner has read them."""
        began = time.monotonic()
        each = -(-count // len(self.actors))
        before = {actor.name: actor.welcomes for actor in self.actors}
        for _ in range(each):
            for actor in self.actors:
                actor.beat()
                self._touch(actor)
            self._serve(0.0)
        for actor in self.actors:  # an enquiry is answered behind the heartbeats
            actor.hello("")
            self._touch(actor)
        while any(actor.welcomes == before[actor.name] for actor in self.actors):
            self._serve(0.1)
        return Measured(elapsed_s=time.monotonic() - began, heartbeats=each * len(self.actors))

    # ---- groups --------------------------------------------------------------------------

    def _answer_all(self) -> None:
        waiting: deque[tuple[SimulatedActor, Task]] = deque()
        while self._ready:
            actor, task = self._ready.popleft()
            if actor.sent:
                waiting.append((actor, task))
            else:
                self._answer(actor, task)
        self._ready = waiting

    def _answer(self, actor: SimulatedActor, task: Task) -> None:
        if task not in actor.tasks:  # cancelled
            return
        actor.tasks.remove(task)
        actor.tokens += GENERATIONS * TOKENS
        now = time.time()
        group = Group(
            task=task.task,
            attempt=task.attempt,
            actor_id=actor.name,
            actor_incarnation="1",
            learner_incarnation=task.task.incarnation,
            completions=self._completions,
            reward=REWARD,
            started_at=now,
            finished_at=now,
            generation_s=1.0,
            reward_s=0.0,
        )
        actor.sent[task.task.number, task.attempt] = time.monotonic()
        actor.send(group)
        actor.request()
        self._touch(actor)

    def _use(self, policy: Policy) -> None:
        if self._policy is not None and policy.version <= self._policy.version:
            return
        self._policy = policy
        rng = np.random.default_rng(policy.version)
        spans = [PolicySpan(start=0, version=policy.version, digest=policy.digest)]
        self._completions = [
            Completion(
                token_ids=ids_bytes(rng.integers(0, VOCAB, TOKENS, dtype=np.int32)),
                sampling_logprobs=floats_bytes(-rng.random(TOKENS, dtype=np.float32)),
                policy_spans=spans,
                finish_reason="length",
            )
            for _ in range(GENERATIONS)
        ]

    # ---- sockets -------------------------------------------------------------------------

    def _touch(self, actor: SimulatedActor) -> None:
        self._unread.add(self._fds[actor.name])

    def _serve(self, timeout_s: float) -> None:
        """Take in what has arrived, waiting at most so long for the first of it."""
        found = self._events.poll(0.0 if self._unread else timeout_s)
        unread, self._unread = self._unread, set()
        for fd in unread | {fd for fd, _ in found}:
            actor = self._by_fd[fd]
            with contextlib.suppress(zmq.Again):
                while True:
                    data = actor.socket.recv(zmq.NOBLOCK)
                    self._take(actor, data)

    def _take(self, actor: SimulatedActor, data: bytes) -> None:
        match wire.decode_learner(data):
            case Welcome():
                actor.welcomes += 1
            case Policy() as policy:
                self._use(policy)
                actor.send(Applied(version=policy.version, digest=policy.digest))
                self._touch(actor)
            case Task() as task:
                actor.tasks.append(task)
                self._ready.append((actor, task))
            case Cancel(task=task, attempt=attempt):
                actor.tasks = deque(
                    t for t in actor.tasks if (t.task, t.attempt) != (task, attempt)
                )
            case Ack(task=task, attempt=attempt):
                sent = actor.sent.pop((task.number, attempt), None)
                if sent is not None:
                    self._waits.append(time.monotonic() - sent)
            case Refuse() as refuse:
                raise SystemExit(f"{actor.name} was refused: {refuse.code}: {refuse.reason}")
            case _:
                pass


REWARD = RewardResult(names=["f"], rewards=floats_bytes([float(i % 2) for i in range(GENERATIONS)]))


def main() -> None:
    """Serve the phases that come on standard input, until it ends."""
    swarm = Swarm(sys.argv[1], int(sys.argv[2]))
    swarm.join()
    print(flush=True)
    for line in sys.stdin:
        measured = swarm.run(msgspec.json.decode(line, type=Phase))
        print(msgspec.json.encode(measured).decode(), flush=True)


if __name__ == "__main__":
    main()
