"""Preference losses, equal to TRL 1.16.0's DPO, CPO, ORPO and KTO trainers.

Pure functions of arrays. Normalisers come from the whole batch, so micro-batches add up to it
under any split that keeps pairs together, except where `needs_whole_batch` says otherwise.
"""

import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from learner.losses.dpo import Pairs, dpo_terms, truncated_tail
from learner.losses.metrics import Metrics, finish_metrics, mean
from learner.losses.orpo_cpo import (
    cpo_loss_type,
    cpo_rewards,
    cpo_terms,
    log_odds,
    log_sigmoid_odds,
)
from protocol.config.preference_checks import KTO_LOSSES
from protocol.config.settings import PreferenceSettings
from protocol.errors import ConfigError

Normalisers = Mapping[str, mx.array]


def needs_reference(settings: PreferenceSettings) -> bool:
    """Return whether the loss reads a reference policy's log-probs."""
    return settings.method in ("dpo", "kto") and not settings.reference_free


def needs_whole_batch(settings: PreferenceSettings) -> bool:
    """Return whether the loss couples pairs, so that micro-batches cannot add up to it.

    aot sorts over the batch; sft under WPO multiplies two means over it.
    """
    types = settings.loss_type if settings.method == "dpo" else []
    sorts = any(name.startswith("aot") for name in types)
    return sorts or ("sft" in types and settings.use_weighting)


def pair_normalisers(
    *, rows: int, chosen_tokens: float, nll_tokens: float | None = None
) -> dict[str, float]:
    """Return what pair losses divide by: the batch's pairs, its chosen completion tokens, and the
    tokens of the NLL (ORPO: prompt and response; the chosen tokens by default)."""
    chosen = max(chosen_tokens, 1.0)
    return {
        "rows": float(max(rows, 1)),
        "chosen_tokens": chosen,
        "nll_tokens": max(chosen if nll_tokens is None else nll_tokens, 1.0),
    }


def preference_loss(
    logprobs: mx.array,
    *,
    mask: mx.array,
    ref_logprobs: mx.array | None = None,
    lengths: mx.array | None = None,
    log_sum_sq_probs: mx.array | None = None,
    nll_mask: mx.array | None = None,
    scores: mx.array | None = None,
    entropies: mx.array | None = None,
    normalisers: Normalisers,
    settings: PreferenceSettings,
) -> tuple[mx.array, Metrics]:
    """Return a micro-batch's share of the loss of B pairs, and mergeable metrics.

    `logprobs`, `ref_logprobs`, `mask`, `nll_mask`, `log_sum_sq_probs`, `entropies` (2B, C) float32,
    nats; rows [:B] chosen, [B:] rejected. `mask` counts completion tokens, `nll_mask` those of
    ORPO's NLL. `lengths` (2B,): tokens that ipo and sigmoid_norm divide by, the mask's by default.
    `scores` (B,): `preference_score`, a factor of each pair's loss.
    """
    live = mask > 0
    logprobs = mx.where(live if nll_mask is None else live | (nll_mask > 0), logprobs, 0.0)
    if settings.method == "dpo":
        if ref_logprobs is None and not settings.reference_free:
            raise ValueError("dpo needs ref_logprobs; only objective.reference_free does without")
        ref = mx.zeros_like(logprobs) if ref_logprobs is None else mx.where(live, ref_logprobs, 0.0)
        counted = mask.sum(axis=1) if lengths is None else lengths
        loss, metrics = _dpo(
            logprobs, ref, mask, counted, log_sum_sq_probs, scores, normalisers, settings
        )
    else:
        nll = mask if nll_mask is None else nll_mask
        loss, metrics = _without_reference(logprobs, mask, nll, scores, normalisers, settings)
    if entropies is not None:
        metrics |= mean("entropy", mx.where(live, entropies, 0.0).sum(), mask.sum())
    return loss, {name: mx.stop_gradient(value) for name, value in metrics.items()}


def _dpo(
    logprobs: mx.array,
    ref: mx.array,
    mask: mx.array,
    lengths: mx.array,
    log_sum_sq_probs: mx.array | None,
    scores: mx.array | None,
    normalisers: Normalisers,
    settings: PreferenceSettings,
) -> tuple[mx.array, Metrics]:
    half = logprobs.shape[0] // 2
    weights = mask if settings.ld_alpha is None else truncated_tail(mask, settings.ld_alpha)
    policy, ratio = (logprobs * weights).sum(axis=1), ((logprobs - ref) * weights).sum(axis=1)
    chosen_factor = mx.ones((half, 1)) if scores is None else scores[:, None]
    sft = -(logprobs[:half] * mask[:half] * chosen_factor).sum() / normalisers["chosen_tokens"]
    pairs = Pairs(
        chosen=policy[:half],
        rejected=policy[half:],
        chosen_ratio=ratio[:half],
        rejected_ratio=ratio[half:],
        chosen_length=lengths[:half],
        rejected_length=lengths[half:],
        sft=sft,
        rows=normalisers["rows"],
    )
    factor = mx.ones_like(pairs.chosen)
    if settings.use_weighting:
        if log_sum_sq_probs is None:
            raise ValueError("objective.use_weighting needs log_sum_sq_probs")
        factor = _wpo(logprobs, log_sum_sq_probs, mask)
    terms = _scored_terms(pairs, factor, scores, settings)
    chosen = settings.beta * pairs.chosen_ratio
    rejected = settings.beta * pairs.rejected_ratio
    metrics = _pair_metrics(chosen, rejected, pairs.chosen, pairs.rejected)
    return terms.sum() / normalisers["rows"], metrics


def _scored_terms(
    pairs: Pairs, factor: mx.array, scores: mx.array | None, settings: PreferenceSettings
) -> mx.array:
    """Weigh each pair's losses (B,); the sft scalar has its scores inside already."""
    if scores is None or "sft" not in settings.loss_type:
        return dpo_terms(pairs, settings) * factor * (1.0 if scores is None else scores)
    weights = settings.loss_weights or [1.0] * len(settings.loss_type)
    total = mx.zeros_like(factor)
    for name, weight in zip(settings.loss_type, weights, strict=True):
        one = type(settings)(**{**_fields(settings), "loss_type": [name], "loss_weights": [weight]})
        total = total + dpo_terms(pairs, one) * (1.0 if name == "sft" else scores)
    return total * factor


def _fields(settings: PreferenceSettings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in settings.__struct_fields__}


def _wpo(logprobs: mx.array, log_sum_sq_probs: mx.array, mask: mx.array) -> mx.array:
    """Return WPO's weight of each pair (B,), detached."""
    half = logprobs.shape[0] // 2
    aligned = mx.where(mask > 0, logprobs - log_sum_sq_probs, 0.0).sum(axis=1)
    weights = mx.exp(aligned / mx.maximum(mask.sum(axis=1), 1.0))
    return mx.stop_gradient(weights[:half] * weights[half:])


def _without_reference(
    logprobs: mx.array,
    mask: mx.array,
    nll_mask: mx.array,
    scores: mx.array | None,
    normalisers: Normalisers,
    settings: PreferenceSettings,
) -> tuple[mx.array, Metrics]:
    half = logprobs.shape[0] // 2
    totals = (logprobs * mask).sum(axis=1)
    orpo = settings.method == "orpo"
    if orpo or cpo_loss_type(settings) in ("ipo", "simpo"):
        totals = totals / mx.maximum(mask.sum(axis=1), 1.0)
    chosen, rejected = totals[:half], totals[half:]
    factor = mx.ones_like(chosen) if scores is None else scores
    nll_sum = -(logprobs[:half] * nll_mask[:half] * factor[:, None]).sum()
    nll = nll_sum / normalisers["nll_tokens"]
    if orpo:
        ratio = log_sigmoid_odds(chosen, rejected)
        terms, nll_weight = -settings.beta * ratio, 1.0
        rewards = (chosen, rejected)
        extra = mean("log_odds_ratio", ratio.sum(), mx.array(float(half)))
        extra |= mean("log_odds_chosen", log_odds(chosen, rejected).sum(), mx.array(float(half)))
    else:
        terms, nll_weight = cpo_terms(chosen, rejected, settings), settings.cpo_alpha
        rewards = (cpo_rewards(chosen, settings), cpo_rewards(rejected, settings))
        extra = {}
    metrics = _pair_metrics(
        settings.beta * rewards[0], settings.beta * rewards[1], chosen, rejected
    )
    metrics |= extra
    loss = (terms * factor).sum() / normalisers["rows"]
    if nll_weight:
        loss = loss + nll_weight * nll
        metrics |= {"sum:nll_loss": nll}
    return loss, metrics


def _pair_metrics(
    chosen: mx.array, rejected: mx.array, chosen_logprobs: mx.array, rejected_logprobs: mx.array
) -> Metrics:
    """Return TRL's metrics from rewards and log-probs (B,); a tie is no accuracy."""
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(mx.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": chosen_logprobs,
        "logps/rejected": rejected_logprobs,
    }
    count = mx.array(float(chosen.size))
    metrics: Metrics = {}
    for name, value in values.items():
        metrics |= mean(name, value.sum(), count)
    return metrics


def kto_loss_type(settings: PreferenceSettings) -> str:
    """Return KTO's loss type ("kto" where none was chosen); raises ConfigError for another."""
    if settings.loss_type == ["sigmoid"]:
        return "kto"
    if len(settings.loss_type) == 1 and settings.loss_type[0] in KTO_LOSSES:
        return settings.loss_type[0]
    raise ConfigError(
        f"objective.loss_type = {settings.loss_type}: kto takes one of {', '.join(KTO_LOSSES)}"
    )


def kto_kl(kl_logprobs: np.ndarray, ref_kl_logprobs: np.ndarray) -> float:
    """Return max(mean(policy - reference), 0) of the whole batch's mismatched completions (N,)."""
    return max(float(np.mean(kl_logprobs - ref_kl_logprobs)), 0.0) if kl_logprobs.size else 0.0


def kto_loss(
    logprobs: mx.array,
    *,
    ref_logprobs: mx.array,
    mask: mx.array,
    labels: mx.array,
    kl: mx.array,
    normalisers: Normalisers,
    settings: PreferenceSettings,
) -> tuple[mx.array, Metrics]:
    """Return a micro-batch's share of KTO's loss over B judged answers, and mergeable metrics.

    `logprobs`, `ref_logprobs`, `mask` (B, C) float32, nats; `labels` (B,) 1 = desirable; `kl` () is
    `kto_kl`'s; `normalisers["rows"]` the batch's rows. A sum over groups that may be empty.
    """
    live = mask > 0
    policy = mx.where(live, logprobs, 0.0).sum(axis=1)
    ratio = mx.where(live, logprobs - ref_logprobs, 0.0).sum(axis=1)
    good = labels > 0
    shift = kl if kto_loss_type(settings) == "kto" else mx.zeros_like(kl)
    z = settings.beta * (ratio - mx.stop_gradient(shift))
    terms = mx.sigmoid(mx.where(good, -z, z))
    weight = mx.where(good, settings.desirable_weight, settings.undesirable_weight)
    metrics: Metrics = {"max:kl": kl}
    for side, rows in (("chosen", good), ("rejected", ~good)):
        chosen = rows.astype(mx.float32)
        rewards = settings.beta * ratio * chosen
        metrics |= mean(f"rewards/{side}", rewards.sum(), chosen.sum())
        metrics |= mean(f"logps/{side}", (policy * chosen).sum(), chosen.sum())
    loss = (weight * terms).sum() / normalisers["rows"]
    return loss, {name: mx.stop_gradient(value) for name, value in metrics.items()}


def finish_kto(metrics: Metrics) -> dict[str, float]:
    """Turn merged metrics into TRL's: a margin of means, and nothing of a side without answers."""
    found = finish_metrics(metrics, empty=math.nan)
    finished = {name: value for name, value in found.items() if not math.isnan(value)}
    if {"rewards/chosen", "rewards/rejected"} <= finished.keys():
        margin = finished["rewards/chosen"] - finished["rewards/rejected"]
        finished["rewards/margins"] = margin
    return finished


def kto_weight_advice(good: int, bad: int, settings: PreferenceSettings) -> str:
    """Return what TRL warns of where the weights do not balance good and bad answers, or "".

    Equation 8 of the KTO paper: (desirable_weight x good) / (undesirable_weight x bad) should be
    in [1, 4/3].
    """
    counts = f"{good} good and {bad} bad answers"
    good, bad = max(good, 1), max(bad, 1)  # as TRL counts
    desirable, undesirable = settings.desirable_weight, settings.undesirable_weight
    low, high = (round(bad * undesirable / good * factor, 2) for factor in (1.0, 1.33))
    under, over = (round(good * desirable / bad / factor, 2) for factor in (1.33, 1.0))
    if good == bad or low <= desirable <= high or under <= undesirable <= over:
        return ""
    return (
        f"{counts} are not balanced by their weights: set "
        f"objective.desirable_weight in [{low}, {high}] or objective.undesirable_weight in "
        f"[{under}, {over}], not both"
    )
