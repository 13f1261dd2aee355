"""KTO, equal to TRL 1.16.0's KTOTrainer: a loss over answers that were judged good or bad."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from learner.losses.metrics import Mean, Metrics, detached
from protocol.config.settings import PreferenceSettings


def has_kl(settings: PreferenceSettings) -> bool:
    """Return whether the loss has a KL term, of prompts with other prompts' answers."""
    return settings.loss_type != ["apo_zero_unpaired"]


def kto_kl(gaps: np.ndarray) -> float:
    """Return the KL term, nats.

    `gaps` (N,): policy minus reference log-probs of the whole batch's mismatched completions.
    """
    return max(float(np.mean(gaps)), 0.0) if gaps.size else 0.0


def kto_loss(
    logprobs: mx.array,
    *,
    ref_logprobs: mx.array,
    mask: mx.array,
    labels: mx.array,
    kl: mx.array,
    normalisers: Mapping[str, mx.array],
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

    shift = kl if has_kl(settings) else mx.zeros_like(kl)
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
    """Return TRL's warning where the weights do not balance good and bad answers, else "".

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
