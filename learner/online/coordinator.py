"""The learner's side of the conversation with its actors, without socket, clock or MLX.

The life of a prompt, and where each step happens:

    dataset row          data/prompts.py     rendered and tokenised, in training order
       │  joins          Coordinator.assign, while Ledger.room() allows it
    queued task          ledger/ledger.py    its prompt is kept in online/open_tasks.py
       │  is leased      Coordinator._lease  sends a Task (online/tasks.py)
    leased task          on the actor        progress renews the lease: _heartbeat,
       │                                     Ledger.renew_leases; otherwise tick expires it, and the
       │                                     task is leased again from the same place in the queue
       │                                     (online/progress.py: what counts as progress)
       │  is answered    Deliveries.group    checks the Group (online/tasks.py), Ledger.received
       │                                     accepts or discards it, and either way it is acked
    group                online/open_tasks.py, until the first B tasks of the queue have theirs
       │  is batched     Coordinator.next_batch, Ledger.form_batch
    TrainBatch           online/service.py ─ bridge ─ online/source.py ─ learner/trainer.py
       │  is consumed    Coordinator.publish, when the trainer publishes the next policy version
    done

The coordinator owns the ledger and the prompts. It turns messages from actors and commands from the
trainer into ledger operations, and queues what must be sent in `connected`. Time is passed in.
`online/service.py` moves the bytes.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from learner.data.prompts import Prompt, PromptSource
from learner.ledger.events import GroupReceived
from learner.ledger.journal import Entry
from learner.ledger.ledger import Ledger
from learner.ledger.types import EndedLease, Grant
from learner.online.actors import ConnectedActor, ConnectedActors, is_enquiry, refusal
from learner.online.deliveries import Deliveries
from learner.online.experience import CoordinatorState, EvalResult, TrainBatch
from learner.online.open_tasks import OpenTasks
from learner.online.progress import KEEPS_WORK, ActorProgress
from learner.online.queue_metrics import queue_metrics
from learner.online.recovery import History
from learner.online.run_watch import RunWatch
from learner.online.stalled import take_from_stalled
from learner.online.tasks import task_message
from protocol.messages.messages import (
    ActorMessage,
    Applied,
    Failed,
    Group,
    Heartbeat,
    Hello,
    Policy,
    Refuse,
    Release,
    Request,
    Task,
    TaskKind,
    Welcome,
)
from protocol.messages.parts import Sampling

log = logging.getLogger("pippin.learner")


@dataclass
class Coordinator:
    """Leases tasks, takes groups, announces policies. One thread at a time may call it.

    `position` counts the rows that joined. `policy` is the newest that was announced.
    """

    ledger: Ledger
    prompts: PromptSource
    eval_prompts: list[Prompt]
    welcome: Welcome
    sampling: Mapping[TaskKind, Sampling]
    vocab_size: int
    actor_timeout_s: float = 30.0
    policy_timeout_s: float = 300.0
    connected: ConnectedActors = field(default_factory=ConnectedActors)
    policy: Policy | None = None
    position: int = 0
    deliveries: Deliveries = field(init=False)
    _open_tasks: OpenTasks = field(default_factory=OpenTasks)
    _unannounced: tuple[Policy, bytes] | None = None
    _takes_groups: bool = True
    _awaited: set[str] = field(default_factory=set[str])
    _awaited_since: float | None = None
    _watch: RunWatch = field(default_factory=RunWatch)

    def __post_init__(self) -> None:
        """Make what takes the actors' answers."""
        self.deliveries = Deliveries(
            self.ledger, self._open_tasks, self.connected, self.sampling, self.vocab_size
        )

    # ---- messages from actors ------------------------------------------------------------

    def receive(self, peer: bytes, message: ActorMessage, now: float) -> None:
        """Act on one message of an actor; anything but Hello needs a Hello before it."""
        actor = self.connected.by_peer.get(peer)
        if isinstance(message, Hello):
            self._hello(peer, message, now)
        elif actor is None:
            self.connected.refuse(peer, Refuse(code="hello_required", reason="say Hello first"))
        else:
            actor.last_seen = now
            was_stalled = actor.progress.stall is not None
            if isinstance(message, Request | Group | Failed):
                actor.progress.turned()

            match message:
                case Request():
                    actor.credit = message.free_completions
                    self._place(actor.actor_id)
                case Group() if not self._takes_groups:
                    pass  # not acknowledged, so that it is not lost either
                case Group():
                    if not self.deliveries.group(peer, actor, message, now):
                        self.actor_gone(peer, now, blamed=False)
                case Failed():
                    self.deliveries.failed(peer, actor, message, now)
                case Heartbeat():
                    self._heartbeat(actor, message, now)
                case Applied():
                    self._applied(actor, message, now)
                case Release():
                    log.info("actor %s leaves: %s", actor.actor_id, message.reason)
                    self.actor_gone(peer, now, blamed=False)

            if was_stalled and actor.progress.stall is None:
                log.info("actor %s works again", actor.actor_id)
                self._place(actor.actor_id)

        self.assign(now)

    def _hello(self, peer: bytes, hello: Hello, now: float) -> None:
        refused = self.deliveries.turned_away(hello.actor_id) or refusal(hello, self.welcome)
        if refused is not None:
            self.connected.refuse(peer, refused)
            return
        if is_enquiry(hello):
            self.connected.send(peer, self.welcome)
            return

        progress = self._replaced(peer, hello, now)
        oldest = -1
        if self.policy is not None:
            oldest = self.policy.version
            progress.announced(oldest, now)
        actor = ConnectedActor(hello.actor_id, hello.actor_incarnation, now, oldest, progress)
        self.connected.add(peer, actor)
        self.connected.counters["hellos"] += 1
        if hello.capacity:
            log.info("actor %s: %s", hello.actor_id, hello.capacity)
        self.connected.send(peer, self.welcome)
        if self.policy is not None:
            self.connected.send(peer, self.policy)

        # Tasks on their way to the old connection may be lost, and their leases would never expire
        # while the actor makes progress. An actor that has the task already ignores it.
        for lease in self.ledger.leases_of(hello.actor_id):
            self.connected.send(peer, self._task(lease))

    def _replaced(self, peer: bytes, hello: Hello, now: float) -> ActorProgress:
        """Forget who was known by this peer or this name; return what is known of the actor."""
        known = self.connected.known(hello.actor_id, hello.actor_incarnation)
        other = self.connected.peers.get(hello.actor_id)
        if other is not None:
            # Only an actor that merely reconnected still has the work that was leased to it.
            self.actor_gone(other, now, keep_leases=known is not None)
        self.actor_gone(peer, now)
        return ActorProgress(turned_at=now) if known is None else known.progress

    def _heartbeat(self, actor: ConnectedActor, beat: Heartbeat, now: float) -> None:
        if actor.progress.heartbeat(beat, now):
            self.ledger.renew_leases(actor.actor_id, now)

    def _applied(self, actor: ConnectedActor, applied: Applied, now: float) -> None:
        actor.oldest_needed = max(actor.oldest_needed, applied.version)
        if self.policy is not None:
            actor.progress.has_applied(applied.version, self.policy.version, now)

    # ---- actors that leave or fall silent ------------------------------------------------

    def actor_gone(
        self, peer: bytes, now: float, *, keep_leases: bool = False, blamed: bool = True
    ) -> None:
        """Forget an actor; its leases go to others unless it only reconnected."""
        actor = self.connected.remove(peer)
        if actor is not None and not keep_leases:
            self._cancel(self.ledger.actor_gone(actor.actor_id, now, blamed=blamed))

    def tick(self, now: float) -> None:
        """Take work from actors that do not get on with it, and forget those that are silent."""
        self._cancel(take_from_stalled(self.ledger, self.connected, self.policy_timeout_s, now))

        for peer, actor in list(self.connected.by_peer.items()):
            if now - actor.last_seen > self.actor_timeout_s:
                log.warning("actor %s was silent for %.0f s", actor.actor_id, now - actor.last_seen)
                self.actor_gone(peer, now)

        self._give_up_awaited(now)
        self.assign(now)
        self._watch.tick(self.ledger, len(self.connected.by_peer), now)

    def _give_up_awaited(self, now: float) -> None:
        """Free the leases of actors that held some before a recovery, and have not come back."""
        if self._awaited_since is None:
            self._awaited_since = now
        if not self._awaited or now - self._awaited_since <= self.actor_timeout_s:
            return
        for name in sorted(self._awaited - self.connected.peers.keys()):
            log.warning("actor %s has not come back; its tasks go to others", name)
            self._cancel(self.ledger.actor_gone(name, now, blamed=False))
        self._awaited.clear()

    def _cancel(self, ended: list[EndedLease]) -> None:
        for lease in ended:
            actor = self.connected.named(lease.actor)
            if actor is not None and actor.progress.stall not in KEEPS_WORK:
                self.connected.cancel(lease)
            if lease.dropped:
                self._open_tasks.remove(lease.task)
            self._place(lease.actor)

    # ---- leasing -------------------------------------------------------------------------

    def assign(self, now: float) -> None:
        """Queue new tasks while there is room, and lease what can be leased."""
        # A task that joined while a policy waits to be announced would be sampled by an older
        # policy than the staleness bound allows.
        room = self.ledger.room() if self._unannounced is None else 0
        for _ in range(room):
            prompt = self.prompts.next()
            if prompt is None:
                self.ledger.end_of_rows(now)
                break
            task = self.ledger.join(self.position, now)
            self.position += 1
            self._open_tasks.add(task, prompt, "train")

        while (needed := self.ledger.completions_to_lease()) is not None:
            peer = self.connected.with_credit.first(needed)
            if peer is None or not self._lease(peer, self.connected.by_peer[peer], now):
                break

    def _place(self, actor_id: str) -> None:
        """Offer an actor for work as its room, its leases and its progress now say."""
        self.connected.place(actor_id, idle=self.ledger.is_idle(actor_id))

    def _lease(self, peer: bytes, actor: ConnectedActor, now: float) -> bool:
        """Lease what there is room for; return whether there was any."""
        grants = self.ledger.lease(actor.actor_id, actor.credit, now)
        for grant in grants:
            completions = self.sampling[grant.kind].num_generations
            actor.credit = max(0, actor.credit - completions)
            self._open_tasks.add_holder(grant.task, grant.attempt, actor.actor_id)
            self.connected.send(peer, self._task(grant))
        self._place(actor.actor_id)
        return bool(grants)

    def _task(self, grant: Grant) -> Task:
        prompt, sampling = self._open_tasks.prompt(grant.task), self.sampling[grant.kind]
        return task_message(grant, prompt, sampling, self.welcome.seed, self.ledger)

    # ---- commands from the trainer, and results for it -----------------------------------

    def publish(self, policy: Policy, now: float, tensors: bytes = b"") -> None:
        """Announce a policy; a newer version also means that the batch in training is consumed.

        While an evaluation is open the announcement waits, because actors must keep the version
        that is evaluated. `tensors` are the digests of its tensors.
        """
        if policy.version > self.ledger.state.version:
            self.ledger.consumed()
            self._open_tasks.batch_consumed()
            self._watch.stepped(now)
        self._unannounced = policy, tensors
        self._announce(now)

    def restore_policy(self, policy: Policy, now: float) -> None:
        """Go on with a policy that was published before the ledger was restored."""
        self.policy = policy
        self._send_policy(policy, now)
        self.assign(now)

    def _announce(self, now: float) -> None:
        if self._unannounced is not None and not self.ledger.state.evals:
            (self.policy, tensors), self._unannounced = self._unannounced, None
            self.ledger.published(self.policy.version, self.policy.digest, tensors)
            self.deliveries.digests[self.policy.version] = self.policy.digest
            self._send_policy(self.policy, now)
            self._watch.started(now)
        self.assign(now)

    def _send_policy(self, policy: Policy, now: float) -> None:
        self.connected.send_all(policy)
        for actor in self.connected.by_peer.values():
            actor.progress.announced(policy.version, now)

    def evaluate(self, version: int, now: float) -> None:
        """Queue the held-out rows, pinned to a version."""
        tasks = self.ledger.join_eval(range(len(self.eval_prompts)), version, now)
        for task, prompt in zip(tasks, self.eval_prompts, strict=True):
            self._open_tasks.add(task, prompt, "eval")
        self.assign(now)

    def next_batch(self, now: float) -> TrainBatch | None:
        """Form the next batch if all its groups have arrived."""
        if not self.ledger.batch_ready():
            return None
        batch = self.ledger.form_batch(now)
        return TrainBatch(self._open_tasks.take_batch(batch.tasks), trained_at=batch.version)

    def return_batch(self, reason: str, now: float) -> None:
        """Have the batch in training sampled again: it cannot be trained on.

        So have queued groups without any reward, and take no more: the run ends for that reason.
        """
        also = self._open_tasks.without_reward()
        self.ledger.return_batch(reason, now, [task.number for task in also])
        self._open_tasks.batch_returned(also)
        self._takes_groups = False

    def next_eval(self, now: float) -> EvalResult | None:
        """Return a finished evaluation, if there is one."""
        if not self.ledger.eval_ready():
            return None
        done = self.ledger.take_eval()
        groups = self._open_tasks.take_evaluation(done.tasks)
        self._announce(now)
        return EvalResult(done.version, groups, len(done.dropped))

    def metrics(self) -> dict[str, float]:
        return queue_metrics(self.ledger.state, self.connected)

    # ---- checkpoints and the journal -----------------------------------------------------

    def state(self, journal: int, settings: str = "") -> CoordinatorState:
        """Return what a later learner needs; see `CoordinatorState`."""
        return CoordinatorState(
            ledger=self.ledger.state.copy(),
            prompts=self.prompts.state(),
            position=self.position,
            tasks=self._open_tasks.contents(),
            journal=journal,
            settings=settings,
        )

    def restore(self, history: History) -> None:
        """Continue from what a journal led to, with a ledger of the same state."""
        self.position, self._open_tasks = history.position, history.tasks
        self.deliveries.open_tasks = history.tasks
        self._awaited = {lease.actor for _, lease in self.ledger.state.open_leases()}
        self.deliveries.digests |= {v: each.digest for v, each in history.published.items()}

    def drain_entries(self) -> list[Entry]:
        """Return what the journal must have before anything is sent: the events since last time."""
        entries: list[Entry] = []
        for event in self.ledger.drain_events():
            if isinstance(event, GroupReceived):
                entries.append(self.deliveries.take(event.number))
            entries.append(event)
        return entries

    # ---- snapshots -----------------------------------------------------------------------

    def oldest_needed(self) -> int:
        """Return the oldest policy version whose snapshot an actor may still fetch; -1: none."""
        newest = -1 if self.policy is None else self.policy.version
        actors = self.connected.by_peer.values()
        return min((actor.oldest_needed for actor in actors), default=newest)
