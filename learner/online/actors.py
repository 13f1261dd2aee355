"""The connected actors, the messages queued for them, and the reasons to refuse one."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from learner.ledger.types import EndedLease
from learner.online.credit import CreditQueue
from learner.online.progress import ActorProgress
from protocol.messages.messages import (
    PROTOCOL_VERSION,
    Ack,
    Cancel,
    Hello,
    LearnerMessage,
    Refuse,
    Welcome,
)

# Stalled actors that are remembered when they are gone. A run has fewer; names that a hostile peer
# makes up push out older ones.
REMEMBERED = 256

Outgoing = tuple[bytes, LearnerMessage]  # a peer, which is the transport's name for a connection


@dataclass
class ConnectedActor:
    """An actor that said Hello, as the `joined`th. `credit`: completions that it has room for.

    `oldest_needed` is the oldest policy version whose snapshot it may still fetch.
    """

    actor_id: str
    incarnation: str
    last_seen: float
    oldest_needed: int
    progress: ActorProgress
    joined: int = 0
    credit: int = 0


@dataclass
class ConnectedActors:
    """The actors by peer and by name, those with room for work, and an outbox.

    `counters` become the `wire/…` metrics.
    """

    by_peer: dict[bytes, ConnectedActor] = field(default_factory=dict[bytes, ConnectedActor])
    peers: dict[str, bytes] = field(default_factory=dict[str, bytes])  # by actor_id
    with_credit: CreditQueue = field(default_factory=CreditQueue)
    counters: Counter[str] = field(default_factory=Counter[str])
    _urgent: list[Outgoing] = field(default_factory=list[Outgoing])
    _outbox: list[Outgoing] = field(default_factory=list[Outgoing])
    _joined: int = 0
    _left_stalled: dict[str, ConnectedActor] = field(default_factory=dict[str, ConnectedActor])

    def add(self, peer: bytes, actor: ConnectedActor) -> None:
        """Add an actor whose peer and name are those of no other."""
        self._left_stalled.pop(actor.actor_id, None)
        self._joined += 1
        actor.joined = self._joined
        self.by_peer[peer] = actor
        self.peers[actor.actor_id] = peer

    def remove(self, peer: bytes) -> ConnectedActor | None:
        """Forget an actor; return it, if it was connected."""
        actor = self.by_peer.pop(peer, None)
        if actor is not None:
            del self.peers[actor.actor_id]
            self.with_credit.remove(peer)
            if actor.progress.stall is not None:
                self._left_stalled[actor.actor_id] = actor
        if len(self._left_stalled) > REMEMBERED:
            del self._left_stalled[next(iter(self._left_stalled))]
        return actor

    def known(self, actor_id: str, incarnation: str) -> ConnectedActor | None:
        """Return what is known of this process of an actor: it is connected, or left stalled."""
        actor = self.named(actor_id) or self._left_stalled.get(actor_id)
        return actor if actor is not None and actor.incarnation == incarnation else None

    def named(self, actor_id: str) -> ConnectedActor | None:
        """Return the actor of this name, if it is connected."""
        peer = self.peers.get(actor_id)
        return None if peer is None else self.by_peer[peer]

    def place(self, actor_id: str, *, idle: bool) -> None:
        """Offer an actor for work, or not, by its room and progress; `idle`: it has no lease."""
        peer = self.peers.get(actor_id)
        if peer is None:
            return

        actor = self.by_peer[peer]
        if actor.credit > 0 and actor.progress.stall is None:
            self.with_credit.put(peer, actor.credit, actor.joined, idle=idle)
        else:
            self.with_credit.remove(peer)

    def send(self, peer: bytes, message: LearnerMessage) -> None:
        # A refusal says why before its message is acknowledged: the two keep their order.
        queue = self._urgent if isinstance(message, Ack | Refuse) else self._outbox
        queue.append((peer, message))

    def send_all(self, message: LearnerMessage) -> None:
        for peer in self.by_peer:
            self.send(peer, message)

    def refuse(self, peer: bytes, refuse: Refuse) -> None:
        """Queue a refusal and count it."""
        self.counters[f"refused_{refuse.code}"] += 1
        self.send(peer, refuse)

    def cancel(self, lease: EndedLease) -> None:
        """Tell the actor that held a lease, if it is connected, to stop working on it."""
        peer = self.peers.get(lease.actor)
        if peer is not None:
            self.send(peer, Cancel(task=lease.task, attempt=lease.attempt))

    def take_outgoing(self) -> list[Outgoing]:
        """Return and clear what must be sent: acknowledgements first, otherwise in order.

        An actor sends a group again until it is acknowledged, which tasks and policies must not
        delay.
        """
        outgoing = self._urgent + self._outbox
        self._urgent, self._outbox = [], []
        return outgoing


def is_enquiry(hello: Hello) -> bool:
    """Whether an actor only asks for the run's `Welcome`: it has not loaded its model yet."""
    return not hello.model_digest and not hello.tokenizer_digest


def refusal(hello: Hello, welcome: Welcome) -> Refuse | None:
    """Return why an actor cannot work for this run, or None if it can."""
    if hello.protocol_version != PROTOCOL_VERSION:
        return Refuse(
            code="protocol_version",
            reason=f"the learner speaks protocol version {PROTOCOL_VERSION}, actor "
            f"{hello.actor_id} speaks {hello.protocol_version}; install the same version of Pippin "
            "on both",
            fatal=True,
        )

    if is_enquiry(hello):
        return None

    digests: tuple[tuple[Literal["model", "tokenizer"], str, str], ...] = (
        ("model", welcome.model_digest, hello.model_digest),
        ("tokenizer", welcome.tokenizer_digest, hello.tokenizer_digest),
    )
    for code, ours, theirs in digests:
        if ours != theirs:
            return Refuse(
                code=code,
                reason=f"the learner's {code} has digest {ours}, but that of actor "
                f"{hello.actor_id} on {hello.host or 'its host'} has {theirs}; give both the same "
                "folder",
                fatal=True,
            )
    return None
