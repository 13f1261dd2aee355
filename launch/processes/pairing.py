"""Chooses the two answers of a pair: pure functions of rows, texts and rewards."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

Row = Mapping[str, Any]
Rewards = np.ndarray  # (G, F) float32, NaN for None
COPIED = ("tools", "chat_template_kwargs")


def totals(rewards: Rewards, weights: Sequence[float] | None) -> list[float | None]:
    """Return each completion's weighted sum of rewards; None where no function gave one.

    As in training, a None counts as zero if another function gave a reward.
    """
    scale = np.ones(rewards.shape[1]) if weights is None else np.asarray(weights, np.float64)
    sums = np.nansum(rewards.astype(np.float64) * scale, axis=1)
    missing = np.all(np.isnan(rewards), axis=1).tolist()
    return [None if none else value for none, value in zip(missing, sums.tolist(), strict=True)]


def best_and_worst(
    row: Row, texts: Sequence[str], rewards: Rewards, weights: Sequence[float] | None = None
) -> dict[str, Any] | str:
    """Return the pair of a group's best and worst completion, or the reason why there is none.

    Among equals the first is taken. Reasons: "no_rewards" (fewer than two completions have one),
    "ties", "empty_answers", "same_text".
    """
    scored = [(s, i) for i, s in enumerate(totals(rewards, weights)) if s is not None]
    if len(scored) < 2:
        return "no_rewards"

    best = max(scored, key=lambda item: (item[0], -item[1]))
    worst = min(scored)
    if best[0] == worst[0]:
        return "ties"
    return _pair(row, texts[best[1]], texts[worst[1]], best[0], worst[0])


def given_and_own(
    row: Row,
    column: str,
    texts: Sequence[str],
    rewards: Rewards,
    weights: Sequence[float] | None = None,
) -> dict[str, Any] | str:
    """Return the pair of the row's answer and the model's own, or the reason why there is none.

    Only the model's own answer has a score, if functions gave one. Reasons: "no_given_answer",
    "empty_answers", "same_text".
    """
    answer: Any = row.get(column)
    if isinstance(answer, list) and len(cast("list[Any]", answer)) == 1:
        answer = cast("list[Any]", answer)[0].get("content")
    if not isinstance(answer, str):
        return "no_given_answer"
    return _pair(row, answer, texts[0], None, totals(rewards, weights)[0])


def _pair(
    row: Row, chosen: str, rejected: str, high: float | None, low: float | None
) -> dict[str, Any] | str:
    if not chosen.strip() or not rejected.strip():
        return "empty_answers"
    if chosen.strip() == rejected.strip():
        return "same_text"

    prompt = row["prompt"]
    chat = isinstance(prompt, list)
    pair: dict[str, Any] = {
        "prompt": prompt,
        "chosen": _message(chosen) if chat else chosen,
        "rejected": _message(rejected) if chat else rejected,
        "score_chosen": high,
        "score_rejected": low,
    }
    return pair | {name: row[name] for name in COPIED if row.get(name) is not None}


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
