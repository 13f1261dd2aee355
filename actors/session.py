"""The actor's side of the conversation with its learner: a state machine.

Messages and results go in; what to do about them comes out of `take_actions`, in order. It has no
socket, clock or MLX; time is passed in. Every lease passes through three stages:

    Task ──▶ sampling ──generated──▶ scoring ──scored──▶ owed ──Ack──▶ (forgotten)

While its group is owed, it is sent again and again until the learner acknowledges it.
"""

import logging
from dataclasses import dataclass, field
from typing import Literal

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
from actors.bridge_messages import LeaseKey
from actors.engine.base import NO_POLICY, GenerationRequest, GenerationResult
from protocol.errors import RefusedError
from protocol.messages.arrays import ids_view
from protocol.messages.messages import (
    PROTOCOL_VERSION,
    Ack,
    ActorMessage,
    Applied,
    Cancel,
    Failed,
    Group,
    Hello,
    LearnerMessage,
    Policy,
    Refuse,
    Release,
    Request,
    Stop,
    Task,
    Welcome,
)
from protocol.messages.parts import RewardResult

log = logging.getLogger("pippin.actor")

RESEND_S = 5.0


@dataclass(frozen=True)
class ActorIdentity:
    """Who the actor is, which model and tokenizer it loaded, and how much it samples at a time."""

    actor_id: str
    incarnation: str
    host: str
    model_digest: str
    tokenizer_digest: str
    capacity: str = ""


@dataclass
class _HeldLease:
    task: Task
    stage: Literal["sampling", "scoring", "owed"] = "sampling"
    result: GenerationResult | None = None
    message: Group | Failed | None = None
    sent_at: float = 0.0


@dataclass
class Session:
    """One actor's view of its learner: whether it has joined, and the leases that it holds."""

    identity: ActorIdentity
    welcome: Welcome | None = None
    joined: bool = False
    _leases: dict[LeaseKey, _HeldLease] = field(default_factory=dict[LeaseKey, _HeldLease])
    _actions: list[Action] = field(default_factory=list[Action])
    _hello_at: float = 0.0
    _offered: int = 0  # completions that the learner may still lease to us
    _applied: Applied | None = None  # the policy that we sample with

    @property
    def groups_held(self) -> int:
        """How many leases are held, in any stage."""
        return len(self._leases)

    @property
    def groups_sampling(self) -> int:
        """How many leases are being sampled, or could be by the policy that was applied last."""
        version = NO_POLICY if self._applied is None else self._applied.version
        tasks = [lease.task for lease in self._leases.values() if lease.stage == "sampling"]
        return sum(
            task.min_policy_version <= version and task.pinned_version in (None, version)
            for task in tasks
        )

    def take_actions(self) -> list[Action]:
        """Return the actions that are due, in order, and clear them."""
        actions, self._actions = self._actions, []
        return actions

    # ---- joining and leaving -------------------------------------------------------------

    def hello(self, now: float) -> None:
        """Say who we are; nothing else is sent until the learner welcomes us."""
        self.joined = False
        self._hello_at = now
        self._send(
            Hello(
                protocol_version=PROTOCOL_VERSION,
                actor_id=self.identity.actor_id,
                actor_incarnation=self.identity.incarnation,
                host=self.identity.host,
                model_digest=self.identity.model_digest,
                tokenizer_digest=self.identity.tokenizer_digest,
                capacity=self.identity.capacity,
            )
        )

    def leave(self, reason: str) -> None:
        """Give the leases back."""
        self._send(Release(reason=reason))
        self._leases.clear()
        self.joined = False

    # ---- the learner's messages ----------------------------------------------------------

    def receive(self, message: LearnerMessage, now: float) -> None:
        """Act on one message; raises RefusedError when trying again will not help."""
        match message:
            case Welcome():
                self._welcomed(message, now)
            case Refuse():
                self._refused(message, now)
            case Task():
                self._leased(message, now)
            case Cancel():
                self._cancelled((message.task, message.attempt))
            case Ack():
                lease = self._leases.get((message.task, message.attempt))
                if lease is not None and lease.stage == "owed":
                    del self._leases[message.task, message.attempt]
            case Policy():
                self._actions.append(NotePolicy(message))
            case Stop():
                self._actions.append(LeaveRun(message.reason))

    def _welcomed(self, welcome: Welcome, now: float) -> None:
        known, self.welcome = self.welcome, welcome
        new_incarnation = known is None or known.incarnation != welcome.incarnation

        if new_incarnation:
            for key in list(self._leases):
                self._cancelled(key)
            self._applied = None
        self._actions.append(JoinRun(welcome, new_incarnation))
        if known is not None and new_incarnation:
            log.info("the learner was restarted (%s): starting over", welcome.incarnation)
            self.hello(now)
            return

        self.joined = True
        self._offered = 0
        if self._applied is not None:  # a learner that took us for gone has forgotten it
            self._send(self._applied)
        for lease in self._leases.values():
            self._send_owed(lease, now)

    def _refused(self, refuse: Refuse, now: float) -> None:
        if refuse.fatal:
            raise RefusedError(f"the learner refused this actor ({refuse.code}): {refuse.reason}")
        if refuse.code == "hello_required":
            # Several of our messages may be refused in a row: one Hello is enough.
            if self.joined:
                self.hello(now)
        else:
            log.warning("the learner refused a message (%s): %s", refuse.code, refuse.reason)

    def _leased(self, task: Task, now: float) -> None:
        key = (task.task, task.attempt)
        held = self._leases.get(key)
        if held is not None:
            self._send_owed(held, now)
            return

        self._leases[key] = _HeldLease(task)
        self._offered = max(0, self._offered - task.sampling.num_generations)
        self._actions.append(
            Sample(
                GenerationRequest(
                    key=key,
                    prompt_ids=ids_view(task.prompt_ids).tolist(),
                    sampling=task.sampling,
                    seed=task.seed,
                    min_policy_version=task.min_policy_version,
                    pinned_version=task.pinned_version,
                )
            )
        )

    def _cancelled(self, key: LeaseKey) -> None:
        lease = self._leases.pop(key, None)
        if lease is not None and lease.stage == "sampling":
            self._actions.append(CancelSampling(key))

    # ---- results -------------------------------------------------------------------------

    def generated(self, key: LeaseKey, result: GenerationResult, now: float) -> None:
        """Have a sampled group scored, or send it at once if the run has no rewards."""
        lease = self._leases.get(key)
        if lease is None:
            return

        lease.stage, lease.result = "scoring", result
        if self.welcome is not None and self.welcome.rewards:
            self._actions.append(RequestScores(lease.task, result))
        else:
            self.scored(key, RewardResult(names=[], rewards=b""), 0.0, now)

    def scored(self, key: LeaseKey, reward: RewardResult, elapsed_s: float, now: float) -> None:
        """Send the finished group, unless its lease was cancelled in the meantime."""
        lease = self._leases.get(key)
        if lease is None or lease.stage != "scoring" or lease.result is None:
            return

        result = lease.result
        lease.message = Group(
            task=lease.task.task,
            attempt=lease.task.attempt,
            actor_id=self.identity.actor_id,
            actor_incarnation=self.identity.incarnation,
            learner_incarnation=self.welcome.incarnation if self.welcome else "",
            completions=result.completions,
            reward=reward,
            started_at=result.started_at,
            finished_at=result.finished_at,
            generation_s=result.generation_s,
            reward_s=elapsed_s,
        )

        self._owe(lease, now)

    def failed(self, key: LeaseKey, reason: str, now: float) -> None:
        """Report an attempt that produced no group, for a reason on our side."""
        lease = self._leases.get(key)
        if lease is None or lease.stage == "owed":
            return
        log.warning("task %d attempt %d failed: %s", key[0].number, key[1], reason)
        lease.message = Failed(task=key[0], attempt=key[1], reason=reason)
        self._owe(lease, now)

    def not_sent(self, key: LeaseKey, reason: str, now: float) -> None:
        """Report a failure instead of a group that is too large for a message."""
        lease = self._leases.get(key)
        if lease is not None and isinstance(lease.message, Group):
            lease.message = Failed(task=key[0], attempt=key[1], reason=reason)
            self._owe(lease, now)

    def applied(self, version: int, digest: str) -> None:
        """Tell the learner which policy we sample with now."""
        self._applied = Applied(version=version, digest=digest)
        self._send(self._applied)

    # ---- time and credit -----------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Resend whatever was not answered in time."""
        if not self.joined:
            if now - self._hello_at >= RESEND_S:
                self.hello(now)
            return
        for lease in self._leases.values():
            if now - lease.sent_at >= RESEND_S:
                self._send_owed(lease, now)

    def credit(self, free_completions: int) -> None:
        """Ask for more tasks when there is more room than the learner knows of."""
        if self.joined and free_completions > self._offered:
            self._offered = free_completions
            self._send(Request(free_completions=free_completions))

    def _owe(self, lease: _HeldLease, now: float) -> None:
        lease.stage, lease.result = "owed", None
        self._send_owed(lease, now)

    def _send_owed(self, lease: _HeldLease, now: float) -> None:
        if self.joined and lease.stage == "owed" and lease.message is not None:
            lease.sent_at = now
            self._send(lease.message)

    def _send(self, message: ActorMessage) -> None:
        self._actions.append(SendToLearner(message))
