"""Losses without a reference: ORPO, CPO, SimPO, AlphaPO, equal to TRL 1.16.0's trainers."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from learner.losses.dpo import EXPONENT_LIMIT, SQUARE_LIMIT, smoothed
from learner.losses.metrics import Mean, Metrics, merge_metrics
from learner.losses.pairs import PairBatch, pair_metrics
from protocol.config.settings import PreferenceSettings

NEAREST = -1e-12  # mean log-probs closer to 0 have odds that are infinite in float32


def log1mexp(x: mx.array) -> mx.array:
    """Return log(1 - exp(x)) for x < 0, exact near 0 and far below."""
    far = x < -math.log(2)
    below = mx.log1p(-mx.exp(mx.where(far, x, -1.0)))
    return mx.where(far, below, mx.log(-mx.expm1(mx.where(far, -1.0, x))))


def log_odds(chosen: mx.array, rejected: mx.array) -> mx.array:
    """Return the log of the odds ratio of mean log-probs (B,), nats; finite at 0."""
    c, r = mx.minimum(chosen, NEAREST), mx.minimum(rejected, NEAREST)
    return (c - r) - (log1mexp(c) - log1mexp(r))


def log_sigmoid_odds(chosen: mx.array, rejected: mx.array) -> mx.array:
    """Return log sigmoid of the log odds ratio (B,), with finite gradients at 0.

    odds_c / (odds_c + odds_r), multiplied out, so that a chosen probability of 1 has its limit.
    """
    r = mx.minimum(rejected, NEAREST)
    c = mx.where(rejected > NEAREST, mx.minimum(chosen, NEAREST), chosen)
    top = mx.stop_gradient(mx.maximum(c, r))
    sum_of_odds = mx.exp(c - top) * -mx.expm1(r) + mx.exp(r - top) * -mx.expm1(c)
    return (c - top) + log1mexp(r) - mx.log(sum_of_odds)


def orpo_loss(batch: PairBatch, settings: PreferenceSettings) -> tuple[mx.array, Metrics]:
    """Return a micro-batch's share of ORPO's loss, and its metrics."""
    chosen, rejected = _sides(batch, per_token=True)
    ratio = log_sigmoid_odds(chosen, rejected)

    metrics = pair_metrics(settings.beta * chosen, settings.beta * rejected, chosen, rejected)
    count = mx.array(float(chosen.size))
    odds = {
        "log_odds_ratio": Mean(ratio.sum(), count),
        "log_odds_chosen": Mean(log_odds(chosen, rejected).sum(), count),
    }
    metrics = merge_metrics(metrics, Metrics(means=odds))
    return _with_nll(-settings.beta * ratio, 1.0, batch, metrics)


def cpo_loss(batch: PairBatch, settings: PreferenceSettings) -> tuple[mx.array, Metrics]:
    """Return a micro-batch's share of the loss of CPO, SimPO or AlphaPO, and its metrics."""
    chosen, rejected = _sides(batch, per_token=_cpo_loss(settings).per_token)
    terms = cpo_terms(chosen, rejected, settings)

    rewards = (cpo_rewards(chosen, settings), cpo_rewards(rejected, settings))
    metrics = pair_metrics(settings.beta * rewards[0], settings.beta * rewards[1], chosen, rejected)
    return _with_nll(terms, settings.cpo_alpha, batch, metrics)


def _sides(batch: PairBatch, *, per_token: bool) -> tuple[mx.array, mx.array]:
    """Return the log-probs (B,) of chosen and rejected: sums, or means over tokens."""
    half = batch.mask.shape[0] // 2
    totals = (batch.logprobs * batch.mask).sum(axis=1)
    if per_token:
        totals = totals / mx.maximum(batch.mask.sum(axis=1), 1.0)
    return totals[:half], totals[half:]


def _with_nll(
    terms: mx.array, weight: float, batch: PairBatch, metrics: Metrics
) -> tuple[mx.array, Metrics]:
    """Return the share of pairs' `terms` (B,) and of the chosen answers' weighted NLL."""
    half = terms.size
    factor = mx.ones_like(terms) if batch.scores is None else batch.scores
    loss = (terms * factor).sum() / batch.normalisers["pairs"]
    if not weight:
        return loss, metrics

    mask = batch.mask if batch.nll_mask is None else batch.nll_mask
    nll_sum = -(batch.logprobs[:half] * mask[:half] * factor[:, None]).sum()
    nll = nll_sum / batch.normalisers["nll_tokens"]
    return loss + weight * nll, merge_metrics(metrics, Metrics(shares={"nll_loss": nll}))


@dataclass(frozen=True)
class CpoLoss:
    """A loss of each pair (B,) from the difference of rewards (B,): of sums, or `per_token`."""

    terms: Callable[[mx.array, PreferenceSettings], mx.array]
    per_token: bool = False


CPO_LOSSES = {
    "sigmoid": CpoLoss(lambda z, s: smoothed(s.beta * z, s.label_smoothing)),
    "hinge": CpoLoss(lambda z, s: mx.maximum(1 - s.beta * z, 0.0)),
    # AlphaPO's rewards reach 1e35, whose square is not finite
    "ipo": CpoLoss(
        lambda z, s: (mx.clip(z, -SQUARE_LIMIT, SQUARE_LIMIT) - 1 / (2 * s.beta)) ** 2,
        per_token=True,
    ),
    "simpo": CpoLoss(
        lambda z, s: smoothed(s.beta * (z - s.simpo_gamma / s.beta), s.label_smoothing),
        per_token=True,
    ),
}


def _cpo_loss(settings: PreferenceSettings) -> CpoLoss:
    # With method "simpo", the default loss type "sigmoid" means "simpo" too.
    return CPO_LOSSES["simpo" if settings.method == "simpo" else settings.loss_type[0]]


def cpo_rewards(logprobs: mx.array, settings: PreferenceSettings) -> mx.array:
    """Return log-probs (B,), or AlphaPO's (1 - p^-alpha) / alpha of them."""
    if settings.alpha == 0.0:
        return logprobs
    return -mx.expm1(mx.minimum(-settings.alpha * logprobs, EXPONENT_LIMIT)) / settings.alpha


def cpo_terms(chosen: mx.array, rejected: mx.array, settings: PreferenceSettings) -> mx.array:
    """Return the loss of each pair (B,) from log-probs (B,): means for ipo and simpo, else sums."""
    z = cpo_rewards(chosen, settings) - cpo_rewards(rejected, settings)
    return _cpo_loss(settings).terms(z, settings)
