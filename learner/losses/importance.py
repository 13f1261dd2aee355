"""Ratios of two policies from their log-probs, kept finite in float32."""

import mlx.core as mx

from protocol.config.settings import GrpoSettings

EXPONENT_LIMIT = 80.0


def importance_ratio(
    old_logprobs: mx.array, sampling_logprobs: mx.array, mask: mx.array, settings: GrpoSettings
) -> mx.array:
    """Return exp(old - sampling), truncated or masked: (B, C), or (B, 1) per sequence.

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


def log_ratio(gap: mx.array, mask: mx.array, settings: GrpoSettings) -> mx.array:
    """Return the log of the policy ratio from the tokens' `gap` (B, C), nats.

    (B, C), or (B, 1) where `importance_sampling_level` averages over the sequence.
    """
    if settings.importance_sampling_level == "token":
        return gap
    total = (gap * mask).sum(axis=-1, keepdims=True)
    return total / mx.maximum(mask.sum(axis=-1, keepdims=True), 1.0)


def saturated(exponent: mx.array) -> mx.array:
    """Return `exponent`, at most 80 but with its own gradient: its exp is finite in float32.

    So a clipped ratio beyond that has the gradient 0, not 0 times inf.
    """
    excess = mx.maximum(exponent - EXPONENT_LIMIT, 0.0)
    return exponent - mx.stop_gradient(excess)


def k3(gap: mx.array, log_weights: mx.array) -> mx.array:
    """Return exp(log_weights) times Schulman's k3 estimate of KL(policy || reference).

    k3 is exp(gap) - gap - 1, for the gap from policy to reference in nats.
    """
    far = gap > 20.0
    weights, near = mx.exp(log_weights), mx.where(far, 0.0, gap)

    # Far off, exp(gap) may be inf and the weight 0, whose product is neither.
    product = mx.exp(saturated(mx.where(far, gap + log_weights, 0.0)))

    # Near 0, exp(gap) - 1 would have few digits left, and so would its derivative: `slope` is it.
    slope = mx.stop_gradient(mx.expm1(near))
    close = mx.stop_gradient(slope - near) + slope * (near - mx.stop_gradient(near))
    return mx.where(far, product - weights * (gap + 1), weights * close)


def off_policy_mask(
    logprobs: mx.array,
    sampling_logprobs: mx.array,
    advantages: mx.array,
    mask: mx.array,
    threshold: float,
) -> mx.array:
    """Return (B, 1), 0 for sequences of negative advantage that drifted too far (DeepSeek-V3.2).

    `advantages` (B, 1); the drift is the mean sampling minus policy log-prob, nats per token.
    """
    drift = sampling_logprobs - mx.stop_gradient(logprobs)
    drift = mx.where(mx.isnan(drift) | (mask == 0), 0.0, drift)
    tokens = mx.maximum(mask.sum(axis=1, keepdims=True), 1.0)
    mean_drift = drift.sum(axis=1, keepdims=True) / tokens
    return ((advantages >= 0) | (mean_drift <= threshold)).astype(mask.dtype)
