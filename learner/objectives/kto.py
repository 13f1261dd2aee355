"""KTO over answers that were judged good or bad: examples to arrays, and a micro-batch's loss."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from learner.data.examples import Logprobs, UnpairedExample
from learner.interfaces import Prepared
from learner.losses.kto import has_kl, kto_kl, kto_loss
from learner.losses.metrics import Metrics, merge_metrics, token_mean
from learner.model.batches import TokenArrays, TokenBatch, to_device, token_batch
from learner.model.logprobs import Head
from learner.objectives.base import (
    check_settings,
    frozen_logprobs,
    reference_logprobs,
    scores_with_metrics,
    side_means,
)
from protocol.config.settings import PreferenceSettings, TrainSettings

# Answers, and for each the completion that follows its prompt in the KL term
Mismatched = tuple[Sequence[UnpairedExample], Sequence[list[int]]]


class KtoArrays(TokenArrays):
    """A micro-batch of B judged answers."""

    ref_logprobs: mx.array  # (B, C) float32, nats
    labels: mx.array  # (B,) float32, 1 = desirable
    kl: mx.array  # () float32, nats: of the whole batch
    normalisers: dict[str, mx.array]  # as `kto_loss` takes them


@dataclass(frozen=True)
class KtoLayout:
    """How judged answers become token batches, for a step and for the reference."""

    settings: PreferenceSettings
    train: TrainSettings

    def parts(self, answers: Sequence[UnpairedExample]) -> Iterator[Mismatched]:
        """Split a batch into micro-batches of answers, each with mismatched completions.

        As in TRL, each prompt is followed by its predecessor's answer, the first by the last one's.
        """
        others = [answers[index - 1].completion_ids for index in range(len(answers))]
        size = self.train.micro_batch_size
        for start in range(0, len(answers), size):
            yield answers[start : start + size], others[start : start + size]

    def tokens(
        self, part: Sequence[UnpairedExample], others: Sequence[list[int]] | None = None
    ) -> TokenBatch:
        """Return the prompts as a token batch, followed by their answers or by `others`."""
        completions = [answer.completion_ids for answer in part] if others is None else others
        prompts = [answer.prompt_ids for answer in part]
        return token_batch(prompts, completions, length_bucket=self.train.length_bucket)

    def reference_inputs(self, batch: Sequence[UnpairedExample]) -> Iterator[TokenBatch]:
        """Yield each micro-batch's answers, followed by its mismatched ones if there is a KL."""
        for part, others in self.parts(batch):
            yield self.tokens(part)
            if has_kl(self.settings):
                yield self.tokens(part, others)

    def with_reference(
        self, batch: Sequence[UnpairedExample], logprobs: Iterator[list[Logprobs]]
    ) -> list[UnpairedExample]:
        """Return the answers with the log-probs of `reference_inputs`, in its order."""
        answers: list[UnpairedExample] = []
        for part, _ in self.parts(batch):
            own = next(logprobs)
            others = next(logprobs) if has_kl(self.settings) else [None] * len(part)
            answers += [
                replace(answer, ref_logprobs=ref, kl_ref_logprobs=other)
                for answer, ref, other in zip(part, own, others, strict=True)
            ]
        return answers


@dataclass
class KtoObjective:
    """KTO over batches of judged answers.

    `model` is the policy, which the KL reads before the step; `reference` is the frozen policy,
    unless every example has its precomputed log-probs. Raises ConfigError for settings that cannot
    be met.
    """

    settings: PreferenceSettings
    train: TrainSettings
    head: Head
    model: nn.Module
    reference: nn.Module | None = None
    num_iterations: int = 1

    def __post_init__(self) -> None:
        check_settings(self.settings, self.reference, needs_reference=True)

    def prepare(self, batch: Sequence[UnpairedExample]) -> Prepared[KtoArrays]:
        """Return the arrays of a batch, `micro_batch_size` answers per micro-batch."""
        layout = KtoLayout(self.settings, self.train)
        count = mx.array(float(len(batch)), dtype=mx.float32)

        micro: list[KtoArrays] = []
        gaps: list[np.ndarray] = []
        for part, others in layout.parts(batch):
            tokens = layout.tokens(part)
            own = to_device(tokens)
            stored = [answer.ref_logprobs for answer in part]
            arrays: KtoArrays = {
                **own,
                "labels": mx.array([float(answer.label) for answer in part]),
                "ref_logprobs": reference_logprobs(self.reference, own, tokens, stored, self.head),
                "kl": mx.array(0.0),  # of the whole batch: known after the last micro-batch
                "normalisers": {"answers": count},
            }
            if has_kl(self.settings):
                gaps.append(self._mismatched_gap(part, layout.tokens(part, others)))
            mx.eval(arrays)
            micro.append(arrays)

        kl = mx.array(kto_kl(np.concatenate(gaps) if gaps else np.zeros(0)), dtype=mx.float32)
        for arrays in micro:
            arrays["kl"] = kl
        return Prepared(micro, {"batch_tokens": float(sum(answer.length for answer in batch))})

    def loss(self, model: nn.Module, arrays: KtoArrays) -> tuple[mx.array, Metrics]:
        """Return a micro-batch's share of the loss, and its metrics."""
        scores = scores_with_metrics(model, arrays, self.head)
        mask = arrays["mask"]
        loss, metrics = kto_loss(
            scores.logprobs,
            ref_logprobs=arrays["ref_logprobs"],
            mask=mask,
            labels=arrays["labels"],
            kl=arrays["kl"],
            normalisers=arrays["normalisers"],
            settings=self.settings,
        )

        chosen = mx.where(arrays["labels"][:, None] > 0, mask, 0.0)
        means = {"entropy": token_mean(scores.entropies, mask)}
        means |= side_means(scores, mask, chosen)
        return loss, merge_metrics(metrics, Metrics(means_if_any=means))

    def _mismatched_gap(self, part: Sequence[UnpairedExample], tokens: TokenBatch) -> np.ndarray:
        """Return policy minus reference log-probs of the mismatched answers (B,), nats."""
        arrays = to_device(tokens)
        stored = [answer.kl_ref_logprobs for answer in part]
        gap = frozen_logprobs(self.model, arrays, self.head)
        gap = gap - reference_logprobs(self.reference, arrays, tokens, stored, self.head)
        return np.array((gap * arrays["mask"]).sum(axis=1), np.float32)
