"""Metrics of the actors, the queue and the messages, for metrics.jsonl and the display."""

from msgspec import structs

from learner.ledger.state import LedgerState
from learner.online.actors import ConnectedActors
from protocol.messages.parts import MemoryUse


def queue_metrics(state: LedgerState, connected: ConnectedActors) -> dict[str, float]:
    """Return `actors/…`, `queue/…`, `ledger/…` (totals of the run) and `wire/…` (counters)."""
    actors = connected.by_peer.values()
    metrics = {f"actors/{a.actor_id}/tokens_per_s": a.progress.beat.tokens_per_s for a in actors}
    metrics["actors/tokens_per_s"] = sum(metrics.values())
    metrics["actors/count"] = float(len(actors))
    metrics["actors/stalled"] = float(sum(a.progress.stall is not None for a in actors))
    metrics["actors/tokens_sampled"] = float(sum(a.progress.beat.tokens_sampled for a in actors))
    metrics["actors/groups_held"] = float(sum(a.progress.beat.groups_held for a in actors))

    for actor in actors:
        metrics |= actor.progress.beat.memory.metrics(f"actors/{actor.actor_id}/memory_")
    metrics |= sum((a.progress.beat.memory for a in actors), MemoryUse()).metrics("actors/memory_")

    metrics["queue/queued"] = float(len(state.queue))
    metrics["queue/in_training"] = float(len(state.training))

    counters: dict[str, int | dict[str, int]] = structs.asdict(state.counters)
    for name, count in counters.items():
        total = sum(count.values()) if isinstance(count, dict) else count
        metrics[f"ledger/{name}"] = float(total)
    return metrics | {f"wire/{name}": float(count) for name, count in connected.counters.items()}
