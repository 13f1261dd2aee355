"""Losses without a reference: ORPO, CPO, SimPO, AlphaPO, equal to TRL 1.16.0's trainers."""

import mlx.core as mx

from learner.losses.dpo import EXPONENT_LIMIT, SQUARE_LIMIT, smoothed
from protocol.config.preference_checks import CPO_LOSSES
from protocol.config.settings import PreferenceSettings
from protocol.errors import ConfigError

NEAREST = -1e-12  # mean log-probs closer to 0 have odds that are infinite in float32


def log1mexp(x: mx.array) -> mx.array:
    """Return log(1 - exp(x)) for x < 0, exact near 0 and far below."""
    near = mx.log(-mx.expm1(mx.where(x < -0.6931471805599453, -1.0, x)))
    far = mx.log1p(-mx.exp(mx.where(x < -0.6931471805599453, x, -1.0)))
    return mx.where(x < -0.6931471805599453, far, near)


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


def cpo_loss_type(settings: PreferenceSettings) -> str:
    """Return the loss type of CPO, or "simpo"; raises ConfigError for another or several."""
    if settings.method == "simpo" and settings.loss_type in (["sigmoid"], ["simpo"]):
        return "simpo"
    if settings.method == "cpo" and len(settings.loss_type) == 1:
        (name,) = settings.loss_type
        if name in CPO_LOSSES:
            return name
    raise ConfigError(
        f"objective.loss_type = {settings.loss_type}: {settings.method} takes one of "
        f"{', '.join(CPO_LOSSES) if settings.method == 'cpo' else 'simpo'}"
    )


def cpo_rewards(logprobs: mx.array, settings: PreferenceSettings) -> mx.array:
    """Return log-probs (B,), or AlphaPO's (1 - p^-alpha) / alpha of them."""
    if settings.alpha == 0.0:
        return logprobs
    return -mx.expm1(mx.minimum(-settings.alpha * logprobs, EXPONENT_LIMIT)) / settings.alpha


def cpo_terms(chosen: mx.array, rejected: mx.array, settings: PreferenceSettings) -> mx.array:
    """Return the loss of each pair (B,) from log-probs (B,): means for ipo and simpo, else sums."""
    z = cpo_rewards(chosen, settings) - cpo_rewards(rejected, settings)
    match cpo_loss_type(settings):
        case "hinge":
            return mx.maximum(1 - settings.beta * z, 0.0)
        case "ipo":
            # AlphaPO's rewards reach 1e35
            return (mx.clip(z, -SQUARE_LIMIT, SQUARE_LIMIT) - 1 / (2 * settings.beta)) ** 2
        case "simpo":
            z = z - settings.simpo_gamma / settings.beta
    return smoothed(settings.beta * z, settings.label_smoothing)
