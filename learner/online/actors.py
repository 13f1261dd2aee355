"""The connected actors, the messages queued for them, and the reasons to refuse one."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from learner.ledger.types import EndedLease
from protocol.messages.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Heartbeat,
    Hello,
    LearnerMessage,
    Refuse,
    Welcome,
)

Outgoing = tuple[bytes, LearnerMessage]  # a peer, which is the transport's name for a connection


@dataclass
class ConnectedActor:
    """An actor that said Hello. `credit` is how many more completions it has room for.

    `oldest_needed` is the oldest policy version whose snapshot it may still fetch. `stalled`: its
    leases expired, and it gets no others until its main thread is known to make progress again.
    `beat` is its last heartbeat.
    """

    actor_id: str
    incarnation: str
    last_seen: float
    oldest_needed: int
    credit: int = 0
    stalled: bool = False
    beat: Heartbeat = field(default_factory=lambda: Heartbeat(progress=-1))


@dataclass
class ConnectedActors:
    """The actors by peer, and an outbox.

    `counters` become the `wire/…` metrics.
    """

    by_peer: dict[bytes, ConnectedActor] = field(default_factory=dict[bytes, ConnectedActor])
    counters: Counter[str] = field(default_factory=Counter[str])
    _outbox: list[Outgoing] = field(default_factory=list[Outgoing])

    def send(self, peer: bytes, message: LearnerMessage) -> None:
        self._outbox.append((peer, message))

    def send_all(self, message: LearnerMessage) -> None:
        for peer in self.by_peer:
            self.send(peer, message)

    def refuse(self, peer: bytes, refuse: Refuse) -> None:
        """Queue a refusal and count it."""
        self.counters[f"refused_{refuse.code}"] += 1
        self.send(peer, refuse)

    def cancel(self, lease: EndedLease) -> None:
        """Tell the actor that held a lease, if it is connected, to stop working on it."""
        for peer, actor in self.by_peer.items():
            if actor.actor_id == lease.actor:
                self.send(peer, Cancel(task=lease.task, attempt=lease.attempt))

    def take_outgoing(self) -> list[Outgoing]:
        """Return and clear what must be sent, in order."""
        outgoing, self._outbox = self._outbox, []
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
