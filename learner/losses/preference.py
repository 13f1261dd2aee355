"""The loss of each method that trains on pairs, equal to TRL 1.16.0's DPO, CPO and ORPO trainers.

Normalisers come from the whole batch, so micro-batches add up to it under any split that keeps
pairs together, except where `needs_whole_batch` says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from learner.losses.dpo import dpo_loss
from learner.losses.metrics import Metrics, detached
from learner.losses.orpo_cpo import cpo_loss, orpo_loss
from learner.losses.pairs import PairBatch
from protocol.config.settings import PreferenceSettings


@dataclass(frozen=True)
class PairMethod:
    """A method over pairs: its loss, and what it needs beyond their log-probs."""

    loss: Callable[[PairBatch, PreferenceSettings], tuple[mx.array, Metrics]]
    reference: bool = False  # reads `ref_logprobs`, unless objective.reference_free
    prompt_nll: bool = False  # its NLL counts the prompt's tokens too, by `nll_mask`


PAIR_METHODS = {
    "dpo": PairMethod(dpo_loss, reference=True),
    "cpo": PairMethod(cpo_loss),
    "simpo": PairMethod(cpo_loss),
    "orpo": PairMethod(orpo_loss, prompt_nll=True),
}


def needs_reference(settings: PreferenceSettings) -> bool:
    """Return whether the loss over pairs reads a reference policy's log-probs."""
    return PAIR_METHODS[settings.method].reference and not settings.reference_free


def needs_whole_batch(settings: PreferenceSettings) -> bool:
    """Return whether the loss couples pairs, so that micro-batches cannot add up to it.

    aot sorts over the batch; sft under WPO multiplies two means over it.
    """
    types = settings.loss_type if settings.method == "dpo" else []
    sorts = any(name.startswith("aot") for name in types)
    return sorts or ("sft" in types and settings.use_weighting)


def preference_loss(batch: PairBatch, settings: PreferenceSettings) -> tuple[mx.array, Metrics]:
    """Return a micro-batch's share of the loss of its pairs, and its metrics."""
    counted = batch.mask > 0
    if batch.nll_mask is not None:
        counted = counted | (batch.nll_mask > 0)
    batch = replace(batch, logprobs=mx.where(counted, batch.logprobs, 0.0))

    loss, metrics = PAIR_METHODS[settings.method].loss(batch, settings)
    return loss, detached(metrics)
