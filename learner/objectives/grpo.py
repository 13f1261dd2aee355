"""GRPO over groups from the actors: groups to arrays, and the loss of a micro-batch.

The mathematics is in `learner/losses/grpo.py` and `learner/objectives/advantages.py`; padding is in
`learner/objectives/completions.py`.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NotRequired

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from learner.interfaces import Prepared
from learner.losses.grpo import Skipped, entropy_quantile, grpo_loss, grpo_normalisers, unclipped
from learner.losses.importance import importance_ratio
from learner.losses.metrics import Mean, Metrics, finish_metrics, merge_metrics
from learner.model.logprobs import Head, TokenScores, completion_logprobs
from learner.objectives.advantages import RewardAdvantages
from learner.objectives.completions import (
    CompletionArrays,
    Completions,
    batch_metrics,
    completion_arrays,
    gather_completions,
)
from learner.online.experience import PromptGroup, TrainBatch
from protocol.config.settings import GrpoRewards, GrpoSettings, SamplingSettings, TrainSettings


class GrpoArrays(CompletionArrays):
    """A micro-batch of B completions with all that the loss reads; (B, C) float32, nats."""

    normalisers: dict[str, mx.array]  # `grpo_normalisers`, of the whole batch
    old_logprobs: NotRequired[mx.array]  # without them, the sampling log-probs are the old ones
    ref_logprobs: NotRequired[mx.array]
    entropies: NotRequired[mx.array]  # before the update, for the entropy quantile
    ratio: NotRequired[mx.array]  # `importance_ratio`, (B, C) or (B, 1)
    skipped: NotRequired[Skipped]  # in the first micro-batch; 0 in the others


@dataclass
class GrpoObjective:
    """GRPO's loss family over batches of groups.

    `reference` is the frozen policy (needed when beta > 0); `describe` turns a group into
    a line of rollouts.jsonl. With `share_prompt`, a micro-batch of one group computes its prompt
    only once.

    Metrics are of the whole batch, as in TRL, except those that read log-probs: `entropy`,
    `sampling/*` and `vespo/phi_seq_mean` leave out completions that need no forward pass (advantage
    0, or no token that counts). With `zero_advantage_step` all completions get one.
    """

    settings: GrpoSettings
    train: TrainSettings
    sampling: SamplingSettings
    rewards: GrpoRewards
    model: nn.Module
    head: Head
    describe: Callable[[PromptGroup, int], dict[str, Any]]
    reference: nn.Module | None = None
    share_prompt: bool = False
    _advantages: RewardAdvantages = field(init=False)

    def __post_init__(self) -> None:
        self._advantages = RewardAdvantages(self.settings, self.rewards)

    @property
    def num_iterations(self) -> int:
        """Return how often the batch is trained on."""
        return self.settings.num_iterations

    def prepare(self, batch: TrainBatch) -> Prepared[GrpoArrays]:
        """Return the arrays of a batch, without completions that cannot contribute."""
        completions = gather_completions(
            batch.groups, mask_truncated=self.settings.mask_truncated_completions
        )
        result = self._advantages.of(batch.groups, completions.groups)
        live = self._contributing(result.advantages, completions)
        skipped = _skipped(completions, live)

        metrics = {**result.metrics, **batch_metrics(batch, completions)}
        rollouts = [self.describe(item, batch.trained_at) for item in batch.groups]
        if not live.any():
            metrics |= finish_metrics(unclipped(skipped, self.settings))
            return Prepared([], metrics, step=False, rollouts=rollouts)

        micro = self._micro(completions, result.advantages, live)
        for arrays in micro:
            arrays["skipped"] = _skipped(completions, np.ones_like(live))
        micro[0]["skipped"] = skipped
        prepared = Prepared(micro, metrics, rollouts=rollouts)
        if self._needs_entropies:
            prepared.refresh = partial(self._score_again, micro)
        return prepared

    @property
    def _needs_entropies(self) -> bool:
        return self.settings.top_entropy_quantile < 1

    def _contributing(self, advantages: np.ndarray, completions: Completions) -> np.ndarray:
        """Return which completions (N,) the forward pass needs; the others give no gradient."""
        s = self.settings
        everyone = np.ones(len(advantages), bool)
        if s.zero_advantage_step or s.beta > 0 or s.entropy_coef != 0:
            return everyone
        counted = np.array([mask.any() for mask in completions.masks])
        live = (advantages != 0) & counted
        # The entropy quantile is over all of them.
        return everyone if self._needs_entropies and live.any() else live

    def _micro(
        self, completions: Completions, advantages: np.ndarray, live: np.ndarray
    ) -> list[GrpoArrays]:
        """Return the arrays of the `live` (N,) completions, `micro_batch_size` groups each."""
        normalisers = grpo_normalisers(
            mask_sums=np.array([mask.sum() for mask in completions.masks]),
            max_completion_length=self.sampling.max_completion_length,
        )

        chosen = sorted({int(group) for group in completions.groups[live]})
        size = self.train.micro_batch_size
        micro: list[GrpoArrays] = []
        for start in range(0, len(chosen), size):
            part = set(chosen[start : start + size])
            index = [i for i in range(len(live)) if live[i] and int(completions.groups[i]) in part]
            micro.append(self.arrays_of(completions, advantages, index, normalisers))
        if self._needs_entropies:
            self._find_threshold(micro)
        return micro

    def arrays_of(
        self,
        completions: Completions,
        advantages: np.ndarray,
        index: list[int],
        normalisers: dict[str, float],
    ) -> GrpoArrays:
        """Return a micro-batch of the completions of `index`; `advantages` (N,) are of all."""
        settings = self.settings
        arrays: GrpoArrays = {
            **completion_arrays(
                completions,
                advantages,
                index,
                length_bucket=self.train.length_bucket,
                share_prompt=self.share_prompt,
            ),
            "normalisers": _on_device(normalisers),
        }

        # One pass of the policy gives both.
        recompute = settings.old_logprobs == "recompute"
        if recompute or self._needs_entropies:
            scores = self.scores(self.model, arrays)
            if recompute:
                arrays["old_logprobs"] = scores.logprobs
            if self._needs_entropies:
                arrays["entropies"] = scores.entropies

        if settings.importance_sampling_correction:
            arrays["ratio"] = importance_ratio(
                _old_logprobs(arrays), arrays["sampling_logprobs"], arrays["mask"], settings
            )
        if settings.beta > 0:
            if self.reference is None:
                raise ValueError("objective.beta > 0 needs a reference policy")
            arrays["ref_logprobs"] = self.scores(self.reference, arrays).logprobs
        mx.eval(arrays)
        return arrays

    def scores(
        self, model: nn.Module, arrays: CompletionArrays, *, gradient: bool = False
    ) -> TokenScores:
        """Return the log-probs; also the entropies, where they are needed or with a gradient."""
        return completion_logprobs(
            model,
            arrays["input_ids"],
            arrays["positions"],
            arrays["targets"],
            prompt=arrays.get("prompt"),
            temperature=self.sampling.temperature,
            head=self.head,
            entropy=gradient or self._needs_entropies,
            entropy_gradient=gradient and self.settings.entropy_coef != 0,
            gradient=gradient,
        )

    def _find_threshold(self, micro: list[GrpoArrays]) -> None:
        """Put the entropy quantile of the whole batch into its micro-batches."""
        scored = [
            (arrays["entropies"], arrays["mask"]) for arrays in micro if "entropies" in arrays
        ]
        entropies = [np.array(values, np.float32).ravel() for values, _ in scored]
        masks = [np.array(mask, np.float32).ravel() for _, mask in scored]
        threshold, tokens = entropy_quantile(
            np.concatenate(entropies), np.concatenate(masks), self.settings.top_entropy_quantile
        )
        found = {"entropy_threshold": threshold, "entropy_tokens": max(tokens, 1.0)}
        for arrays in micro:
            arrays["normalisers"] |= _on_device(found)

    def _score_again(self, micro: list[GrpoArrays]) -> None:
        """Recompute entropies and their quantile with the current policy."""
        for arrays in micro:
            arrays["entropies"] = self.scores(self.model, arrays).entropies
        self._find_threshold(micro)

    def loss(self, model: nn.Module, arrays: GrpoArrays) -> tuple[mx.array, Metrics]:
        """Return a micro-batch's share of the loss, and its metrics."""
        logprobs, entropies, *_ = self.scores(model, arrays, gradient=True)
        loss, metrics = grpo_loss(
            logprobs,
            entropies,
            advantages=arrays["advantages"],
            mask=arrays["mask"],
            old_logprobs=_old_logprobs(arrays),
            ref_logprobs=arrays.get("ref_logprobs"),
            sampling_logprobs=arrays["sampling_logprobs"],
            ratio=arrays.get("ratio"),
            sequence_mask=arrays["sequence_mask"],
            normalisers=arrays["normalisers"],
            settings=self.settings,
        )

        if "skipped" in arrays:
            metrics = merge_metrics(metrics, unclipped(arrays["skipped"], self.settings))
        return loss, merge_metrics(metrics, _sampling_gap(logprobs, arrays))


def _sampling_gap(logprobs: mx.array, arrays: GrpoArrays) -> Metrics:
    """Return how far the sampler's log-probs are from the old ones, or else from the policy's."""
    learner = arrays.get("old_logprobs", mx.stop_gradient(logprobs))
    gap = mx.abs(learner - arrays["sampling_logprobs"]) * arrays["mask"]
    name = "sampling/sampling_logp_difference"
    return Metrics(
        means={f"{name}/mean": Mean(gap.sum(), arrays["mask"].sum())},
        maxima={f"{name}/max": gap.max()},
    )


def _old_logprobs(arrays: GrpoArrays) -> mx.array:
    return arrays.get("old_logprobs", arrays["sampling_logprobs"])


def _skipped(completions: Completions, live: np.ndarray) -> Skipped:
    """Count the completions left out by `live` (N,)."""
    tokens = np.array([mask.sum() for mask in completions.masks])[~live]
    return Skipped(
        sequences=mx.array(float(len(tokens))),
        nonempty=mx.array(float((tokens > 0).sum())),
        tokens=mx.array(float(tokens.sum())),
    )


def _on_device(values: dict[str, float]) -> dict[str, mx.array]:
    return {name: mx.array(value, dtype=mx.float32) for name, value in values.items()}
