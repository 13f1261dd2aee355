"""The GRPO family of losses, equal to TRL 1.16.0's `GRPOTrainer._compute_loss`.

To add a variant, write its surrogate, give it a row in `VARIANTS`, and name it in `loss_type` of
`protocol/config/objective_settings.py`.

Every normaliser is computed on the whole optimiser batch (`grpo_normalisers`) and passed in, so
that the losses and gradients of micro-batches add up to the whole batch's under any split. That
equals TRL at one micro-batch, and at any number of them for every loss but `bnpo`, which TRL
normalises per micro-batch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict

import mlx.core as mx
import numpy as np

from learner.losses.clipping import CLIP_RATIOS, loss_metrics
from learner.losses.importance import k3, log_ratio, off_policy_mask, saturated
from learner.losses.metrics import Mean, Metrics, detached, merge_metrics
from protocol.config.settings import GrpoSettings

Normalisers = Mapping[str, mx.array]
Values = dict[str, mx.array]  # (B, C) or (B, 1) each, by the name of the metric that averages it


@dataclass(frozen=True)
class SurrogateInputs:
    """What a surrogate loss reads; (B, C) float32, nats, unless stated otherwise.

    `gap` is policy minus old log-probs; `coefficient` its exp, (B, 1) at the sequence level;
    `advantages` (B, 1); `ratio` is `importance_ratio`'s, (B, C) or (B, 1), None without it.
    """

    logprobs: mx.array
    gap: mx.array
    coefficient: mx.array
    advantages: mx.array
    mask: mx.array
    ratio: mx.array | None


def clipped_surrogate(x: SurrogateInputs, settings: GrpoSettings) -> tuple[mx.array, Values]:
    """Return PPO's clipped loss; `delta` bounds the ratio from above (two-sided clipping)."""
    low = settings.epsilon
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    clipped = mx.clip(x.coefficient, 1 - low, 1 + high)
    ratio = x.coefficient
    if settings.delta is not None:
        ratio = mx.minimum(ratio, settings.delta)
    loss = -mx.minimum(ratio * x.advantages, clipped * x.advantages)

    below = ((ratio < 1 - low) & (x.advantages < 0)).astype(mx.float32)
    above = ((ratio > 1 + high) & (x.advantages > 0)).astype(mx.float32)
    return loss, dict(zip(CLIP_RATIOS, (below, above, mx.maximum(below, above)), strict=True))


def cispo_surrogate(x: SurrogateInputs, settings: GrpoSettings) -> tuple[mx.array, Values]:
    """Return CISPO's loss: the capped ratio is a constant weight of the log-prob."""
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    factor = mx.stop_gradient(mx.minimum(x.coefficient, high))
    over = ((x.coefficient > high) & (x.advantages > 0)).astype(mx.float32)
    return -factor * x.advantages * x.logprobs, {"cispo_clip_ratio": over}


def sapo_surrogate(x: SurrogateInputs, settings: GrpoSettings) -> tuple[mx.array, Values]:
    """Return SAPO's loss: a sigmoid of the ratio instead of clipping."""
    positive, negative = settings.sapo_temperature_pos, settings.sapo_temperature_neg
    temperature = mx.where(x.advantages > 0, positive, negative)
    soft = mx.sigmoid(temperature * (x.coefficient - 1)) * 4 / temperature
    return -soft * x.advantages, {}


def vespo_surrogate(x: SurrogateInputs, settings: GrpoSettings) -> tuple[mx.array, Values]:
    """Return VESPO's loss: the log-probs weighted by phi (B, 1), a constant.

    phi = exp(lambda + k w - lambda e^w), for w the clamped log-ratio of the sequence.
    """
    lowest = math.log(1e-8)
    total = (mx.clip(x.gap, -20.0, 20.0) * x.mask).sum(axis=-1, keepdims=True)
    if x.ratio is not None:
        total = total + mx.clip(mx.log(x.ratio), lowest, 20.0).sum(axis=-1, keepdims=True)
    omega = mx.clip(total, lowest, 20.0)

    k = mx.where(x.advantages >= 0, settings.vespo_k_pos, settings.vespo_k_neg)
    scale = mx.where(x.advantages >= 0, settings.vespo_lambda_pos, settings.vespo_lambda_neg)
    scale = mx.maximum(scale, 1e-4)
    phi = mx.exp(scale + k * omega - scale * mx.exp(omega))
    phi = mx.stop_gradient(mx.where(mx.isfinite(phi), phi, 0.0))
    return -phi * x.advantages * x.logprobs, {"vespo/phi_seq_mean": phi}


def _sequence_means(loss: mx.array, mask: mx.array, normalisers: Normalisers) -> mx.array:
    means = loss.sum(axis=-1) / mx.maximum(mask.sum(axis=-1), 1.0)
    return means.sum() / normalisers["sequences"]


def _sequence_sums(loss: mx.array, mask: mx.array, normalisers: Normalisers) -> mx.array:
    return loss.sum(axis=-1).sum() / normalisers["sequences"]


def _per(normaliser: str) -> Callable[[mx.array, mx.array, Normalisers], mx.array]:
    return lambda loss, mask, normalisers: loss.sum() / normalisers[normaliser]


@dataclass(frozen=True)
class Variant:
    """A loss of the family.

    `surrogate` returns the policy loss, (B, C) or (B, 1), and what to average as metrics;
    `aggregate` turns masked losses (B, C), `mask` and normalisers into the micro-batch's share ().
    `clip_metrics` are 0 for a completion whose ratio is 1.
    """

    surrogate: Callable[[SurrogateInputs, GrpoSettings], tuple[mx.array, Values]]
    aggregate: Callable[[mx.array, mx.array, Normalisers], mx.array]
    clip_metrics: tuple[str, ...] = ()
    applies_ratio: bool = False  # the surrogate uses the importance ratio itself


VARIANTS = {
    "grpo": Variant(clipped_surrogate, _sequence_means, CLIP_RATIOS),
    "bnpo": Variant(clipped_surrogate, _per("tokens"), CLIP_RATIOS),
    "dr_grpo": Variant(clipped_surrogate, _per("length_tokens"), CLIP_RATIOS),
    "dapo": Variant(clipped_surrogate, _per("generation_tokens"), CLIP_RATIOS),
    "cispo": Variant(cispo_surrogate, _per("generation_tokens"), ("cispo_clip_ratio",)),
    "sapo": Variant(sapo_surrogate, _sequence_means),
    "luspo": Variant(clipped_surrogate, _sequence_sums, CLIP_RATIOS),
    "vespo": Variant(vespo_surrogate, _per("generation_tokens"), applies_ratio=True),
}


def grpo_normalisers(*, mask_sums: np.ndarray, max_completion_length: int) -> dict[str, float]:
    """Return what the losses divide by, from the mask sums (N,) of the whole batch.

    `entropy_threshold` (nats) and `entropy_tokens` count every token; with a quantile, replace them
    by what `entropy_quantile` returns.
    """
    tokens = max(float(mask_sums.sum()), 1.0)
    return {
        "sequences": float(len(mask_sums)),
        "tokens": tokens,
        "generation_tokens": tokens,  # TRL's, of all that was generated for the step
        "length_tokens": float(len(mask_sums)) * max_completion_length,
        "entropy_threshold": -math.inf,
        "entropy_tokens": tokens,
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
    sequence_mask: mx.array | None = None,
    normalisers: Normalisers,
    settings: GrpoSettings,
) -> tuple[mx.array, Metrics]:
    """Return a micro-batch's share of the loss, and its metrics.

    `logprobs`, `entropies`, `mask`, `old_logprobs`, `ref_logprobs`, `sampling_logprobs` (B, C)
    float32, nats; `advantages` (B,). `ratio` is `importance_ratio`'s, if any; the off-policy mask
    compares with `sampling_logprobs`, or else with `old_logprobs`. `sequence_mask` (B,) is 0 for
    empty sequences that only fill the shape, which metrics leave out.
    """
    sequence_mask = mx.ones(advantages.shape) if sequence_mask is None else sequence_mask
    variant, advantages = VARIANTS[settings.loss_type], advantages[:, None]

    # Padding must not meet exp: 0 there keeps every ratio at 1 and its gradient at 0.
    gap = mx.where(mask > 0, logprobs - old_logprobs, 0.0)
    log_weights = saturated(log_ratio(gap, mask, settings))
    inputs = SurrogateInputs(logprobs, gap, mx.exp(log_weights), advantages, mask, ratio)
    loss, values = variant.surrogate(inputs, settings)
    values["entropy"] = entropies
    if settings.beta != 0.0:
        values["kl"] = _kl(logprobs, ref_logprobs, log_weights, mask, settings)
    metrics = loss_metrics(values, ratio, mask, sequence_mask)

    if (threshold := settings.off_policy_mask_threshold) is not None:
        sampling = old_logprobs if sampling_logprobs is None else sampling_logprobs
        loss = loss * off_policy_mask(logprobs, sampling, advantages, mask, threshold)
    kept = mask  # or only tokens of high entropy
    if settings.top_entropy_quantile < 1.0:
        high = (entropies >= normalisers["entropy_threshold"]).astype(mask.dtype)
        loss, kept = loss * high, mask * high
    if ratio is not None and not variant.applies_ratio:
        loss = loss * ratio

    if "kl" in values:
        loss = loss + settings.beta * values["kl"]
    total = variant.aggregate(loss * mask, mask, normalisers)

    if settings.entropy_coef != 0.0:
        metrics = merge_metrics(metrics, Metrics(shares={"policy_loss": total}))
        bonus = (entropies * kept).sum() / normalisers["entropy_tokens"]
        total = total - settings.entropy_coef * bonus
    return total, detached(metrics)


def _kl(
    logprobs: mx.array,
    ref_logprobs: mx.array | None,
    log_weights: mx.array,
    mask: mx.array,
    settings: GrpoSettings,
) -> mx.array:
    """Return the estimated KL to the reference of each token (B, C), nats."""
    if ref_logprobs is None:
        raise ValueError("beta is not 0: grpo_loss needs ref_logprobs")
    if not settings.use_bias_correction_kl:
        log_weights = mx.zeros_like(log_weights)
    return k3(mx.where(mask > 0, ref_logprobs - logprobs, 0.0), log_weights)


class Skipped(TypedDict):
    """Completions left out of the forward pass; () float32 each."""

    sequences: mx.array
    nonempty: mx.array  # sequences with tokens that count
    tokens: mx.array  # that count


def unclipped(skipped: Skipped, settings: GrpoSettings) -> Metrics:
    """Return the clip ratios of completions that need no forward pass: all 0.

    Their advantage is 0 or no token counts, so that the ratio is 1 (cispo's cap must not be below).
    """
    by_token = settings.importance_sampling_level == "token"
    names = VARIANTS[settings.loss_type].clip_metrics
    weight = skipped["tokens"] if by_token else skipped["sequences"]
    means = {name: Mean(mx.array(0.0), weight) for name in names}
    if names != CLIP_RATIOS:
        return Metrics(means=means)

    some = (skipped["nonempty"] if by_token else skipped["sequences"]) > 0
    return Metrics(
        means=means,
        minima={"clip_ratio/low_min": mx.where(some, 0.0, math.inf)},
        maxima={"clip_ratio/high_max": mx.where(some, 0.0, -math.inf)},
    )
