"""Takes what actors answer: groups, checked before anything trusts them, and failures."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from learner.ledger.ledger import Ledger
from learner.ledger.types import Receipt
from learner.online.actors import ConnectedActor, ConnectedActors
from learner.online.conduct import MAX_FAULTS, Conduct
from learner.online.open_tasks import OpenTasks
from learner.online.reward_names import RewardNames
from learner.online.tasks import GroupFault, group_fault, lease_fault
from protocol.messages.messages import Ack, Failed, Group, Refuse, TaskKind
from protocol.messages.parts import Sampling, TaskId

log = logging.getLogger("pippin.learner")


@dataclass
class Deliveries:
    """Accepts, discards or refuses each answer, and acknowledges it in any case.

    `digests` are those of the published policies, by version; `reward_names` those of the run's
    functions. An accepted group is kept among the open tasks, and until `take` for the journal.
    """

    ledger: Ledger
    open_tasks: OpenTasks
    connected: ConnectedActors
    sampling: Mapping[TaskKind, Sampling]
    vocab_size: int
    digests: dict[int, str] = field(default_factory=dict[int, str])
    reward_names: RewardNames = field(default_factory=RewardNames)
    _conduct: Conduct = field(default_factory=Conduct)
    _accepted: dict[TaskId, Group] = field(default_factory=dict[TaskId, Group])

    def group(self, peer: bytes, actor: ConnectedActor, group: Group, now: float) -> bool:
        """Take a group; return False if its actor is turned away, because of many such groups."""
        task, attempt = group.task, group.attempt
        ours = self.ledger.state.incarnation
        if task.incarnation != ours:
            self.connected.counters["groups_stale"] += 1
            reason = f"task {task} belongs to another learner; this one is {ours}"
            self.connected.send(peer, Refuse(code="stale", reason=reason))

        welcome = True
        # A task that is not open was trained, dropped, or is another learner's: the ledger decides.
        if task not in self.open_tasks:
            receipt = self.ledger.received(task, attempt, actor.actor_id, now)
            if receipt.outcome in ("duplicate", "dropped"):
                actor.progress.delivered()
        elif fault := self._fault(actor, group):
            welcome = self._refuse(peer, actor, group, fault, now)
        else:
            self._accept(actor, group, now)

        # Whatever became of it, the actor need not send it again.
        self.connected.send(peer, Ack(task=task, attempt=attempt))
        return welcome

    def failed(self, peer: bytes, actor: ConnectedActor, message: Failed, now: float) -> None:
        """Take the report of an attempt that gave no group."""
        task, attempt = message.task, message.attempt
        if lease_fault(actor.actor_id, actor.actor_id, self.open_tasks.holder(task, attempt)):
            self.connected.counters["failures_of_others"] += 1
        else:
            holder = self.ledger.holder(task.number)
            receipt = self.ledger.failed(task, attempt, message.reason, now)
            if receipt.outcome == "accepted":
                log.warning("task %d of actor %s: %s", task.number, actor.actor_id, message.reason)
            self._settle(task, receipt, holder)
        self.connected.send(peer, Ack(task=task, attempt=attempt))

    def turned_away(self, actor_id: str) -> Refuse | None:
        """Return the refusal of an actor that sent too many groups of no use."""
        if not self._conduct.is_turned_away(actor_id):
            return None
        reason = f"actor {actor_id} sent {MAX_FAULTS} groups that cannot be used and is turned away"
        return Refuse(code="turned_away", reason=reason, fatal=True)

    def take(self, number: int) -> Group:
        """Return a group that was accepted since it was last taken."""
        return self._accepted.pop(self.ledger.state.task_id(number))

    def _accept(self, actor: ConnectedActor, group: Group, now: float) -> None:
        """Keep a group, unless the ledger has no use for it."""
        task, holder = group.task, self.ledger.holder(group.task.number)
        versions = {span.version for c in group.completions for span in c.policy_spans}
        receipt = self.ledger.received(task, group.attempt, actor.actor_id, now, sorted(versions))
        if receipt.outcome == "accepted":
            self.open_tasks.add_group(group)
            self._accepted[task] = group
            actor.progress.delivered()
            self._conduct.useful(actor.actor_id)
        self._settle(task, receipt, holder)

    def _fault(self, actor: ConnectedActor, group: Group) -> GroupFault | None:
        sampling = self.sampling[self.open_tasks.kind(group.task)]
        holder = self.open_tasks.holder(group.task, group.attempt)
        return lease_fault(actor.actor_id, group.actor_id, holder) or group_fault(
            group, sampling, self.vocab_size, self.digests, self.reward_names.known
        )

    def _refuse(
        self, peer: bytes, actor: ConnectedActor, group: Group, fault: GroupFault, now: float
    ) -> bool:
        """Refuse a group, and return whether its actor may go on.

        The task is leased again, unless it is another actor's.
        """
        self.connected.counters["groups_invalid"] += 1
        self.connected.counters[f"groups_invalid_{fault.kind}"] += 1
        log.warning("group %d of actor %s: %s", group.task.number, actor.actor_id, fault.reason)
        self.connected.send(peer, Refuse(code="invalid", reason=fault.reason))
        if fault.kind != "lease":
            holder = self.ledger.holder(group.task.number)
            receipt = self.ledger.failed(group.task, group.attempt, fault.reason, now)
            self._settle(group.task, receipt, holder)

        if fault.kind == "reward_names" and not self.reward_names.is_certain(now):
            return True  # perhaps a reward server was restarted with other functions
        self._conduct.fault(actor.actor_id)
        refuse = self.turned_away(actor.actor_id)
        if refuse is None:
            return True
        log.warning("%s; its leases go to others. The last: %s", refuse.reason, fault.reason)
        self.connected.refuse(peer, refuse)
        return False

    def _settle(self, task: TaskId, receipt: Receipt, holder: str | None) -> None:
        """Do what follows from a receipt; `holder` had the lease before."""
        if holder is not None:
            self.connected.place(holder, idle=self.ledger.is_idle(holder))
        if receipt.cancelled is not None:
            self.connected.cancel(receipt.cancelled)
        if receipt.dropped:
            self.open_tasks.remove(task)
