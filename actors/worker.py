"""The actor's main thread: tasks in, groups out.

    learner ──Task──▶ Session ──▶ Engine ──groups──▶ scoring (I/O thread) ──▶ Session ──Group──▶
            ◀─credit─            ◀─weights─ PolicyStore ◀─snapshots (I/O thread)

What an actor holds is bounded by the credit that its session gives, which is the engine's free
completions. A group is kept until the learner acknowledges it. The worker does not own the process:
the program around it calls `advance` in a loop.
"""

import time
from collections.abc import Callable
from typing import Any, cast

import msgspec

from actors.actions import (
    Action,
    CancelSampling,
    JoinRun,
    LeaveRun,
    NotePolicy,
    RequestScores,
    Sample,
    SendToLearner,
)
from actors.bridge_messages import (
    Command,
    Event,
    FetchSnapshot,
    GroupScored,
    GroupScoreFailed,
    IoThread,
    LeaseKey,
    MessageReceived,
    NotSent,
    ScoreGroup,
    Send,
    SnapshotFetched,
    SnapshotFetchFailed,
    UseRewards,
)
from actors.engine.base import Engine, GenerationResult
from actors.policy_store import PolicyStore
from actors.session import Session
from protocol.errors import DataError, ModelError
from protocol.messages.arrays import ids_view
from protocol.messages.messages import Heartbeat, Policy, Task
from protocol.messages.parts import MemoryUse

RATE_WINDOW_S = 2.0

Load = Callable[[Policy, bytes], Callable[[], None]]


class Worker:
    """Drives an engine for a learner, which it talks to through the I/O thread.

    `decode` turns completion token IDs into text for the rewards. `load(policy, data)` reads a
    snapshot's bytes, checks the digest, and returns a function that puts it into the model; it
    raises SnapshotError. `memory` says what this process holds. `heartbeat` is None until the
    learner has welcomed us; another thread may read it at any time.
    """

    def __init__(
        self,
        engine: Engine,
        session: Session,
        io: IoThread,
        *,
        decode: Callable[[list[int]], str],
        load: Load,
        memory: Callable[[], MemoryUse] = MemoryUse,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.heartbeat: Heartbeat | None = None
        self.stopped: str | None = None  # why the run is over, once it is
        self._engine = engine
        self._session = session
        self._io = io
        self._decode = decode
        self._load = load
        self._memory = memory
        self._clock = clock

        self._policies = PolicyStore(engine.wants_policy)
        self._progress = 0
        self._tokens = 0
        self._tokens_read = 0
        self._rate = _Rate(clock())

    def start(self) -> None:
        self._session.hello(self._clock())
        self._perform()

    def advance(self) -> bool:
        """Do what can be done now, at most one decode step; False if there was nothing to do.

        Raises RefusedError, SnapshotError, and whatever the I/O thread raised.
        """
        now = self._clock()

        busy = False
        for event in self._io.poll():
            busy = True
            self._take(event, now)
            self._perform()

        self._swap_policy()
        busy = self._step_engine(now) or busy

        self._session.tick(now)
        self._session.credit(self._engine.free_completions)
        policy = self._policies.next_fetch(now)
        if policy is not None:
            self._io.put(FetchSnapshot(policy))

        self._perform()
        self._update_heartbeat()
        return busy

    def leave(self, reason: str) -> None:
        """Give the leases back and drop the engine's requests."""
        self._session.leave(reason)
        self._engine.reset()
        self._perform()

    # ---- events --------------------------------------------------------------------------

    def _take(self, event: Event, now: float) -> None:
        match event:
            case MessageReceived(message):
                self._session.receive(message, now)
            case SnapshotFetched(policy, data):
                self._policies.fetched(policy, data)
            case SnapshotFetchFailed(policy, reason):
                self._policies.failed(policy, reason, now)
            case GroupScored(key, reward, elapsed_s):
                self._session.scored(key, reward, elapsed_s, now)
            case GroupScoreFailed(key, reason):
                self._session.failed(key, f"scoring failed: {reason}", now)
            case NotSent(key, reason):
                self._session.not_sent(key, reason, now)

    def _swap_policy(self) -> None:
        """Give a fetched policy to the engine, between two decode steps."""
        taken = self._policies.take()
        if taken is None:
            return

        policy, data = taken
        self._engine.set_policy(self._load(policy, data), policy.version, policy.digest)
        self._session.applied(policy.version, policy.digest)

    def _step_engine(self, now: float) -> bool:
        step = self._engine.step()
        self._tokens += step.tokens
        self._tokens_read += step.prefilled
        for result in step.finished:
            self._session.generated(cast(LeaseKey, result.key), result, now)
        return step.made_progress

    # ---- actions -------------------------------------------------------------------------

    def _perform(self) -> None:
        while actions := self._session.take_actions():
            for action in actions:
                self._act(action)

    def _act(self, action: Action) -> None:
        match action:
            case SendToLearner(message):
                self._io.put(Send(message))
            case Sample(request):
                try:
                    self._engine.add(request)
                except (DataError, ModelError) as error:
                    key = cast(LeaseKey, request.key)
                    self._session.failed(key, str(error), self._clock())
            case CancelSampling(key):
                self._engine.cancel(key)
            case RequestScores(task, result):
                self._io.put(self._score(task, result))
            case NotePolicy(policy):
                self._policies.announce(policy)
            case JoinRun(welcome, new_incarnation):
                if new_incarnation:
                    self._engine.reset()
                    self._policies.reset()
                self._io.put(UseRewards(welcome.rewards))
            case LeaveRun(reason):
                self.stopped = reason

    def _score(self, task: Task, result: GenerationResult) -> Command:
        ids = [ids_view(completion.token_ids).tolist() for completion in result.completions]
        return ScoreGroup(
            key=(task.task, task.attempt),
            row=task.row,
            completions=as_answers(task.row, [self._decode(tokens) for tokens in ids]),
            completion_ids=ids,
            trainer_state=task.trainer_state,
        )

    def _update_heartbeat(self) -> None:
        # Every turn of the loop counts: the learner takes it for progress while nothing can be
        # sampled, such as while groups are scored.
        self._progress += 1
        if not self._session.joined:
            self.heartbeat = None
            return

        self.heartbeat = Heartbeat(
            progress=self._progress,
            tokens_sampled=self._tokens,
            tokens_read=self._tokens_read,
            tokens_per_s=self._rate.update(self._tokens, self._clock()),
            groups_held=self._session.groups_held,
            groups_sampling=self._session.groups_sampling,
            memory=self._memory(),
        )


class _Rate:
    """Tokens per second over the last window."""

    def __init__(self, now: float) -> None:
        self._since, self._tokens, self._rate = now, 0, 0.0

    def update(self, tokens: int, now: float) -> float:
        elapsed = now - self._since
        if elapsed >= RATE_WINDOW_S:
            self._rate = (tokens - self._tokens) / elapsed
            self._since, self._tokens = now, tokens
        return self._rate


class _Prompt(msgspec.Struct):
    prompt: Any = ""


def as_answers(row: bytes, texts: list[str]) -> list[Any]:
    """Return completions as reward functions take them: strings, or messages if the prompt is."""
    prompt = msgspec.json.decode(row, type=_Prompt).prompt
    if not isinstance(prompt, list):
        return list(texts)
    return [[{"role": "assistant", "content": text}] for text in texts]
