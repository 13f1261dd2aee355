"""KTO, equal to TRL 1.16.0's KTOTrainer: a loss over answers that were judged good or bad."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from learner.losses.metrics import Mean, Metrics, detached
from protocol.config.preference_checks import KTO_LOSSES
from protocol.config.settings import PreferenceSettings
from protocol.errors import ConfigError

Normalisers = Mapping[str, mx.array]


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
    """Return a micro-batch's share of KTO's loss over B judged answers, and its metrics.

    `logprobs`, `ref_logprobs`, `mask` (B, C) float32, nats; `labels` (B,) 1 = desirable; `kl` () is
    `kto_kl`'s; `normalisers["answers"]` () counts those of the whole batch.
    """
    live = mask > 0
    policy = mx.where(live, logprobs, 0.0).sum(axis=1)
    ratio = mx.where(live, logprobs - ref_logprobs, 0.0).sum(axis=1)
    good = labels > 0

    shift = kl if kto_loss_type(settings) == "kto" else mx.zeros_like(kl)
    z = settings.beta * (ratio - mx.stop_gradient(shift))
    terms = mx.sigmoid(mx.where(good, -z, z))
    weight = mx.where(good, settings.desirable_weight, settings.undesirable_weight)
    loss = (weight * terms).sum() / normalisers["answers"]

    # A batch, and even more so a micro-batch, may have answers of one kind only.
    means: dict[str, Mean] = {}
    for side, members in (("chosen", good), ("rejected", ~good)):
        counted = members.astype(mx.float32)
        rewards = settings.beta * ratio * counted
        means[f"rewards/{side}"] = Mean(rewards.sum(), counted.sum())
        means[f"logps/{side}"] = Mean((policy * counted).sum(), counted.sum())
    metrics = Metrics(
        means_if_any=means,
        margins={"rewards/margins": (means["rewards/chosen"], means["rewards/rejected"])},
        maxima={"kl": kl},  # the batch's, so the same in every micro-batch
    )
    return loss, detached(metrics)


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
