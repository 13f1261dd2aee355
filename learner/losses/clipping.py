"""What a GRPO loss logs of clipping and of importance ratios, under TRL 1.16.0's names."""

import math

import mlx.core as mx

from learner.losses.metrics import Mean, Metrics, merge_metrics

CLIP_RATIOS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


def average(values: mx.array, mask: mx.array, sequence_mask: mx.array) -> Mean:
    """Average `values` over tokens (B, C), or over sequences where there is one per sequence."""
    counted = sequence_mask[:, None] if values.shape[1] == 1 else mask
    return Mean((values * counted).sum(), counted.sum())


def loss_metrics(
    values: dict[str, mx.array],
    ratio: mx.array | None,
    mask: mx.array,
    sequence_mask: mx.array,
) -> Metrics:
    """Return the means of `values`, (B, C) or (B, 1) each, by name.

    Where clip ratios are among them, also their extremes over sequences; with an importance
    `ratio`, its mean and extremes. `mask` (B, C) and `sequence_mask` (B,) as in `grpo_loss`.
    """
    means = {name: average(each, mask, sequence_mask) for name, each in values.items()}
    metrics = Metrics(means=means)

    if CLIP_RATIOS[0] in values:
        metrics = merge_metrics(metrics, _extreme_clip_ratios(values, mask, sequence_mask))
    if ratio is not None:
        metrics = merge_metrics(metrics, _ratio_metrics(ratio, mask, sequence_mask))
    return metrics


def _ratio_metrics(ratio: mx.array, mask: mx.array, sequence_mask: mx.array) -> Metrics:
    name = "sampling/importance_sampling_ratio"
    counted = (sequence_mask[:, None] if ratio.shape[1] == 1 else mask) > 0
    return Metrics(
        means={f"{name}/mean": average(ratio, mask, sequence_mask)},
        minima={f"{name}/min": mx.where(counted, ratio, math.inf).min()},
        maxima={f"{name}/max": mx.where(counted, ratio, -math.inf).max()},
    )


def _extreme_clip_ratios(
    values: dict[str, mx.array], mask: mx.array, sequence_mask: mx.array
) -> Metrics:
    """Return the smallest low and the largest high clip ratio of a sequence."""

    def per_sequence(clipped: mx.array, empty: float) -> mx.array:
        if clipped.shape[1] == 1:
            return mx.where(sequence_mask > 0, clipped[:, 0], empty)
        tokens = mask.sum(axis=-1)
        means = (clipped * mask).sum(axis=-1) / mx.maximum(tokens, 1.0)
        return mx.where(tokens > 0, means, empty)

    low, high, _ = CLIP_RATIOS
    return Metrics(
        minima={"clip_ratio/low_min": per_sequence(values[low], math.inf).min()},
        maxima={"clip_ratio/high_max": per_sequence(values[high], -math.inf).max()},
    )
