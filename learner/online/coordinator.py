"""The learner's side of the conversation with its actors, without a socket, clock or MLX.

The coordinator owns the ledger and the prompts. It turns messages of actors and commands of the
trainer into ledger events, and collects what must be sent: `take_outgoing`. Time is passed in.
An I/O shell (`learner/online/service.py`) moves the bytes.
"""

import logging
from collections import Counter
from dataclasses import dataclass, field

from learner.data.prompts import Prompt, PromptSource
from learner.ledger.events import AnyEvent
from learner.ledger.ledger import Ledger
from learner.ledger.types import Cancelled, Grant, LostReport, Receipt
from learner.online.actors import Peer, Terms, fault_of, is_enquiry, refusal
from learner.online.experience import CoordinatorState, EvalResult, TrainBatch
from learner.online.open_tasks import Holdings
from learner.online.tasks import figures_of, task_message
from protocol.messages.messages import (
    Ack,
    ActorMessage,
    Applied,
    Cancel,
    Failed,
    Group,
    Heartbeat,
    Hello,
    LearnerMessage,
    Policy,
    Refuse,
    Release,
    Request,
    Stop,
    Task,
)
from protocol.messages.parts import TaskId

log = logging.getLogger("pippin.learner")


@dataclass
class Coordinator:
    """Leases tasks, takes groups, announces policies. One thread at a time may call it."""

    ledger: Ledger
    prompts: PromptSource
    eval_prompts: list[Prompt]
    terms: Terms
    peers: dict[bytes, Peer] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    policy: Policy | None = None
    position: int = 0
    _held: Holdings = field(default_factory=Holdings)
    _digests: dict[int, str] = field(default_factory=dict)
    _events: int = 0
    _waiting: Policy | None = None
    _outgoing: list[tuple[bytes, LearnerMessage]] = field(default_factory=list)

    # ---- from the actors -----------------------------------------------------------------

    def receive(self, peer: bytes, message: ActorMessage, now: float) -> None:
        """Act on one message of an actor; anything but Hello needs a Hello before it."""
        known = self.peers.get(peer)
        if isinstance(message, Hello):
            self._hello(peer, message, now)
        elif known is None:
            self._refuse(peer, Refuse(code="hello_required", reason="say Hello first"))
        else:
            known.last_seen = now
            self._from_actor(peer, known, message, now)
        self.assign(now)

    def _from_actor(self, peer: bytes, actor: Peer, message: ActorMessage, now: float) -> None:
        match message:
            case Request():
                actor.stalled = False
                actor.credit = message.free_completions
            case Group():
                actor.stalled = False
                self._group(peer, actor, message, now)
            case Failed():
                actor.stalled = False
                self._failed(peer, actor, message, now)
            case Heartbeat():
                if message.progress != actor.progress:
                    actor.stalled = False
                    self.ledger.progressed(actor.actor_id, now)
                actor.progress = message.progress
                actor.tokens_per_s = message.tokens_per_s
                actor.tokens_sampled = message.tokens_sampled
            case Applied():
                actor.oldest_needed = max(actor.oldest_needed, message.version)
            case Release():
                log.info("actor %s leaves: %s", actor.actor_id, message.reason)
                self.gone(peer, now, blamed=False)
            case Hello():
                self._hello(peer, message, now)

    def _hello(self, peer: bytes, hello: Hello, now: float) -> None:
        refused = refusal(hello, self.terms.welcome)
        if refused is not None:
            self._refuse(peer, refused)
            return
        if is_enquiry(hello):
            self._send(peer, self.terms.welcome)
            return
        for other, actor in list(self.peers.items()):
            same = actor.incarnation == hello.actor_incarnation
            if actor.actor_id == hello.actor_id:
                self.gone(other, now, keep_leases=same)
            elif other == peer:
                self.gone(other, now)
        oldest = -1 if self.policy is None else self.policy.version
        self.peers[peer] = Peer(
            hello.actor_id, hello.actor_incarnation, hello.host, now, oldest_needed=oldest
        )
        self.counters["hellos"] += 1
        self._send(peer, self.terms.welcome)
        if self.policy is not None:
            self._send(peer, self.policy)
        # What was on its way to the old connection may be lost, and its lease would never expire
        # while the actor is well; an actor that has the task already takes no notice.
        for lease in self.ledger.leases_held(hello.actor_id):
            self._send(peer, self._task(lease))

    def _group(self, peer: bytes, actor: Peer, group: Group, now: float) -> None:
        ours = self.terms.welcome.incarnation
        if group.task.incarnation != ours:
            self.counters["groups_stale"] += 1
            reason = f"task {group.task} is of another learner; this one is {ours}"
            self._send(peer, Refuse(code="stale", reason=reason))
        if group.task not in self._held:
            self.ledger.received(group.task, group.attempt, actor.actor_id, now)
        elif fault := self._fault(group):
            self.counters["groups_invalid"] += 1
            log.error("group %s of actor %s: %s", group.task, actor.actor_id, fault)
            self._send(peer, Refuse(code="invalid", reason=fault))
            self._settle(group.task, self.ledger.failed(group.task, group.attempt, fault, now))
        else:
            versions = {s.version for c in group.completions for s in c.policy_spans}
            receipt = self.ledger.received(
                group.task, group.attempt, actor.actor_id, now, versions=sorted(versions)
            )
            if receipt.outcome == "accepted":
                self._held.keep(group)
            self._settle(group.task, receipt)
        self._send(peer, Ack(task=group.task, attempt=group.attempt))

    def _fault(self, group: Group) -> str:
        sampling = self.terms.sampling(self._held.kind(group.task))
        return fault_of(group, sampling, self.terms.vocab_size, self._digests)

    def _failed(self, peer: bytes, actor: Peer, message: Failed, now: float) -> None:
        log.warning("task %s of actor %s: %s", message.task, actor.actor_id, message.reason)
        receipt = self.ledger.failed(message.task, message.attempt, message.reason, now)
        self._settle(message.task, receipt)
        self._send(peer, Ack(task=message.task, attempt=message.attempt))

    def _settle(self, task: TaskId, receipt: Receipt) -> None:
        """Cancel the attempt that became needless, and forget a task that was given up."""
        if receipt.cancelled is not None:
            self._cancel([receipt.cancelled])
        if receipt.dropped:
            self._held.forget(task)

    def _cancel(self, ended: list[Cancelled]) -> None:
        holders = {actor.actor_id: peer for peer, actor in self.peers.items()}
        for lease in ended:
            if lease.actor in holders:
                self._send(holders[lease.actor], Cancel(task=lease.task, attempt=lease.attempt))
            if lease.dropped:
                self._held.forget(lease.task)

    def gone(
        self, peer: bytes, now: float, *, keep_leases: bool = False, blamed: bool = True
    ) -> None:
        """Forget an actor; its leases go to others unless it only reconnected."""
        actor = self.peers.pop(peer, None)
        if actor is not None and not keep_leases:
            self._cancel(self.ledger.actor_gone(actor.actor_id, now, blamed=blamed))

    # ---- from the trainer ----------------------------------------------------------------

    def advance(self, policy: Policy, now: float) -> None:
        """Take a new policy; one newer than the ledger's version consumes the batch in training.

        While an evaluation is open the announcement waits for it, and no task joins meanwhile: a
        task that joined now would be sampled by a policy older than the bound on staleness allows.
        """
        if policy.version > self.ledger.version:
            self.ledger.consumed()
            self._held.consumed()
        self._waiting = policy
        self._announce(now)

    def _announce(self, now: float) -> None:
        if self._waiting is not None and not self.ledger.eval_open():
            policy, self._waiting = self._waiting, None
            self.policy = policy
            self.ledger.published(policy.version, policy.digest)
            self._digests[policy.version] = policy.digest
            for peer in self.peers:
                self._send(peer, policy)
        self.assign(now)

    def evaluate(self, version: int, now: float) -> None:
        """Queue the held-out rows, pinned to a version."""
        tasks = self.ledger.join_eval(range(len(self.eval_prompts)), version, now)
        for task, prompt in zip(tasks, self.eval_prompts, strict=True):
            self._held.add(task, prompt, "eval")
        self.assign(now)

    def stop(self, reason: str) -> None:
        """Tell every actor that the run is over."""
        for peer in self.peers:
            self._send(peer, Stop(reason=reason))

    # ---- time ----------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Let leases expire, and forget actors that have been silent."""
        expired = self.ledger.expire(now)
        self._cancel(expired)
        holders = {lease.actor for lease in expired}
        for actor in self.peers.values():
            actor.stalled = actor.stalled or actor.actor_id in holders
        for peer, actor in list(self.peers.items()):
            if now - actor.last_seen > self.terms.actor_timeout_s:
                log.warning("actor %s was silent for %.0f s", actor.actor_id, now - actor.last_seen)
                self.gone(peer, now)
        self.assign(now)

    def assign(self, now: float) -> None:
        """Join new tasks while there is room, and lease what can be leased."""
        for _ in range(self.ledger.room() if self._waiting is None else 0):
            prompt = self.prompts.next()
            if prompt is None:
                self.ledger.end_of_rows(now)
                break
            task = self.ledger.join(self.position, now)
            self.position += 1
            self._held.add(task, prompt, "train")
        if self.policy is None:
            return
        for peer, actor in sorted(self.peers.items(), key=lambda item: -item[1].credit):
            if actor.credit > 0 and not actor.stalled:
                self._lease(peer, actor, now)

    def _lease(self, peer: bytes, actor: Peer, now: float) -> None:
        for lease in self.ledger.lease(actor.actor_id, actor.credit, now):
            rows = self.terms.sampling(lease.kind).num_generations
            actor.credit = max(0, actor.credit - rows)
            self._send(peer, self._task(lease))

    def _task(self, lease: Grant) -> Task:
        return task_message(lease, self._held.prompt(lease.task), self.terms, self.ledger)

    # ---- durability ----------------------------------------------------------------------

    def state(self) -> CoordinatorState:
        """Return what a resumed learner needs: ledger, prompts, and those not trained yet."""
        return CoordinatorState(
            ledger=self.ledger.state(),
            prompts=self.prompts.state(),
            position=self.position,
            outstanding=self._held.outstanding(),
            events=self._events,
        )

    def drain_journal(self) -> list[AnyEvent]:
        """Return the ledger's events since the last drain."""
        events = self.ledger.drain_events()
        self._events += len(events)
        return events

    def adopt(self, state: CoordinatorState, lost: LostReport) -> None:
        """Go on from a checkpoint: the ledger is restored already, as `lost` reports."""
        self.prompts.restore(state.prompts)
        self.position = state.position
        for task in lost.rejoined:
            self._held.add(task.new, state.outstanding[task.old.number], "train")

    # ---- results -------------------------------------------------------------------------

    def next_batch(self, now: float) -> TrainBatch | None:
        """Form the next batch if its B groups are there."""
        if not self.ledger.batch_ready():
            return None
        formed = self.ledger.form_batch(now)
        return TrainBatch(self._held.form(formed.tasks), trained_at=formed.version)

    def next_eval(self, now: float) -> EvalResult | None:
        """Return a finished evaluation."""
        if not self.ledger.eval_ready():
            return None
        done = self.ledger.take_eval()
        result = EvalResult(done.version, self._held.evaluated(done.tasks), len(done.dropped))
        self._announce(now)
        return result

    def take_outgoing(self) -> list[tuple[bytes, LearnerMessage]]:
        """Return and clear what must be sent, in order."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def rates(self) -> dict[str, float]:
        """Return the figures of the actors and the queue for metrics and display."""
        return figures_of(self.ledger, list(self.peers.values()), self.counters)

    def oldest_needed(self) -> int:
        """Return the oldest policy version whose snapshot an actor may still ask for; -1: none."""
        newest = -1 if self.policy is None else self.policy.version
        return min((a.oldest_needed for a in self.peers.values()), default=newest)

    def _send(self, peer: bytes, message: LearnerMessage) -> None:
        self._outgoing.append((peer, message))

    def _refuse(self, peer: bytes, refuse: Refuse) -> None:
        self.counters[f"refused_{refuse.code}"] += 1
        self._send(peer, refuse)
