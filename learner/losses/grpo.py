"""The GRPO family of losses, equal to TRL 1.16.0's `GRPOTrainer._compute_loss`.

Pure functions of arrays. Every normaliser is computed on the whole optimiser batch
(`grpo_normalisers`) and passed in, so that the losses and gradients of micro-batches add up to the
whole batch's under any split. That equals TRL at one micro-batch, and at any number of them for
every loss but `bnpo`, which TRL normalises per micro-batch.
"""

import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from learner.losses.grpo_metrics import CLIPPED, average, loss_metrics
from learner.losses.metrics import Metrics
from protocol.config.settings import GrpoSettings

Normalisers = Mapping[str, mx.array]
EXPONENT_LIMIT = 80.0


def grpo_normalisers(
    *,
    mask_sums: np.ndarray,
    max_completion_length: int,
    generation_tokens: float | None = None,
    entropy_threshold: float | None = None,
    entropy_tokens: float | None = None,
) -> dict[str, float]:
    """Return what the losses divide by, from the whole batch's (N,) mask sums.

    `generation_tokens`: the unmasked tokens that dapo, cispo and vespo divide by (the batch's own
    by default). `entropy_threshold`, nats, and `entropy_tokens`: see `entropy_quantile`.
    """
    tokens = max(float(mask_sums.sum()), 1.0)
    return {
        "sequences": float(len(mask_sums)),
        "tokens": tokens,
        "generation_tokens": max(tokens if generation_tokens is None else generation_tokens, 1.0),
        "length_tokens": float(len(mask_sums)) * max_completion_length,
        "entropy_threshold": -math.inf if entropy_threshold is None else entropy_threshold,
        "entropy_tokens": max(tokens if entropy_tokens is None else entropy_tokens, 1.0),
    }


def entropy_quantile(
    entropies: np.ndarray, mask: np.ndarray, top_quantile: float
) -> tuple[float, float]:
    """Return the entropy (nats) that the top `top_quantile` of tokens reach, and their number.

    TRL's `get_high_entropy_mask`: linear interpolation, over the whole batch.
    """
    values = entropies[mask > 0].astype(np.float32)
    if not values.size:
        return math.inf, 0.0
    threshold = np.quantile(values, np.float32(1.0 - top_quantile))
    return float(threshold), float((values >= threshold).sum())


def importance_ratio(
    old_logprobs: mx.array, sampling_logprobs: mx.array, mask: mx.array, settings: GrpoSettings
) -> mx.array:
    """Return exp(old - sampler) as the settings truncate or mask it: (B, C), or (B, 1) a sequence.

    TRL's `vllm_importance_sampling_correction` in its four modes.
    """
    mode = settings.importance_sampling_mode
    gap = old_logprobs - sampling_logprobs
    gap = mx.where(mx.isnan(gap), 0.0, gap) * mask
    if mode.startswith("sequence"):
        gap = gap.sum(axis=-1, keepdims=True)
    low, high = settings.importance_sampling_clip_min, settings.importance_sampling_clip_max
    ratio = mx.exp(gap)
    if mode.endswith("truncate"):
        return mx.clip(ratio, low, high)
    kept = ratio <= high
    if low is not None:
        kept = kept & (ratio >= low)
    return mx.where(kept, ratio, 0.0)


def grpo_loss(
    logprobs: mx.array,
    entropies: mx.array,
    *,
    advantages: mx.array,
    mask: mx.array,
    old_logprobs: mx.array,
    ref_logprobs: mx.array | None = None,
    sampling_logprobs: mx.array | None = None,
    ratio: mx.array | None = None,
    rows: mx.array | None = None,
    normalisers: Normalisers,
    settings: GrpoSettings,
) -> tuple[mx.array, Metrics]:
    """Return a micro-batch's share of the loss, and metrics that `merge_metrics` takes.

    `logprobs`, `entropies`, `mask`, `old_logprobs`, `ref_logprobs`, `sampling_logprobs` (B, C)
    float32, nats; `advantages` (B,). `ratio` is `importance_ratio`'s, None without the correction;
    without `sampling_logprobs` the off-policy mask compares with `old_logprobs`. `rows` (B,) is 0
    for empty rows that only fill the batch, which metrics leave out.
    """
    advantage = advantages[:, None]
    live = mask > 0
    rows = mx.ones(advantages.shape) if rows is None else rows
    # Padding must not meet exp: 0 there keeps every ratio at 1 and its gradient at 0.
    gap = mx.where(live, logprobs - old_logprobs, 0.0)
    weights = saturated(_token_or_sequence(gap, mask, settings))
    coefficient = mx.exp(weights)
    loss, parts = _policy_loss(logprobs, gap, coefficient, advantage, mask, ratio, settings)
    if settings.off_policy_mask_threshold is not None:
        sampler = old_logprobs if sampling_logprobs is None else sampling_logprobs
        loss = loss * off_policy_mask(
            logprobs, sampler, advantage, mask, settings.off_policy_mask_threshold
        )
    effective = mask
    if settings.top_entropy_quantile < 1.0:
        high = (entropies >= normalisers["entropy_threshold"]).astype(mask.dtype)
        loss, effective = loss * high, mask * high
    if ratio is not None and settings.loss_type != "vespo":
        loss = loss * ratio
    metrics = loss_metrics(parts | {"entropy": entropies}, ratio, mask, rows)
    if settings.beta != 0.0:
        if ref_logprobs is None:
            raise ValueError("beta is not 0: grpo_loss needs ref_logprobs")
        log_weights = weights if settings.use_bias_correction_kl else mx.zeros_like(weights)
        kl = k3(mx.where(live, ref_logprobs - logprobs, 0.0), log_weights)
        loss = loss + settings.beta * kl
        metrics |= average("kl", kl, mask, rows)
    total = aggregate(loss, mask, normalisers, settings)
    if settings.entropy_coef != 0.0:
        metrics |= {"sum:policy_loss": mx.stop_gradient(total)}
        bonus = (entropies * effective).sum() / normalisers["entropy_tokens"]
        total = total - settings.entropy_coef * bonus
    return total, {name: mx.stop_gradient(value) for name, value in metrics.items()}


def k3(gap: mx.array, log_weights: mx.array) -> mx.array:
    """Return exp(log_weights) times Schulman's k3 estimate of KL(policy || reference).

    k3 is exp(gap) - gap - 1, for the gap from policy to reference in nats.
    """
    far = gap > 20.0
    weights, near = mx.exp(log_weights), mx.where(far, 0.0, gap)
    # Far off, exp(gap) may be inf and the weight 0, whose product is neither.
    product = mx.exp(saturated(mx.where(far, gap + log_weights, 0.0)))
    # Near 0, exp(gap) - 1 would have few digits left; so would its derivative, here given as slope.
    slope = mx.stop_gradient(mx.expm1(near))
    close = mx.stop_gradient(slope - near) + slope * (near - mx.stop_gradient(near))
    return mx.where(far, product - weights * (gap + 1), weights * close)


def saturated(exponent: mx.array) -> mx.array:
    """Return `exponent`, at most 80 but with its own gradient: exp of it is finite in float32.

    So a clipped ratio beyond that has the gradient 0, not 0 times inf.
    """
    excess = mx.maximum(exponent - EXPONENT_LIMIT, 0.0)
    return exponent - mx.stop_gradient(excess)


def off_policy_mask(
    logprobs: mx.array,
    sampling_logprobs: mx.array,
    advantage: mx.array,
    mask: mx.array,
    threshold: float,
) -> mx.array:
    """Return (B, 1), 0 for sequences of negative advantage that drifted too far (DeepSeek-V3.2)."""
    drift = sampling_logprobs - mx.stop_gradient(logprobs)
    drift = mx.where(mx.isnan(drift) | (mask == 0), 0.0, drift)
    average = drift.sum(axis=1, keepdims=True) / mx.maximum(mask.sum(axis=1, keepdims=True), 1.0)
    return ((advantage >= 0) | (average <= threshold)).astype(mask.dtype)


def aggregate(
    loss: mx.array, mask: mx.array, normalisers: Normalisers, settings: GrpoSettings
) -> mx.array:
    """Sum the (B, C) losses into this micro-batch's share of the batch's loss."""
    masked = loss * mask
    match settings.loss_type:
        case "grpo" | "sapo":
            rows = masked.sum(axis=-1) / mx.maximum(mask.sum(axis=-1), 1.0)
            return rows.sum() / normalisers["sequences"]
        case "luspo":
            return masked.sum(axis=-1).sum() / normalisers["sequences"]
        case "bnpo":
            return masked.sum() / normalisers["tokens"]
        case "dr_grpo":
            return masked.sum() / normalisers["length_tokens"]
        case "dapo" | "cispo" | "vespo":
            return masked.sum() / normalisers["generation_tokens"]


def _token_or_sequence(gap: mx.array, mask: mx.array, settings: GrpoSettings) -> mx.array:
    if settings.importance_sampling_level == "token":
        return gap
    total = (gap * mask).sum(axis=-1, keepdims=True)
    return total / mx.maximum(mask.sum(axis=-1, keepdims=True), 1.0)


def _policy_loss(
    logprobs: mx.array,
    gap: mx.array,
    coefficient: mx.array,
    advantage: mx.array,
    mask: mx.array,
    ratio: mx.array | None,
    settings: GrpoSettings,
) -> tuple[mx.array, Metrics]:
    """Return the (B, C) policy loss (or (B, 1)), and the values that its metrics average."""
    low = settings.epsilon
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    if settings.loss_type in CLIPPED:
        clipped = mx.clip(coefficient, 1 - low, 1 + high)
        if settings.delta is not None:
            coefficient = mx.minimum(coefficient, settings.delta)
        loss = -mx.minimum(coefficient * advantage, clipped * advantage)
        below = ((coefficient < 1 - low) & (advantage < 0)).astype(mx.float32)
        above = ((coefficient > 1 + high) & (advantage > 0)).astype(mx.float32)
        return loss, {
            "clip_ratio/low_mean": below,
            "clip_ratio/high_mean": above,
            "clip_ratio/region_mean": mx.maximum(below, above),
        }
    if settings.loss_type == "cispo":
        factor = mx.stop_gradient(mx.minimum(coefficient, high))
        over = ((coefficient > high) & (advantage > 0)).astype(mx.float32)
        return -factor * advantage * logprobs, {"cispo_clip_ratio": over}
    if settings.loss_type == "sapo":
        positive, negative = settings.sapo_temperature_pos, settings.sapo_temperature_neg
        temperature = mx.where(advantage > 0, positive, negative)
        soft = mx.sigmoid(temperature * (coefficient - 1)) * 4 / temperature
        return -soft * advantage, {}
    phi = mx.stop_gradient(_vespo_weight(gap, advantage, mask, ratio, settings))
    return -phi * advantage * logprobs, {"vespo/phi_seq_mean": phi}


def _vespo_weight(
    gap: mx.array,
    advantage: mx.array,
    mask: mx.array,
    ratio: mx.array | None,
    settings: GrpoSettings,
) -> mx.array:
    """Return phi (B, 1): exp(lambda + k w - lambda e^w), w the clamped sequence log-ratio."""
    lowest = math.log(1e-8)
    total = (mx.clip(gap, -20.0, 20.0) * mask).sum(axis=-1, keepdims=True)
    if ratio is not None:
        total = total + mx.clip(mx.log(ratio), lowest, 20.0).sum(axis=-1, keepdims=True)
    omega = mx.clip(total, lowest, 20.0)
    k = mx.where(advantage >= 0, settings.vespo_k_pos, settings.vespo_k_neg)
    scale = mx.where(advantage >= 0, settings.vespo_lambda_pos, settings.vespo_lambda_neg)
    scale = mx.maximum(scale, 1e-4)
    phi = mx.exp(scale + k * omega - scale * mx.exp(omega))
    return mx.where(mx.isfinite(phi), phi, 0.0)
