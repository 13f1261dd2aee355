"""Takes the leases of actors that do not get on with their work, and names these actors."""

import logging

from learner.ledger.ledger import Ledger
from learner.ledger.types import EndedLease
from learner.online.actors import ConnectedActor, ConnectedActors
from learner.online.progress import Stall

log = logging.getLogger("pippin.learner")


def take_from_stalled(
    ledger: Ledger, connected: ConnectedActors, policy_timeout_s: float, now: float
) -> list[EndedLease]:
    """End the leases whose time is up, and all others of actors that stall; return them.

    An actor that stalls is named once, and gets no task until `ActorProgress` says otherwise.
    """
    limits = ledger.settings
    ended = ledger.expire(now)
    found: list[tuple[ConnectedActor, Stall]] = []

    for lease in ended:
        actor = connected.named(lease.actor)
        if actor is not None:
            found.append((actor, actor.progress.expired(now, limits.lease_s, lease.overdue)))
    unfetched = (
        actor
        for actor in connected.by_peer.values()
        if actor.progress.cannot_fetch(now, policy_timeout_s) and _takes_part(ledger, actor)
    )
    found.extend((actor, "policy") for actor in unfetched)

    for actor, stall in found:
        if actor.progress.stall is None:
            actor.progress.stall = stall
            reason = _reason(stall, limits.lease_s, limits.max_lease_s, policy_timeout_s)
            log.warning("actor %s %s; its tasks go to others", actor.actor_id, reason)
            # Whether these tasks have to do with it is not known: none is blamed.
            ended += ledger.withdraw(actor.actor_id, reason, now, blamed=False)
    return ended


def _takes_part(ledger: Ledger, actor: ConnectedActor) -> bool:
    """Whether an actor has work, or room for it."""
    return actor.credit > 0 or not ledger.is_idle(actor.actor_id)


def _reason(stall: Stall, lease_s: float, max_lease_s: float, policy_timeout_s: float) -> str:
    """Say what was seen of an actor, and which setting says how long is too long."""
    match stall:
        case "loop":
            return f"has made no progress for {lease_s:g} s (queue.lease_s): its main thread hangs"
        case "engine":
            return f"has sampled nothing of its tasks for {lease_s:g} s (queue.lease_s)"
        case "policy":
            return (
                f"has applied no newer policy for {policy_timeout_s:g} s (queue.policy_timeout_s), "
                "though one was announced: it cannot fetch it"
            )
        case "overdue":
            return f"has held a task for {max_lease_s:g} s (queue.max_lease_s)"
