"""Preference losses over pairs or judged answers: examples to arrays, and a micro-batch's loss.

The mathematics is in `learner/objectives/`; here rows are padded, reference log-probs computed and
the whole batch's normalisers taken. A pair's two rows are always in one micro-batch.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from learner.data.examples import Logprobs, PreferenceExample, UnpairedExample
from learner.interfaces import Arrays, Prepared
from learner.losses.metrics import finish_metrics, merge_metrics, token_mean
from learner.losses.preference import (
    finish_kto,
    kto_kl,
    kto_loss,
    kto_loss_type,
    needs_reference,
    pair_normalisers,
    preference_loss,
)
from learner.model.batches import TokenBatch, aligned, to_device
from learner.model.logprobs import Head, TokenScores, completion_logprobs
from learner.objectives.preference_batches import (
    answer_parts,
    answer_tokens,
    nll_of_whole_sequence,
    pair_parts,
    pair_tokens,
)
from protocol.config.preference_checks import check_preference, check_scores
from protocol.config.settings import PreferenceSettings, TrainSettings
from protocol.errors import ConfigError

log = logging.getLogger("pippin.learner")

_NORMALISER = "normaliser/"


@dataclass
class PreferenceObjective:
    """DPO's family, CPO, SimPO and ORPO over batches of pairs; KTO over judged answers.

    `model` is the policy, which KTO's KL and WPO's weights read before the step; `reference` gives
    the frozen policy of DPO and KTO, unless every example brings its precomputed log-probs. Batch
    sizes count pairs, or KTO's rows. Raises ConfigError for settings that cannot be met.
    """

    settings: PreferenceSettings
    train: TrainSettings
    head: Head
    model: nn.Module
    reference: nn.Module | None = None
    num_iterations: int = 1
    reads: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_preference(self.settings)
        given = self.reference is not None or self.settings.precompute_ref_log_probs
        if needs_reference(self.settings) and not given:
            raise ConfigError(
                f"objective.method = {self.settings.method!r} needs a reference policy, and none "
                'was given: set model.reference to "initial", "base" or a path (for DPO alone, '
                "objective.reference_free = true does without)"
            )

    def prepare(self, batch: Sequence[PreferenceExample] | Sequence[UnpairedExample]) -> Prepared:
        """Return the arrays of a batch, `micro_batch_size` pairs (KTO: rows) a micro-batch.

        Losses that couple all pairs (`needs_whole_batch`) get one micro-batch of them all.
        """
        pairs = [example for example in batch if isinstance(example, PreferenceExample)]
        answers = [example for example in batch if isinstance(example, UnpairedExample)]
        wanted, kind = (answers, "judged answers") if self._unpaired else (pairs, "pairs")
        if len(wanted) != len(batch):
            raise ValueError(
                f"objective.method = {self.settings.method!r} takes {kind}, got "
                f"{type(batch[0]).__name__} among {len(batch)} rows"
            )
        return self._prepare_answers(answers) if self._unpaired else self._prepare_pairs(pairs)

    def loss(self, model: nn.Module, arrays: Arrays) -> tuple[mx.array, Arrays]:
        """Return a micro-batch's share of the loss and its mergeable metrics."""
        scores = completion_logprobs(
            model,
            arrays["input_ids"],
            arrays["positions"],
            arrays["targets"],
            head=self.head,
            entropy=True,
            logit_metrics=True,
        )
        normalisers = {
            key.removeprefix(_NORMALISER): value
            for key, value in arrays.items()
            if key.startswith(_NORMALISER)
        }
        if not self._unpaired:
            loss, metrics = preference_loss(
                scores.logprobs,
                mask=arrays["mask"],
                ref_logprobs=arrays.get("ref_logprobs"),
                log_sum_sq_probs=arrays.get("log_sum_sq_probs"),
                nll_mask=arrays.get("nll_mask"),
                scores=arrays.get("scores"),
                entropies=scores.entropies,
                normalisers=normalisers,
                settings=self.settings,
            )
        else:
            loss, metrics = kto_loss(
                scores.logprobs,
                ref_logprobs=arrays["ref_logprobs"],
                mask=arrays["mask"],
                labels=arrays["labels"],
                kl=arrays["kl"],
                normalisers=normalisers,
                settings=self.settings,
            )
            metrics |= token_mean("entropy", scores.entropies, arrays["mask"])
        return loss, metrics | self._logit_metrics(scores, arrays)

    def _logit_metrics(self, scores: TokenScores, arrays: Arrays) -> Arrays:
        """Return means over completion tokens: `logits/*` of each side, and the accuracy of chosen.

        TRL's DPO and KTO (which has no accuracy) do so; its ORPO and CPO take prompts and padding
        into `logits/*`, which would depend on the micro-batches.
        """
        mask = arrays["mask"]
        half = mask.shape[0] // 2
        good = arrays["labels"] if self._unpaired else mx.arange(mask.shape[0]) < half
        chosen = mx.where(good[:, None] > 0, mask, 0.0)
        metrics = token_mean("logits/chosen", scores.mean_logits, chosen)
        metrics |= token_mean("logits/rejected", scores.mean_logits, mask - chosen)
        if not self._unpaired:
            metrics |= token_mean("mean_token_accuracy", scores.top1, chosen)
        return metrics

    def merge(self, first: Arrays, second: Arrays) -> Arrays:
        """Merge the metrics of two micro-batches."""
        return merge_metrics(first, second)

    def finish(self, metrics: Arrays) -> dict[str, float]:
        """Turn merged metrics into TRL's."""
        return finish_kto(metrics) if self._unpaired else finish_metrics(metrics)

    @property
    def _unpaired(self) -> bool:
        return self.settings.method == "kto"

    def _prepare_pairs(self, pairs: Sequence[PreferenceExample]) -> Prepared:
        scored = any(pair.score is not None for pair in pairs)
        if scored:
            check_scores(self.settings)
        micro: list[Arrays] = []
        for part in pair_parts(pairs, self.settings, self.train):
            tokens = pair_tokens(part, self.settings.method, self.train.length_bucket)
            arrays = cast(Arrays, to_device(tokens))
            if self.settings.method == "orpo":
                arrays |= nll_of_whole_sequence(part, arrays["mask"])
            if scored:
                scores = [1.0 if pair.score is None else pair.score for pair in part]
                arrays["scores"] = mx.array(scores, dtype=mx.float32)
            if needs_reference(self.settings):
                sides = [pair.ref_logprobs or (None, None) for pair in part]
                stored = [chosen for chosen, _ in sides] + [rejected for _, rejected in sides]
                arrays["ref_logprobs"] = self._reference_logprobs(arrays, tokens, stored)
            if self.settings.use_weighting and self.settings.method == "dpo":
                arrays["log_sum_sq_probs"] = self._log_sum_sq_probs(arrays)
            mx.eval(arrays)
            micro.append(arrays)
        chosen = float(sum(len(pair.chosen_ids) for pair in pairs))
        contexts = float(sum(len(pair.prompt_ids) - 1 for pair in pairs))
        values = pair_normalisers(
            rows=len(pairs),
            chosen_tokens=chosen,
            nll_tokens=chosen + contexts if self.settings.method == "orpo" else None,
        )
        tokens = sum(
            len(pair.prompt_ids)
            + len(pair.chosen_ids)
            + len(pair.rejected_prompt_ids)
            + len(pair.rejected_ids)
            for pair in pairs
        )
        return Prepared(_shared(micro, values), {"batch_tokens": float(tokens)})

    def _prepare_answers(self, answers: Sequence[UnpairedExample]) -> Prepared:
        bucket = self.train.length_bucket
        with_kl = kto_loss_type(self.settings) == "kto"
        micro: list[Arrays] = []
        gaps: list[np.ndarray] = []
        for part, others in answer_parts(answers, self.train):
            tokens = answer_tokens(part, [answer.completion_ids for answer in part], bucket)
            arrays = cast(Arrays, to_device(tokens))
            arrays["labels"] = mx.array([float(answer.label) for answer in part])
            stored = [answer.ref_logprobs for answer in part]
            arrays["ref_logprobs"] = self._reference_logprobs(arrays, tokens, stored)
            if with_kl:
                tokens = answer_tokens(part, others, bucket)
                mismatched = cast(Arrays, to_device(tokens))
                stored = [answer.kl_ref_logprobs for answer in part]
                gap = self._logprobs(self.model, mismatched)
                gap = gap - self._reference_logprobs(mismatched, tokens, stored)
                gaps.append(np.array((gap * mismatched["mask"]).sum(axis=1)))
            mx.eval(arrays)
            micro.append(arrays)
        gap = np.concatenate(gaps) if gaps else np.zeros(0)
        kl = mx.array(kto_kl(gap, np.zeros_like(gap)), dtype=mx.float32)
        for arrays in micro:
            arrays["kl"] = kl
        tokens = float(sum(answer.length for answer in answers))
        values = {"rows": float(len(answers))}
        return Prepared(_shared(micro, values), {"batch_tokens": tokens})

    def _reference_logprobs(
        self, arrays: Arrays, tokens: TokenBatch, stored: Sequence[Logprobs | None]
    ) -> mx.array:
        """Return the reference's log-probs (B, C), nats: those that were precomputed, if all were.

        Raises ValueError where neither they nor a reference are there.
        """
        rows = [row for row in stored if row is not None]
        if len(rows) < len(stored):
            return self._logprobs(self.reference, arrays)
        lengths = [len(row) for row in rows]
        wanted = tokens.mask.sum(axis=1).astype(int).tolist()
        if lengths != wanted:
            raise ValueError(
                f"precomputed reference log-probs are of {lengths} tokens, the completions have "
                f"{wanted}: they are of other rows"
            )
        return mx.array(aligned(rows, tokens))

    def _logprobs(
        self, model: nn.Module | None, arrays: Arrays, temperature: float = 1.0
    ) -> mx.array:
        """Return (B, C) log-probs, nats, without a gradient."""
        if model is None:
            raise ValueError(
                "these examples have no precomputed reference log-probs, and there is no reference "
                "policy to compute them with"
            )
        logprobs, *_ = completion_logprobs(
            model,
            arrays["input_ids"],
            arrays["positions"],
            arrays["targets"],
            temperature=temperature,
            head=self.head,
            gradient=False,
        )
        return logprobs

    def _log_sum_sq_probs(self, arrays: Arrays) -> mx.array:
        """Return log sum p^2 (B, C) of the policy.

        lse(2z) - 2 lse(z) = 2 log p - log q, for q the target's probability at temperature 1/2.
        """
        return 2 * self._logprobs(self.model, arrays) - self._logprobs(self.model, arrays, 0.5)


def _shared(micro: list[Arrays], normalisers: dict[str, float]) -> list[Arrays]:
    values = {_NORMALISER + k: mx.array(v, dtype=mx.float32) for k, v in normalisers.items()}
    return [arrays | values for arrays in micro]
