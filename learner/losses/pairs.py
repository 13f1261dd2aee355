"""The inputs, normalisers and metrics that all pair losses share."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from learner.losses.metrics import Mean, Metrics


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """B pairs as arrays (2B, C) float32, nats: [:B] chosen, [B:] rejected, as TRL has them.

    `mask` counts completion tokens, `nll_mask` those of the NLL (by default the same). `lengths`
    (2B,): tokens that ipo and sigmoid_norm divide by, the mask's by default. `scores` (B,):
    `preference_score`, a factor of each pair's loss. `normalisers`: `pair_normalisers`.
    """

    logprobs: mx.array
    mask: mx.array
    normalisers: Mapping[str, mx.array]
    nll_mask: mx.array | None = None
    ref_logprobs: mx.array | None = None
    log_sum_sq_probs: mx.array | None = None  # of every token's distribution, for WPO
    lengths: mx.array | None = None
    scores: mx.array | None = None


def pair_normalisers(
    *, pairs: int, chosen_tokens: float, nll_tokens: float | None = None
) -> dict[str, float]:
    """Return what pair losses divide by: counts over the whole batch.

    `nll_tokens` are the chosen tokens by default; ORPO's NLL counts the prompts too.
    """
    chosen = max(chosen_tokens, 1.0)
    return {
        "pairs": float(max(pairs, 1)),
        "chosen_tokens": chosen,
        "nll_tokens": max(chosen if nll_tokens is None else nll_tokens, 1.0),
    }


def pair_metrics(
    chosen: mx.array, rejected: mx.array, chosen_logprobs: mx.array, rejected_logprobs: mx.array
) -> Metrics:
    """Return TRL's metrics from rewards and log-probs (B,); a tie counts as inaccurate."""
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(mx.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": chosen_logprobs,
        "logps/rejected": rejected_logprobs,
    }
    count = mx.array(float(chosen.size))
    return Metrics(means={name: Mean(value.sum(), count) for name, value in values.items()})
