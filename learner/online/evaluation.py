"""Evaluation of held-out rows through the actors: greedy completions and their rewards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from learner.online.experience import EvalResult, PromptGroup, reward_matrix
from learner.online.source import OnlineSource
from protocol.messages.arrays import ids_view

Line = dict[str, Any]


@dataclass
class OnlineEvaluator:
    """Has the actors answer the held-out rows, and averages the rewards.

    `weights` are the reward functions' (None: all 1); `describe` makes a group's rollouts.jsonl
    line for a version.
    """

    source: OnlineSource
    weights: Sequence[float] | None
    describe: Callable[[PromptGroup, int], Line]
    pending: bool = False

    def start(self, version: int) -> None:
        """Evaluate this version on the held-out rows."""
        self.pending = True
        self.source.evaluate(version)

    def poll(self) -> tuple[int, dict[str, float], list[Line]] | None:
        """Return the version, metrics and rollouts of a finished evaluation, if there is one."""
        result = self.source.next_eval()
        if result is None:
            return None
        self.pending = False

        lines = [
            {
                **self.describe(item, result.version),
                "kind": "eval",
                # Reward functions need the rest of the row to score the answers again.
                "columns": {k: v for k, v in item.prompt.row.items() if k != "prompt"},
            }
            for item in result.groups
        ]
        return result.version, eval_metrics(result, self.weights), lines


def eval_metrics(result: EvalResult, weights: Sequence[float] | None) -> dict[str, float]:
    """Return `eval/…` metrics: weighted reward, each function's mean, lengths (tokens)."""
    metrics = {"eval/rows": float(len(result.groups)), "eval/dropped": float(result.dropped)}
    if not result.groups:
        return metrics

    names, rewards = reward_matrix(result.groups)
    scale = np.asarray(weights if weights is not None else [1.0] * len(names), np.float64)
    scored = ~np.isnan(rewards).all(axis=1)
    if scored.any():
        metrics["eval/reward"] = float(np.nansum(rewards[scored] * scale, axis=1).mean())
    for column, name in enumerate(names):
        values = rewards[:, column][~np.isnan(rewards[:, column])]
        if values.size:
            metrics[f"eval/rewards/{name}/mean"] = float(values.mean())

    completions = [c for item in result.groups for c in item.group.completions]
    metrics["eval/completions/mean_length"] = float(
        np.mean([ids_view(c.token_ids).size for c in completions])
    )
    metrics["eval/completions/clipped_ratio"] = float(
        np.mean([c.finish_reason == "length" for c in completions])
    )
    return metrics
