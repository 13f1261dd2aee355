"""A trained or evaluated group as a line of rollouts.jsonl."""

import math
from typing import Any, Protocol

import msgspec

from learner.online.experience import TrainedGroup
from protocol.messages.arrays import floats_view, ids_view


class Decoder(Protocol):
    """What a tokenizer is needed for here."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> str:
        """Return the text of token IDs."""
        ...


def describe(
    item: TrainedGroup, trained_at: int, tokenizer: Decoder, with_text: int
) -> dict[str, Any]:
    """Return a group's line: identity, spans and times of all completions, text of `with_text`.

    `with_text` -1 means all. `trained_at` is the policy version of the batch's first update, or
    the version that was evaluated. The text is what the reward functions were given.
    """
    group = item.group
    texts = group.completions if with_text < 0 else group.completions[:with_text]
    names = group.reward.names
    values = floats_view(group.reward.rewards).tolist()
    table = [values[i : i + len(names)] for i in range(0, len(values), len(names))] if names else []
    return {
        "kind": "train",
        "task": group.task.number,
        "incarnation": group.task.incarnation,
        "attempt": group.attempt,
        "actor": group.actor_id,
        "trained_at": trained_at,
        "started_at": group.started_at,
        "finished_at": group.finished_at,
        "policy_spans": [msgspec.to_builtins(c.policy_spans) for c in group.completions],
        "lengths": [ids_view(c.token_ids).size for c in group.completions],
        "finish_reasons": [c.finish_reason for c in group.completions],
        "reward_names": names,
        "rewards": [[None if math.isnan(v) else v for v in row] for row in table],
        "prompt": item.prompt.row.get("prompt"),
        "completions": [
            tokenizer.decode(ids_view(c.token_ids).tolist(), skip_special_tokens=True)
            for c in texts
        ],
        "log_extra": group.reward.log_extra,
        "faults": [msgspec.to_builtins(f) for f in group.reward.faults],
    }
