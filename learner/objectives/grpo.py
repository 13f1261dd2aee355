"""GRPO over groups from the actors: groups to arrays, and the loss of a micro-batch.

The mathematics is in `learner/losses/grpo.py` and `learner/objectives/advantages.py`; here rows are
gathered, padded and skipped, reference and old log-probs are computed, and rollouts described.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from learner.interfaces import Arrays, Prepared
from learner.losses import grpo as objective
from learner.losses.grpo_metrics import unclipped
from learner.losses.metrics import finish_metrics, maximum, mean, merge_metrics
from learner.model.batches import aligned, padded_size, to_device
from learner.model.logprobs import Head, TokenScores, completion_logprobs
from learner.model.shared_prompt import SharedPrompt, group_batch
from learner.objectives.advantages import advantages
from learner.objectives.completions import Rows, batch_metrics, gather_rows
from learner.online.experience import PromptGroup, TrainBatch, reward_matrix
from protocol.config.settings import GrpoSettings, TrainSettings
from protocol.errors import RewardError


@dataclass
class GrpoObjective:
    """GRPO's loss family over batches of groups.

    `reference` gives the frozen policy (needed when beta > 0). `describe` makes a rollout's line.
    With `share_prompt`, a micro-batch of one group computes its prompt once.

    Metrics are of the whole batch, as TRL's, but for those that read log-probs of completions that
    no forward pass is made for (advantage 0, or no token that counts): `entropy`, `sampling/*` and
    `vespo/phi_seq_mean` are of the others. `zero_advantage_step` makes it for all.
    """

    settings: GrpoSettings
    train: TrainSettings
    model: nn.Module
    temperature: float
    max_completion_length: int
    weights: Sequence[float] | None
    head: Head
    describe: Callable[[PromptGroup, int], dict[str, Any]]
    reference: nn.Module | None = None
    max_none_batches: int = 3
    share_prompt: bool = False
    _none_batches: int = 0

    @property
    def num_iterations(self) -> int:
        """Return how often the batch is trained on."""
        return self.settings.num_iterations

    def prepare(self, batch: TrainBatch) -> Prepared:
        """Return the arrays of a batch: rows that cannot contribute are left out of them."""
        rows = gather_rows(batch.groups)
        names, rewards = reward_matrix(batch.groups)
        self._check_rewards(names, rewards, batch)
        if names and self.weights is not None and len(self.weights) != len(names):
            raise RewardError(
                f"rewards.reward_weights has {len(self.weights)} numbers, but {len(names)} reward "
                f"functions answered: {', '.join(names)}. Give one weight a function, in order."
            )
        result = advantages(
            rewards,
            groups=rows.groups,
            names=names,
            weights=self.weights if names else None,
            scale_rewards=self.settings.scale_rewards,
            aggregation=self.settings.multi_objective_aggregation,
        )
        masks = [np.ones(len(c), np.float32) for c in rows.completions]
        if self.settings.mask_truncated_completions:
            masks = [m * float(f) for m, f in zip(masks, rows.finished, strict=True)]
        metrics = {**result.metrics, **batch_metrics(batch, rows)}
        lines = [self.describe(item, batch.trained_at) for item in batch.groups]
        counted = np.array([mask.any() for mask in masks])
        live = self._contributing(result.advantages, counted)
        step = bool(live.any())
        prepared = Prepared([], metrics, step=step, rollouts=lines)
        skipped = _skipped(masks, live)
        if not step:
            metrics |= self.finish(unclipped(skipped, self.settings))
        else:
            prepared.micro = self._micro(rows, masks, result.advantages, live)
            for number, arrays in enumerate(prepared.micro):
                arrays["skipped"] = skipped if number == 0 else mx.zeros_like(skipped)
            if self.settings.top_entropy_quantile < 1:
                prepared.again = partial(self._score_again, prepared.micro)
        return prepared

    def _moves_without_advantages(self) -> bool:
        s = self.settings
        return s.zero_advantage_step or s.beta > 0 or s.entropy_coef != 0

    def _contributing(self, row_advantages: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """Return which rows (N,) the forward pass needs: exact, for the others give no gradient.

        `counted` (N,): rows with a token that counts. The entropy quantile is over all rows.
        """
        if self._moves_without_advantages():
            return np.ones(len(row_advantages), bool)
        live = (row_advantages != 0) & counted
        if self.settings.top_entropy_quantile < 1 and live.any():
            return np.ones(len(row_advantages), bool)
        return live

    def _micro(
        self, rows: Rows, masks: list[np.ndarray], row_advantages: np.ndarray, live: np.ndarray
    ) -> list[Arrays]:
        """Return one mapping of arrays a micro-batch of `micro_batch_size` groups."""
        chosen = sorted({int(g) for g in rows.groups[live]})
        size = self.train.micro_batch_size
        micro: list[Arrays] = []
        for start in range(0, len(chosen), size):
            part = set(chosen[start : start + size])
            index = [i for i in range(len(live)) if live[i] and int(rows.groups[i]) in part]
            micro.append(self._arrays(rows, masks, row_advantages, index))
        values = objective.grpo_normalisers(
            mask_sums=np.array([m.sum() for m in masks]),
            max_completion_length=self.max_completion_length,
        )
        for arrays in micro:
            arrays.update(_normalisers(values))
        if self.settings.top_entropy_quantile < 1:
            self._find_threshold(micro)
        return micro

    def _find_threshold(self, micro: list[Arrays]) -> None:
        """Put the entropy quantile over the whole batch into its micro-batches."""
        entropies = [np.array(arrays["entropies"]).ravel() for arrays in micro]
        masks = [np.array(arrays["mask"]).ravel() for arrays in micro]
        threshold, tokens = objective.entropy_quantile(
            np.concatenate(entropies), np.concatenate(masks), self.settings.top_entropy_quantile
        )
        found = {"entropy_threshold": threshold, "entropy_tokens": max(tokens, 1.0)}
        for arrays in micro:
            arrays.update(_normalisers(found))

    def _score_again(self, micro: list[Arrays]) -> None:
        """Take the entropy quantile of the policy as it is now."""
        for arrays in micro:
            arrays["entropies"] = self._scores(self.model, arrays).entropies
        self._find_threshold(micro)

    def _arrays(
        self, rows: Rows, masks: list[np.ndarray], row_advantages: np.ndarray, index: list[int]
    ) -> Arrays:
        # Empty rows make few shapes of many: a compiled step is traced once a shape.
        empty = padded_size(len(index)) - len(index)
        tokens, prompt = group_batch(
            [rows.prompts[i] for i in index] + [np.zeros(1, np.int32)] * empty,
            [rows.completions[i] for i in index] + [np.zeros(0, np.int32)] * empty,
            masks=[masks[i] for i in index] + [np.zeros(0, np.float32)] * empty,
            length_bucket=self.train.length_bucket,
            one_prompt=self.share_prompt and len(set(rows.groups[index])) == 1,
        )
        sampler = aligned([rows.sampling_logprobs[i] for i in index], tokens)
        arrays = cast(Arrays, to_device(tokens))
        if prompt is not None:
            arrays |= prompt._asdict()
        filling = np.zeros(empty, np.float32)
        weights = np.concatenate([row_advantages[index], filling])
        arrays["advantages"] = mx.array(weights.astype(np.float32))
        arrays["rows"] = mx.array(np.concatenate([np.ones(len(index), np.float32), filling]))
        arrays["sampling_logprobs"] = mx.array(sampler)
        settings = self.settings
        if settings.old_logprobs == "recompute" or settings.top_entropy_quantile < 1:
            scores = self._scores(self.model, arrays)
            if settings.old_logprobs == "recompute":
                arrays["old_logprobs"] = scores.logprobs
            if settings.top_entropy_quantile < 1:
                arrays["entropies"] = scores.entropies
        if settings.importance_sampling_correction:
            arrays["ratio"] = objective.importance_ratio(
                arrays["old_logprobs"], arrays["sampling_logprobs"], arrays["mask"], settings
            )
        if settings.beta > 0:
            if self.reference is None:
                raise ValueError("objective.beta > 0 needs a reference policy")
            arrays["ref_logprobs"] = self._scores(self.reference, arrays).logprobs
        mx.eval(arrays)
        return arrays

    def _scores(self, model: nn.Module, arrays: Arrays) -> TokenScores:
        return completion_logprobs(
            model,
            arrays["input_ids"],
            arrays["positions"],
            arrays["targets"],
            prompt=SharedPrompt.of(arrays),
            temperature=self.temperature,
            head=self.head,
            entropy=self.settings.top_entropy_quantile < 1,
            gradient=False,
        )

    def loss(self, model: nn.Module, arrays: Arrays) -> tuple[mx.array, Arrays]:
        """Return a micro-batch's share of the loss and its mergeable metrics."""
        logprobs, entropies, *_ = completion_logprobs(
            model,
            arrays["input_ids"],
            arrays["positions"],
            arrays["targets"],
            prompt=SharedPrompt.of(arrays),
            temperature=self.temperature,
            head=self.head,
            entropy=True,
            entropy_gradient=self.settings.entropy_coef != 0,
        )
        sampling = arrays["sampling_logprobs"]
        loss, metrics = objective.grpo_loss(
            logprobs,
            entropies,
            advantages=arrays["advantages"],
            mask=arrays["mask"],
            old_logprobs=arrays.get("old_logprobs", sampling),
            ref_logprobs=arrays.get("ref_logprobs"),
            sampling_logprobs=sampling,
            ratio=arrays.get("ratio"),
            rows=arrays.get("rows"),
            normalisers={
                key.removeprefix("normaliser/"): value
                for key, value in arrays.items()
                if key.startswith("normaliser/")
            },
            settings=self.settings,
        )
        if "skipped" in arrays:
            metrics = merge_metrics(metrics, unclipped(arrays["skipped"], self.settings))
        gap = (
            mx.abs(arrays.get("old_logprobs", mx.stop_gradient(logprobs)) - sampling)
            * arrays["mask"]
        )
        name = "sampling/sampling_logp_difference"
        metrics |= mean(f"{name}/mean", gap.sum(), arrays["mask"].sum())
        return loss, metrics | maximum(f"{name}/max", gap.max())

    def merge(self, first: Arrays, second: Arrays) -> Arrays:
        """Merge the metrics of two micro-batches."""
        return merge_metrics(first, second)

    def finish(self, metrics: Arrays) -> dict[str, float]:
        """Turn merged metrics into TRL's."""
        return finish_metrics(metrics)

    def _check_rewards(self, names: list[str], rewards: np.ndarray, batch: TrainBatch) -> None:
        self._none_batches = self._none_batches + 1 if np.isnan(rewards).all() else 0
        if self._none_batches >= self.max_none_batches:
            faults = {
                f"{f.function}: {f.kind}: {f.message.splitlines()[-1]}"
                for item in batch.groups
                for f in item.group.reward.faults
                if f.message
            }
            raise RewardError(
                f"Every reward of {self._none_batches} batches in a row was None "
                f"(functions: {', '.join(names) or 'none answered'}). "
                f"{' '.join(sorted(faults)[:5])} See the reward server's log; mend the functions, "
                "then go on with --run.resume."
            )


def _skipped(masks: list[np.ndarray], live: np.ndarray) -> mx.array:
    """Return what `unclipped` is told of the rows that `live` (N,) leaves out."""
    tokens = np.array([mask.sum() for mask in masks])[~live]
    return mx.array(np.array([len(tokens), (tokens > 0).sum(), tokens.sum()], np.float32))


def _normalisers(values: Mapping[str, float]) -> Arrays:
    return {f"normaliser/{k}": mx.array(v, dtype=mx.float32) for k, v in values.items()}
