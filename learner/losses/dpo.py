"""The DPO family, equal to TRL 1.16.0's `DPOTrainer._compute_loss`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from learner.losses.metrics import Metrics
from learner.losses.pairs import PairBatch, pair_metrics
from protocol.config.settings import PreferenceSettings

EXPONENT_LIMIT = 80.0  # TRL's clamp: exp stays finite in float32
SQUARE_LIMIT = 1e18  # a number whose square is still finite in float32


@dataclass(frozen=True)
class PairSums:
    """What the losses read of B pairs; every array (B,) float32 unless stated otherwise.

    `chosen`, `rejected`: summed policy log-probs, nats. `*_ratio`: policy minus reference, summed
    token by token, because the difference of two sums loses digits. `*_length`: completion tokens.
    `sft` (): this micro-batch's share of the negative mean log-prob of the chosen tokens. `count`
    (): pairs of the whole batch.
    """

    chosen: mx.array
    rejected: mx.array
    chosen_ratio: mx.array
    rejected_ratio: mx.array
    chosen_length: mx.array
    rejected_length: mx.array
    sft: mx.array
    count: mx.array

    def scores(self, settings: PreferenceSettings) -> tuple[mx.array, mx.array]:
        """Return f'(ratio) of chosen and rejected (B,)."""
        return f_score(self.chosen_ratio, settings), f_score(self.rejected_ratio, settings)

    def delta(self, settings: PreferenceSettings) -> mx.array:
        """Return the difference of the scores (B,)."""
        chosen, rejected = self.scores(settings)
        return chosen - rejected

    def mean_delta(self, settings: PreferenceSettings) -> mx.array:
        """Return the difference of the scores per token (B,)."""
        chosen, rejected = self.scores(settings)
        return chosen / mx.maximum(self.chosen_length, 1.0) - rejected / mx.maximum(
            self.rejected_length, 1.0
        )


def log_sigmoid(x: mx.array) -> mx.array:
    """Return log sigmoid(x), finite for every finite x."""
    return -mx.logaddexp(-x, mx.zeros_like(x))


def smoothed(z: mx.array, smoothing: float) -> mx.array:
    """Return -(1 - e) log sigmoid(z) - e log sigmoid(-z)."""
    return -(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z)


def f_score(ratio: mx.array, settings: PreferenceSettings) -> mx.array:
    """Return f' of the f-divergence at a log-ratio (B,)."""
    match settings.f_divergence_type:
        case "reverse_kl":
            return ratio
        case "forward_kl":
            return -mx.expm1(mx.minimum(-ratio, EXPONENT_LIMIT))
        case "js_divergence":
            return math.log(2) + log_sigmoid(ratio)
        case "alpha_divergence":
            slope = settings.f_alpha_divergence_coef - 1.0
            if abs(slope) < 1e-6:
                return ratio
            return mx.expm1(mx.minimum(slope * ratio, EXPONENT_LIMIT)) / slope


def _exo_pair(pairs: PairSums, s: PreferenceSettings) -> mx.array:
    z = s.beta * pairs.delta(s)
    won, lost = log_sigmoid(z), log_sigmoid(-z)
    # Not mx.sigmoid: its gradient y (1 - y) loses all digits where y is near 1
    return mx.exp(won) * (won - math.log1p(-s.label_smoothing)) + mx.exp(lost) * (
        lost - math.log(s.label_smoothing)
    )


def _nca_pair(pairs: PairSums, s: PreferenceSettings) -> mx.array:
    chosen, rejected = s.beta * pairs.chosen_ratio, s.beta * pairs.rejected_ratio
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def _robust(pairs: PairSums, s: PreferenceSettings) -> mx.array:
    z, e = s.beta * pairs.delta(s), s.label_smoothing
    return (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)


def _aot(pairs: PairSums, s: PreferenceSettings) -> mx.array:
    policy = mx.sort(pairs.chosen - pairs.rejected)
    reference = mx.sort(
        (pairs.chosen - pairs.chosen_ratio) - (pairs.rejected - pairs.rejected_ratio)
    )
    return smoothed(s.beta * (policy - reference), s.label_smoothing)


def _aot_unpaired(pairs: PairSums, s: PreferenceSettings) -> mx.array:
    gap = mx.sort(pairs.chosen_ratio) - mx.sort(pairs.rejected_ratio)
    return smoothed(s.beta * gap, s.label_smoothing)


def _discopop(pairs: PairSums, s: PreferenceSettings) -> mx.array:
    z = s.beta * pairs.delta(s)
    # exp(-z) sigmoid(z / tau) in logs: the factors alone reach inf x 0
    exponential = mx.exp(log_sigmoid(z / s.discopop_tau) - z)
    return -log_sigmoid(z) * mx.sigmoid(-z / s.discopop_tau) + exponential


def _sppo_hard(pairs: PairSums, s: PreferenceSettings) -> mx.array:
    half = 0.5 / s.beta
    return (pairs.chosen_ratio - half) ** 2 + (pairs.rejected_ratio + half) ** 2


DPO_LOSSES: dict[str, Callable[[PairSums, PreferenceSettings], mx.array]] = {
    "sigmoid": lambda p, s: -log_sigmoid(s.beta * p.delta(s)),
    "hinge": lambda p, s: mx.maximum(1 - s.beta * p.delta(s), 0.0),
    "ipo": lambda p, s: (
        (mx.clip(p.mean_delta(s), -SQUARE_LIMIT, SQUARE_LIMIT) - 1 / (2 * s.beta)) ** 2
    ),
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": lambda p, s: (
        -log_sigmoid(s.beta * p.chosen_ratio) - log_sigmoid(-s.beta * p.rejected_ratio)
    ),
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": lambda p, s: (
        mx.sigmoid(-s.beta * p.chosen_ratio) + mx.sigmoid(s.beta * p.rejected_ratio)
    ),
    "apo_down": lambda p, s: (
        mx.sigmoid(s.beta * p.chosen_ratio)
        + mx.sigmoid(-s.beta * (p.chosen_ratio - p.rejected_ratio))
    ),
    "discopop": _discopop,
    # One scalar for all pairs, as in TRL; the mean over pairs divides by `count` again
    "sft": lambda p, s: mx.broadcast_to(p.sft * p.count / p.chosen.size, p.chosen.shape),
    "sigmoid_norm": lambda p, s: -log_sigmoid(s.beta * p.mean_delta(s)),
}


def dpo_loss(batch: PairBatch, settings: PreferenceSettings) -> tuple[mx.array, Metrics]:
    """Return a micro-batch's share of DPO's loss, and its metrics."""
    pairs = _sums(batch, settings)
    weights = settings.loss_weights or [1.0] * len(settings.loss_type)
    # "sft" has its scores token by token already, so next to it each other loss gets them alone.
    scores = batch.scores if "sft" in settings.loss_type else None

    terms = mx.zeros_like(pairs.chosen)
    for name, weight in zip(settings.loss_type, weights, strict=True):
        term = weight * DPO_LOSSES[name](pairs, settings)
        if scores is not None and name != "sft":
            term = term * scores
        terms = terms + term

    terms = terms * (_wpo_weights(batch) if settings.use_weighting else mx.ones_like(terms))
    if batch.scores is not None and scores is None:
        terms = terms * batch.scores

    chosen = settings.beta * pairs.chosen_ratio
    rejected = settings.beta * pairs.rejected_ratio
    metrics = pair_metrics(chosen, rejected, pairs.chosen, pairs.rejected)
    return terms.sum() / batch.normalisers["pairs"], metrics


def _sums(batch: PairBatch, settings: PreferenceSettings) -> PairSums:
    logprobs, ref_logprobs, mask = batch.logprobs, batch.ref_logprobs, batch.mask
    if ref_logprobs is None and not settings.reference_free:
        raise ValueError("dpo needs ref_logprobs; only objective.reference_free does without")
    no_ref = mx.zeros_like(logprobs)
    ref = no_ref if ref_logprobs is None else mx.where(mask > 0, ref_logprobs, 0.0)

    half = logprobs.shape[0] // 2
    weights = mask if settings.ld_alpha is None else truncated_tail(mask, settings.ld_alpha)
    policy, ratio = (logprobs * weights).sum(axis=1), ((logprobs - ref) * weights).sum(axis=1)
    lengths = mask.sum(axis=1) if batch.lengths is None else batch.lengths

    scores = mx.ones((half, 1)) if batch.scores is None else batch.scores[:, None]
    sft = -(logprobs[:half] * mask[:half] * scores).sum() / batch.normalisers["chosen_tokens"]
    return PairSums(
        chosen=policy[:half],
        rejected=policy[half:],
        chosen_ratio=ratio[:half],
        rejected_ratio=ratio[half:],
        chosen_length=lengths[:half],
        rejected_length=lengths[half:],
        sft=sft,
        count=batch.normalisers["pairs"],
    )


def truncated_tail(mask: mx.array, ld_alpha: float) -> mx.array:
    """Return token weights (2B, C): 1 up to the pair's shared length, `ld_alpha` past it."""
    half = mask.shape[0] // 2
    lengths = mask.sum(axis=1)
    shared = mx.minimum(lengths[:half], lengths[half:])
    place = mx.cumsum(mask, axis=1)
    return mask * mx.where(place <= mx.concatenate([shared, shared])[:, None], 1.0, ld_alpha)


def _wpo_weights(batch: PairBatch) -> mx.array:
    """Return WPO's weight of each pair (B,), detached."""
    if batch.log_sum_sq_probs is None:
        raise ValueError("objective.use_weighting needs log_sum_sq_probs")
    mask, half = batch.mask, batch.mask.shape[0] // 2
    aligned = mx.where(mask > 0, batch.logprobs - batch.log_sum_sq_probs, 0.0).sum(axis=1)
    weights = mx.exp(aligned / mx.maximum(mask.sum(axis=1), 1.0))
    return mx.stop_gradient(weights[:half] * weights[half:])
