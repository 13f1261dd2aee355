"""Rewards to advantages, as TRL 1.16.0's `GRPOTrainer` computes them (numpy, once per batch)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
EPSILON = 1e-4  # TRL's, added to every deviation that divides


@dataclass(frozen=True)
class Advantages:
    """`advantages` (N,) float64, 0 without a reward; `metrics` under TRL's names."""

    advantages: Floats
    metrics: dict[str, float]


def advantages(
    rewards: npt.NDArray[np.floating],
    *,
    groups: npt.NDArray[np.integer],
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    scale_rewards: Literal["group", "batch", "none"] = "group",
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
) -> Advantages:
    """Return the advantages of N completions from rewards (N, F), NaN for None.

    `groups` (N,) is the group of each; groups may differ in size. Deviations are Bessel-corrected
    and 1e-4 is added to them; a group with one rewarded completion gets advantage 0.
    `normalize_then_sum` is GDPO: each function is normalised in its group, then their weighted sum
    over the batch.
    """
    table = np.asarray(rewards, np.float64)
    scale = np.asarray(weights if weights is not None else [1.0] * table.shape[1], np.float64)
    if scale.shape != (table.shape[1],):
        raise ValueError(
            f"reward_weights has {scale.size} numbers, but {table.shape[1]} reward functions "
            f"answered: {', '.join(names)}. Give one weight per function, in their order."
        )

    total = _weighted(table, scale, table)
    deviations = _per_group(total, groups, _std)
    spread = _std(total)

    if aggregation == "sum_then_normalize":
        result = total - _per_group(total, groups, _mean)
        if scale_rewards == "group":
            result = result / (deviations + EPSILON)
        elif scale_rewards == "batch":
            result = result / (spread + EPSILON)
            deviations = np.full(len(total), spread)
    else:
        # GDPO
        columns = [
            (c - _per_group(c, groups, _mean)) / (_per_group(c, groups, _std) + EPSILON)
            for c in table.T
        ]
        summed = _weighted(np.stack(columns, axis=1) if columns else table, scale, table)
        spread = _std(summed)
        result = (summed - _mean(summed)) / (spread + EPSILON)
        deviations = np.full(len(total), spread)

    return Advantages(np.nan_to_num(result, nan=0.0), _metrics(table, total, deviations, names))


def _metrics(
    table: Floats, total: Floats, deviations: Floats, names: Sequence[str]
) -> dict[str, float]:
    """Return TRL's metrics; `deviations` (N,) are those that the advantages were scaled by."""
    metrics: dict[str, float] = {}
    for name, column in zip(names, table.T, strict=True):
        metrics[f"rewards/{name}/mean"] = _mean(column)
        metrics[f"rewards/{name}/std"] = _std(column)
    metrics["reward"] = _mean(total)
    metrics["reward_std"] = _std(total)
    metrics["frac_reward_zero_std"] = float(np.isclose(deviations, 0.0).mean())
    return metrics


def _weighted(values: Floats, scale: Floats, rewards: Floats) -> Floats:
    """Return the weighted sum of each completion's values (N, F), NaN left out.

    It is NaN where all `rewards` are. A completion with a reward may have no value: the only one of
    its group has no normalised reward.
    """
    empty = np.isnan(rewards).all(axis=1)
    return np.where(empty, np.nan, np.nansum(values * scale, axis=1))


def _mean(values: Floats) -> float:
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if valid.size else np.nan


def _std(values: Floats) -> float:
    valid = values[~np.isnan(values)]
    return float(valid.std(ddof=1)) if valid.size > 1 else np.nan


def _per_group(
    values: Floats, groups: npt.NDArray[np.integer], of: Callable[[Floats], float]
) -> Floats:
    """Return `of` a group's values, at the place of each."""
    result = np.empty(len(values))
    for group in np.unique(groups):
        members = groups == group
        result[members] = of(values[members])
    return result
