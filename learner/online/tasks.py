"""A lease as the message that an actor gets, and the figures of tasks and actors."""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from learner.data.prompts import Prompt
from learner.ledger.ledger import Ledger
from learner.ledger.types import Grant
from learner.online.actors import Peer, Terms
from protocol.messages.arrays import ids_bytes
from protocol.messages.messages import Task, TaskKind


def task_message(lease: Grant, prompt: Prompt, terms: Terms, ledger: Ledger) -> Task:
    """Return what an actor must know of a lease."""
    return Task(
        task=lease.task,
        attempt=lease.attempt,
        kind=lease.kind,
        prompt_ids=ids_bytes(prompt.prompt_ids),
        row=msgspec.json.encode(prompt.row),
        sampling=terms.sampling(lease.kind),
        seed=task_seed(terms.seed, lease.row_key, lease.kind),
        min_policy_version=lease.min_policy_version,
        pinned_version=lease.pinned_version,
        lease_s=terms.lease_s,
        trainer_state={
            "global_step": ledger.version,
            "max_steps": ledger.settings.total_batches or 0,
        },
    )


def figures_of(
    ledger: Ledger, peers: Sequence[Peer], counters: Mapping[str, int]
) -> dict[str, float]:
    """Return the figures of the actors, the queue and the wire for metrics and display."""
    figures = {f"actors/{a.actor_id}/tokens_per_s": a.tokens_per_s for a in peers}
    figures["actors/tokens_per_s"] = sum(figures.values())
    figures["actors/count"] = float(len(peers))
    figures["actors/tokens_sampled"] = float(sum(a.tokens_sampled for a in peers))
    figures["queue/queued"] = float(ledger.queued)
    figures["queue/in_training"] = float(ledger.in_training)
    for name, value in msgspec.to_builtins(ledger.counters).items():
        total = sum(value.values()) if isinstance(value, dict) else value
        figures[f"ledger/{name}"] = float(total)
    figures.update({f"wire/{k}": float(v) for k, v in counters.items()})
    return figures


def task_seed(seed: int, row_key: int | str, kind: TaskKind) -> int:
    """Return a task's sampling seed, 63 bits: of the run's seed, the row's position and the kind.

    Neither the attempt nor the task's number counts, so that a resumed run, which leases the same
    rows under new numbers, samples what the first would have sampled.
    """
    entropy = np.random.SeedSequence([seed, int(row_key), int(kind == "eval")])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))
