"""The line of rollouts.jsonl that describes a trained or evaluated group."""

import math
from typing import Any, Protocol

import msgspec

from learner.online.experience import PromptGroup
from protocol.messages.arrays import floats_view, ids_view


class Decoder(Protocol):
    """The part of a tokenizer that rollout lines need."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> str: ...


def rollout_line(
    item: PromptGroup, trained_at: int, tokenizer: Decoder, with_text: int
) -> dict[str, Any]:
    """Return a group's line: its identity, and the policy spans and rewards of its completions.

    The first `with_text` completions (-1: all) are included as text, as the reward functions saw
    it. `trained_at` is the policy version of the batch's first update, or the evaluated version.
    """
    group, reward = item.group, item.group.reward
    texts = group.completions if with_text < 0 else group.completions[:with_text]

    # The rewards travel as a flat array; the line has one list per completion.
    values = floats_view(reward.rewards).tolist()
    width = len(reward.names)
    table = [values[i : i + width] for i in range(0, len(values), width)] if width else []

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
        "reward_names": reward.names,
        "rewards": [[None if math.isnan(v) else v for v in row] for row in table],
        "prompt": item.prompt.row.get("prompt"),
        "completions": [
            tokenizer.decode(ids_view(c.token_ids).tolist(), skip_special_tokens=True)
            for c in texts
        ],
        "log_extra": _logged(reward.log_extra),
        "faults": [msgspec.to_builtins(fault) for fault in reward.faults],
    }


def _logged(text: bytes) -> msgspec.Raw:
    """Return what reward functions logged, as the JSON object that it is; {} if it is none.

    It is checked but not decoded: as values it could take seventy times its size.
    """
    try:
        text.decode()
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return msgspec.Raw(b"{}")
    return msgspec.Raw(msgspec.json.format(text, indent=-1) if text[:1] == b"{" else b"{}")
