"""The DPO family, equal to TRL 1.16.0's `DPOTrainer._compute_loss`.

Rows are pairs: the first half chosen, the second half rejected, as TRL concatenates them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from protocol.config.settings import PreferenceSettings

EXPONENT_LIMIT = 80.0  # TRL's clamp: exp stays finite in float32
SQUARE_LIMIT = 1e18  # its square is finite in float32


@dataclass(frozen=True)
class Pairs:
    """What the losses read; every array (B,) float32 unless said otherwise.

    `chosen`, `rejected`: summed policy log-probs, nats; `*_ratio`: summed policy less reference,
    token by token, for the difference of two sums loses digits; `chosen_length`,
    `rejected_length`: completion tokens; `sft` (): this micro-batch's sum of the chosen tokens'
    log-probs over the batch's number of them, negated; `rows` (): pairs of the whole batch.
    """

    chosen: mx.array
    rejected: mx.array
    chosen_ratio: mx.array
    rejected_ratio: mx.array
    chosen_length: mx.array
    rejected_length: mx.array
    sft: mx.array
    rows: mx.array

    def scores(self, settings: PreferenceSettings) -> tuple[mx.array, mx.array]:
        """Return f'(ratio) of chosen and rejected (B,)."""
        return f_score(self.chosen_ratio, settings), f_score(self.rejected_ratio, settings)

    def delta(self, settings: PreferenceSettings) -> mx.array:
        """Return the difference of the scores (B,)."""
        chosen, rejected = self.scores(settings)
        return chosen - rejected

    def mean_delta(self, settings: PreferenceSettings) -> mx.array:
        """Return the difference of the scores a token (B,)."""
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


def _exo_pair(pairs: Pairs, s: PreferenceSettings) -> mx.array:
    z = s.beta * pairs.delta(s)
    won, lost = log_sigmoid(z), log_sigmoid(-z)
    # Not mx.sigmoid: its gradient y (1 - y) has no digits left where y is near 1
    return mx.exp(won) * (won - math.log1p(-s.label_smoothing)) + mx.exp(lost) * (
        lost - math.log(s.label_smoothing)
    )


def _nca_pair(pairs: Pairs, s: PreferenceSettings) -> mx.array:
    chosen, rejected = s.beta * pairs.chosen_ratio, s.beta * pairs.rejected_ratio
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def _robust(pairs: Pairs, s: PreferenceSettings) -> mx.array:
    z, e = s.beta * pairs.delta(s), s.label_smoothing
    return (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)


def _aot(pairs: Pairs, s: PreferenceSettings) -> mx.array:
    policy = mx.sort(pairs.chosen - pairs.rejected)
    reference = mx.sort(
        (pairs.chosen - pairs.chosen_ratio) - (pairs.rejected - pairs.rejected_ratio)
    )
    return smoothed(s.beta * (policy - reference), s.label_smoothing)


def _aot_unpaired(pairs: Pairs, s: PreferenceSettings) -> mx.array:
    gap = mx.sort(pairs.chosen_ratio) - mx.sort(pairs.rejected_ratio)
    return smoothed(s.beta * gap, s.label_smoothing)


def _discopop(pairs: Pairs, s: PreferenceSettings) -> mx.array:
    z = s.beta * pairs.delta(s)
    # exp(-z) sigmoid(z / tau) in logs: the factors alone reach inf x 0
    exponential = mx.exp(log_sigmoid(z / s.discopop_tau) - z)
    return -log_sigmoid(z) * mx.sigmoid(-z / s.discopop_tau) + exponential


def _sppo_hard(pairs: Pairs, s: PreferenceSettings) -> mx.array:
    half = 0.5 / s.beta
    return (pairs.chosen_ratio - half) ** 2 + (pairs.rejected_ratio + half) ** 2


DPO_LOSSES: dict[str, Callable[[Pairs, PreferenceSettings], mx.array]] = {
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
    # One scalar for all pairs, as in TRL: times rows, for the sum below divides by them
    "sft": lambda p, s: mx.broadcast_to(p.sft * p.rows / p.chosen.size, p.chosen.shape),
    "sigmoid_norm": lambda p, s: -log_sigmoid(s.beta * p.mean_delta(s)),
}


def dpo_terms(pairs: Pairs, settings: PreferenceSettings) -> mx.array:
    """Return the weighted sum of the losses of each pair (B,)."""
    weights = settings.loss_weights or [1.0] * len(settings.loss_type)
    total = mx.zeros_like(pairs.chosen)
    for name, weight in zip(settings.loss_type, weights, strict=True):
        total = total + weight * DPO_LOSSES[name](pairs, settings)
    return total


def truncated_tail(mask: mx.array, ld_alpha: float) -> mx.array:
    """Return token weights (2B, C): 1 up to the pair's shared length, `ld_alpha` past it."""
    half = mask.shape[0] // 2
    lengths = mask.sum(axis=1)
    shared = mx.minimum(lengths[:half], lengths[half:])
    place = mx.cumsum(mask, axis=1)
    return mask * mx.where(place <= mx.concatenate([shared, shared])[:, None], 1.0, ld_alpha)
