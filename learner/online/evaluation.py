"""Evaluation of held-out rows through the actors: greedy completions and their rewards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from learner.online.experience import EvalResult, TrainedGroup
from learner.online.source import OnlineSource
from protocol.messages.arrays import floats_view, ids_view

Line = dict[str, Any]


def reward_matrix(groups: Sequence[TrainedGroup]) -> tuple[list[str], np.ndarray]:
    """Return function names and rewards (N, F) float32, NaN for None, rows in group order.

    A group without names (a reward server was never heard of) has NaN everywhere; one of other
    functions (a server was started anew with others) adds its own after the rest.
    """
    by_length = sorted((g.group.reward.names for g in groups), key=len, reverse=True)
    names = list(dict.fromkeys(name for given in by_length for name in given))
    parts: list[np.ndarray] = []
    for item in groups:
        result = item.group.reward
        rows = len(item.group.completions)
        part = np.full((rows, len(names)), np.nan, np.float32)
        places = [names.index(name) for name in result.names]
        part[:, places] = floats_view(result.rewards).reshape(rows, -1)
        parts.append(part)
    return names, np.concatenate(parts) if parts else np.zeros((0, len(names)), np.float32)


@dataclass
class OnlineEvaluator:
    """Asks the actors for the held-out rows and averages what comes back."""

    source: OnlineSource
    weights: Sequence[float] | None
    describe: Callable[[TrainedGroup, int], Line]
    rows: int
    pending: bool = False

    def start(self, version: int) -> None:
        """Queue the held-out rows for this version."""
        self.pending = True
        self.source.evaluate(version)

    def poll(self) -> tuple[int, dict[str, float], list[Line]] | None:
        """Return the metrics of a finished evaluation: rewards, lengths, rows dropped."""
        result = self.source.next_eval()
        if result is None:
            return None
        self.pending = False
        lines = [
            {**self.describe(g, result.version), "kind": "eval", "columns": _columns(g)}
            for g in result.groups
        ]
        return result.version, eval_metrics(result, self.weights), lines


def _columns(item: TrainedGroup) -> dict[str, Any]:
    """Return the row but for its prompt: with it, the answers can be scored once more."""
    return {name: value for name, value in item.prompt.row.items() if name != "prompt"}


def eval_metrics(result: EvalResult, weights: Sequence[float] | None) -> dict[str, float]:
    """Return `eval/…` metrics: weighted reward, each function's mean, lengths (tokens)."""
    metrics = {"eval/rows": float(len(result.groups)), "eval/dropped": float(result.dropped)}
    if not result.groups:
        return metrics
    names, rewards = reward_matrix(result.groups)
    scale = np.asarray(weights if weights is not None else [1.0] * len(names), np.float64)
    valid = ~np.isnan(rewards).all(axis=1)
    if valid.any():
        metrics["eval/reward"] = float(np.nansum(rewards[valid] * scale, axis=1).mean())
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
