"""The metrics of a GRPO loss: clipping and importance ratios, under TRL 1.16.0's names."""

import math

import mlx.core as mx

from learner.losses.metrics import Mean, Metrics

CLIP_RATIOS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


def loss_metrics(
    values: dict[str, mx.array],
    ratio: mx.array | None,
    mask: mx.array,
    sequence_mask: mx.array,
) -> Metrics:
    """Return the means of `values`, (B, C) or (B, 1) each, by name.

    Clip ratios and an importance `ratio` also give their extremes. `mask` (B, C) and
    `sequence_mask` (B,) as in `grpo_loss`.
    """

    def counted(each: mx.array) -> mx.array:
        return sequence_mask[:, None] if each.shape[1] == 1 else mask

    def mean(each: mx.array) -> Mean:
        return Mean((each * counted(each)).sum(), counted(each).sum())

    def per_sequence(clipped: mx.array, empty: float) -> mx.array:
        if clipped.shape[1] == 1:
            return mx.where(sequence_mask > 0, clipped[:, 0], empty)
        tokens = mask.sum(axis=-1)
        means = (clipped * mask).sum(axis=-1) / mx.maximum(tokens, 1.0)
        return mx.where(tokens > 0, means, empty)

    means = {name: mean(each) for name, each in values.items()}
    minima: dict[str, mx.array] = {}
    maxima: dict[str, mx.array] = {}

    low, high, _ = CLIP_RATIOS
    if low in values:
        minima["clip_ratio/low_min"] = per_sequence(values[low], math.inf).min()
        maxima["clip_ratio/high_max"] = per_sequence(values[high], -math.inf).max()

    if ratio is not None:
        name, some = "sampling/importance_sampling_ratio", counted(ratio) > 0
        means[f"{name}/mean"] = mean(ratio)
        minima[f"{name}/min"] = mx.where(some, ratio, math.inf).min()
        maxima[f"{name}/max"] = mx.where(some, ratio, -math.inf).max()
    return Metrics(means=means, minima=minima, maxima=maxima)
