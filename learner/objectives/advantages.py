"""Rewards to advantages, as TRL 1.16.0's `GRPOTrainer` computes them (numpy, once per batch)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from learner.online.experience import PromptGroup, reward_matrix
from protocol.config.settings import GrpoRewards, GrpoSettings
from protocol.errors import RewardError

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

    `groups` (N,) is the group of each; groups may differ in size. `weights` (F,) default to 1.
    Deviations are Bessel-corrected and 1e-4 is added to them; a group with one rewarded completion
    gets advantage 0. `normalize_then_sum` is GDPO: each function is normalised within groups, then
    their weighted sum over the batch. Where a group's rewards are all equal, its advantages are
    exactly 0; in TRL, rounding may leave up to about 1e-4.
    """
    table = np.asarray(rewards, np.float64)
    scale = np.asarray(weights if weights is not None else [1.0] * table.shape[1], np.float64)
    total = _weighted(table, scale, table)
    deviations = _per_group(total, groups, _std)

    if aggregation == "sum_then_normalize":
        equal = _per_group(total, groups, _range) <= _rounding(table * scale)
        result = total - _per_group(total, groups, _mean)
        if scale_rewards == "group":
            result = result / (deviations + EPSILON)
        elif scale_rewards == "batch":
            deviations = np.full(len(total), _std(total))
            result = result / (deviations + EPSILON)
    else:
        equal = np.all([_per_group(c, groups, _range) == 0 for c in table.T], axis=0)
        columns = [
            (c - _per_group(c, groups, _mean)) / (_per_group(c, groups, _std) + EPSILON)
            for c in table.T
        ]
        summed = _weighted(np.stack(columns, axis=1) if columns else table, scale, table)
        deviations = np.full(len(total), _std(summed))
        result = (summed - _mean(summed)) / (deviations + EPSILON)

    result = np.where(equal | np.isnan(result), 0.0, result)
    return Advantages(result, _metrics(table, total, deviations, names))


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


def _range(values: Floats) -> float:
    valid = values[~np.isnan(values)]
    return float(valid.max() - valid.min()) if valid.size else 0.0


def _rounding(weighted: Floats) -> Floats:
    """Return by how much equal sums of rewards (N, F) may differ, for each completion (N,).

    Rewards travel in float32: 0.1 + 0.2 and 0.3 + 0 are sums of rounded numbers. One number is not
    rounded differently from its equals.
    """
    if weighted.shape[1] < 2:
        return np.zeros(len(weighted))
    return np.nansum(np.abs(weighted), axis=1) * np.finfo(np.float32).eps


def _per_group(
    values: Floats, groups: npt.NDArray[np.integer], of: Callable[[Floats], float]
) -> Floats:
    """Return `of(values of its group)` for each completion (N,)."""
    result = np.empty(len(values))
    for group in np.unique(groups):
        members = groups == group
        result[members] = of(values[members])
    return result


@dataclass
class RewardAdvantages:
    """Turns the rewards of each batch into advantages, after checking that there are some."""

    settings: GrpoSettings
    rewards: GrpoRewards
    _none_batches: int = 0

    def of(self, groups: Sequence[PromptGroup], group_index: np.ndarray) -> Advantages:
        """Return the advantages (N,) of the completions of `groups`; `group_index` (N,).

        Raises RewardError after `max_none_batches` batches without any reward, or where
        `reward_weights` do not fit the functions that answered.
        """
        names, rewards = reward_matrix(groups)
        self._check_some(names, rewards, groups)
        weights = self.rewards.reward_weights
        if names and weights is not None and len(weights) != len(names):
            raise RewardError(
                f"rewards.reward_weights has {len(weights)} numbers, but {len(names)} reward "
                f"functions answered: {', '.join(names)}. Give one weight per function, in order."
            )

        return advantages(
            rewards,
            groups=group_index,
            names=names,
            weights=weights if names else None,
            scale_rewards=self.settings.scale_rewards,
            aggregation=self.settings.multi_objective_aggregation,
        )

    def _check_some(
        self, names: list[str], rewards: np.ndarray, groups: Sequence[PromptGroup]
    ) -> None:
        self._none_batches = self._none_batches + 1 if np.isnan(rewards).all() else 0
        if self._none_batches < self.rewards.max_none_batches:
            return

        faults = {
            f"{fault.function}: {fault.kind}: {fault.message.splitlines()[-1]}"
            for item in groups
            for fault in item.group.reward.faults
            if fault.message
        }
        raise RewardError(
            f"Every reward of {self._none_batches} batches in a row was None "
            f"(functions: {', '.join(names) or 'none answered'}). "
            f"{' '.join(sorted(faults)[:5])} See the reward server's log; fix the functions, "
            "then continue with --run.resume."
        )
