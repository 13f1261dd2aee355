"""What a GRPO loss logs, under TRL 1.16.0's names: means and extremes that merge exactly."""

import math

import mlx.core as mx

from learner.losses.metrics import Metrics, maximum, mean, minimum
from protocol.config.settings import GrpoSettings

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def loss_metrics(
    values: Metrics, ratio: mx.array | None, mask: mx.array, rows: mx.array
) -> Metrics:
    """Return the metrics of a micro-batch: means of `values`, (B, C) or (B, 1) each, by name.

    With clip ratios among them the extremes of sequences too, and what became of the importance
    sampling `ratio`. `mask` (B, C), `rows` (B,) as of `grpo_loss`.
    """
    metrics: Metrics = {}
    for name, each in values.items():
        metrics |= average(name, each, mask, rows)
    metrics |= _extremes(values, mask, rows)
    if ratio is not None:
        metrics |= _ratio_metrics(ratio, mask, rows)
    return metrics


def average(name: str, values: mx.array, mask: mx.array, rows: mx.array) -> Metrics:
    """Average over tokens, or over sequences where there is one value a sequence."""
    counted = rows[:, None] if values.shape[1] == 1 else mask
    return mean(name, (values * counted).sum(), counted.sum())


def unclipped(skipped: mx.array, settings: GrpoSettings) -> Metrics:
    """Return the clip ratios of completions that need no forward pass: none of them is clipped.

    Their advantage is 0 or no token counts, so that the ratio is 1 (cispo's cap must not be below).
    `skipped` (3,): how many they are, how many of them have tokens that count, and these tokens.
    """
    rows, filled, tokens = skipped
    by_token = settings.importance_sampling_level == "token"
    names = ("cispo_clip_ratio",) if settings.loss_type == "cispo" else ()
    metrics: Metrics = {}
    if settings.loss_type in CLIPPED:
        names = tuple(f"clip_ratio/{name}_mean" for name in ("low", "high", "region"))
        some = (filled if by_token else rows) > 0
        metrics |= minimum("clip_ratio/low_min", mx.where(some, 0.0, math.inf))
        metrics |= maximum("clip_ratio/high_max", mx.where(some, 0.0, -math.inf))
    for name in names:
        metrics |= mean(name, mx.array(0.0), tokens if by_token else rows)
    return metrics


def _ratio_metrics(ratio: mx.array, mask: mx.array, rows: mx.array) -> Metrics:
    name = "sampling/importance_sampling_ratio"
    counted = (rows[:, None] if ratio.shape[1] == 1 else mask) > 0
    return {
        **average(f"{name}/mean", ratio, mask, rows),
        **minimum(f"{name}/min", mx.where(counted, ratio, math.inf).min()),
        **maximum(f"{name}/max", mx.where(counted, ratio, -math.inf).max()),
    }


def _extremes(parts: Metrics, mask: mx.array, rows: mx.array) -> Metrics:
    """Return the smallest low and the largest high clip ratio of a sequence."""
    if "clip_ratio/low_mean" not in parts:
        return {}

    def of_rows(values: mx.array, empty: float) -> mx.array:
        if values.shape[1] == 1:
            return mx.where(rows > 0, values[:, 0], empty)
        sums = mask.sum(axis=-1)
        return mx.where(sums > 0, (values * mask).sum(axis=-1) / mx.maximum(sums, 1.0), empty)

    return {
        **minimum("clip_ratio/low_min", of_rows(parts["clip_ratio/low_mean"], math.inf).min()),
        **maximum("clip_ratio/high_max", of_rows(parts["clip_ratio/high_mean"], -math.inf).max()),
    }
