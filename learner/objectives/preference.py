"""Losses over preference pairs: examples to arrays, and the loss of a micro-batch.

The mathematics is in `learner/losses/preference.py`. A pair's two sequences are always in one
micro-batch.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NotRequired

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from learner.data.examples import Logprobs, PreferenceExample
from learner.interfaces import Prepared
from learner.losses.metrics import Metrics, merge_metrics, token_mean
from learner.losses.pairs import PairBatch, pair_normalisers
from learner.losses.preference import (
    PAIR_METHODS,
    needs_reference,
    needs_whole_batch,
    preference_loss,
)
from learner.model.batches import TokenArrays, TokenBatch, to_device, token_batch
from learner.model.logprobs import Head
from learner.objectives.base import (
    check_settings,
    frozen_logprobs,
    reference_logprobs,
    scores_with_metrics,
    side_means,
)
from protocol.config.preference_checks import check_scores
from protocol.config.settings import PreferenceSettings, TrainSettings


class PairArrays(TokenArrays):
    """A micro-batch of B pairs: sequences [:B] are chosen, [B:] rejected."""

    normalisers: dict[str, mx.array]  # `pair_normalisers`
    ref_logprobs: NotRequired[mx.array]  # (2B, C) float32, nats
    log_sum_sq_probs: NotRequired[mx.array]  # (2B, C) float32: log sum p^2, for WPO
    nll_mask: NotRequired[mx.array]  # (2B, C) float32: tokens of ORPO's NLL
    scores: NotRequired[mx.array]  # (B,) float32: `preference_score`


@dataclass(frozen=True)
class PairLayout:
    """How pairs become token batches, for a step and for the reference."""

    settings: PreferenceSettings
    train: TrainSettings

    def parts(self, pairs: Sequence[PreferenceExample]) -> Iterator[Sequence[PreferenceExample]]:
        """Split a batch into micro-batches; one of all pairs for losses that couple them."""
        whole = needs_whole_batch(self.settings)
        size = len(pairs) if whole else self.train.micro_batch_size
        return (pairs[start : start + size] for start in range(0, len(pairs), size))

    def tokens(self, part: Sequence[PreferenceExample]) -> TokenBatch:
        """Return the sequences [:B] chosen, [B:] rejected.

        Where the NLL counts the chosen prompts too, a chosen "completion" is all but the first
        token, and the mask leaves out what belongs to the prompt.
        """
        prompts: list[list[int]] = []
        completions: list[list[int]] = []
        masks: list[list[float]] = []
        for pair in part:
            kept = 1 if PAIR_METHODS[self.settings.method].prompt_nll else len(pair.prompt_ids)
            prompts.append(pair.prompt_ids[:kept])
            completions.append(pair.prompt_ids[kept:] + pair.chosen_ids)
            masks.append([0.0] * (len(pair.prompt_ids) - kept) + [1.0] * len(pair.chosen_ids))

        return token_batch(
            prompts + [pair.rejected_prompt_ids for pair in part],
            completions + [pair.rejected_ids for pair in part],
            masks=masks + [[1.0] * len(pair.rejected_ids) for pair in part],
            length_bucket=self.train.length_bucket,
        )

    def reference_inputs(self, batch: Sequence[PreferenceExample]) -> Iterator[TokenBatch]:
        """Yield the token batch of each micro-batch."""
        return (self.tokens(part) for part in self.parts(batch))

    def with_reference(
        self, batch: Sequence[PreferenceExample], logprobs: Iterator[list[Logprobs]]
    ) -> list[PreferenceExample]:
        """Return the pairs with the log-probs of `reference_inputs`, in its order."""
        pairs: list[PreferenceExample] = []
        for part in self.parts(batch):
            found = next(logprobs)
            sides = zip(found[: len(part)], found[len(part) :], strict=True)
            pairs += [replace(p, ref_logprobs=both) for p, both in zip(part, sides, strict=True)]
        return pairs


@dataclass
class PreferenceObjective:
    """DPO's family, CPO, SimPO and ORPO over batches of pairs.

    `model` is the policy, which WPO's weights read before the step; `reference` is DPO's frozen
    policy, unless every example has its precomputed log-probs. Batch sizes count pairs. Raises
    ConfigError for settings that cannot be met.
    """

    settings: PreferenceSettings
    train: TrainSettings
    head: Head
    model: nn.Module
    reference: nn.Module | None = None
    num_iterations: int = 1

    def __post_init__(self) -> None:
        needed = needs_reference(self.settings)
        check_settings(self.settings, self.reference, needs_reference=needed)

    def prepare(self, batch: Sequence[PreferenceExample]) -> Prepared[PairArrays]:
        """Return the arrays of a batch, `micro_batch_size` pairs per micro-batch."""
        scored = any(pair.score is not None for pair in batch)
        if scored:
            check_scores(self.settings)
        normalisers = _normalisers(batch, self.settings)

        layout = PairLayout(self.settings, self.train)
        micro: list[PairArrays] = []
        for part in layout.parts(batch):
            tokens = layout.tokens(part)
            arrays: PairArrays = {**to_device(tokens), "normalisers": normalisers}
            self._add_inputs(arrays, part, tokens)
            if scored:
                scores = [1.0 if pair.score is None else pair.score for pair in part]
                arrays["scores"] = mx.array(scores, dtype=mx.float32)
            mx.eval(arrays)
            micro.append(arrays)

        total = sum(
            len(pair.prompt_ids)
            + len(pair.chosen_ids)
            + len(pair.rejected_prompt_ids)
            + len(pair.rejected_ids)
            for pair in batch
        )
        return Prepared(micro, {"batch_tokens": float(total)})

    def loss(self, model: nn.Module, arrays: PairArrays) -> tuple[mx.array, Metrics]:
        """Return a micro-batch's share of the loss, and its metrics."""
        scores = scores_with_metrics(model, arrays, self.head)
        mask = arrays["mask"]
        pairs = PairBatch(
            logprobs=scores.logprobs,
            mask=mask,
            ref_logprobs=arrays.get("ref_logprobs"),
            log_sum_sq_probs=arrays.get("log_sum_sq_probs"),
            nll_mask=arrays.get("nll_mask"),
            scores=arrays.get("scores"),
            normalisers=arrays["normalisers"],
        )
        loss, metrics = preference_loss(pairs, self.settings)

        first_half = mx.arange(mask.shape[0]) < mask.shape[0] // 2
        chosen = mx.where(first_half[:, None] > 0, mask, 0.0)
        means = {
            "entropy": token_mean(scores.entropies, mask),
            **side_means(scores, mask, chosen),
            "mean_token_accuracy": token_mean(scores.top1, chosen),
        }
        return loss, merge_metrics(metrics, Metrics(means=means))

    def _add_inputs(
        self, arrays: PairArrays, part: Sequence[PreferenceExample], tokens: TokenBatch
    ) -> None:
        """Add what the method needs beyond the tokens."""
        if PAIR_METHODS[self.settings.method].prompt_nll:
            # Every token of a chosen sequence but the first
            nll_mask = np.zeros(tokens.mask.shape, np.float32)
            for index, pair in enumerate(part):
                nll_mask[index, : len(pair.prompt_ids) - 1 + len(pair.chosen_ids)] = 1.0
            arrays["nll_mask"] = mx.array(nll_mask)
        if needs_reference(self.settings):
            sides = [pair.ref_logprobs or (None, None) for pair in part]
            stored = [chosen for chosen, _ in sides] + [rejected for _, rejected in sides]
            arrays["ref_logprobs"] = reference_logprobs(
                self.reference, arrays, tokens, stored, self.head
            )
        if self.settings.use_weighting:
            # log sum p^2 = lse(2z) - 2 lse(z) = 2 log p - log q, for q at temperature 1/2
            logprobs = frozen_logprobs(self.model, arrays, self.head)
            sharper = frozen_logprobs(self.model, arrays, self.head, temperature=0.5)
            arrays["log_sum_sq_probs"] = 2 * logprobs - sharper


def _normalisers(
    pairs: Sequence[PreferenceExample], settings: PreferenceSettings
) -> dict[str, mx.array]:
    chosen = float(sum(len(pair.chosen_ids) for pair in pairs))
    nll = None
    if PAIR_METHODS[settings.method].prompt_nll:
        nll = chosen + float(sum(len(pair.prompt_ids) - 1 for pair in pairs))

    values = pair_normalisers(pairs=len(pairs), chosen_tokens=chosen, nll_tokens=nll)
    return {name: mx.array(value, dtype=mx.float32) for name, value in values.items()}
