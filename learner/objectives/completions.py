"""The completions of a batch of groups: their arrays and metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NotRequired

import mlx.core as mx
import numpy as np

from learner.model.batches import TokenArrays, aligned, padded_size, to_device
from learner.model.shared_prompt import SharedPrompt, group_batch
from learner.online.experience import PromptGroup, TrainBatch
from protocol.messages.arrays import floats_view, ids_view


@dataclass(frozen=True)
class Completions:
    """The N completions of a batch in group order, each with its prompt."""

    prompts: list[np.ndarray]
    token_ids: list[np.ndarray]
    sampling_logprobs: list[np.ndarray]
    finished: np.ndarray  # (N,) bool, False: cut at max_completion_length
    masks: list[np.ndarray]  # of each, float32, 1 = the token counts
    groups: np.ndarray  # (N,) int, the index of each completion's group


class CompletionArrays(TokenArrays):
    """A micro-batch of B completions, some of them empty, to fill the shape."""

    advantages: mx.array  # (B,) float32
    sampling_logprobs: mx.array  # (B, C) float32, nats
    sequence_mask: mx.array  # (B,) float32, 0 = only fills the shape
    prompt: NotRequired[SharedPrompt]  # if `input_ids` continue it


def gather_completions(
    groups: Sequence[PromptGroup], *, mask_truncated: bool = False
) -> Completions:
    """Return the completions of `groups`; with `mask_truncated`, cut ones count no token."""
    each = [(i, item, c) for i, item in enumerate(groups) for c in item.group.completions]
    token_ids = [ids_view(c.token_ids) for _, _, c in each]
    finished = np.array([c.finish_reason == "stop" for _, _, c in each])

    counted = finished if mask_truncated else np.ones(len(each), bool)
    return Completions(
        prompts=[np.asarray(item.prompt.prompt_ids, np.int32) for _, item, _ in each],
        token_ids=token_ids,
        sampling_logprobs=[floats_view(c.sampling_logprobs) for _, _, c in each],
        finished=finished,
        masks=[np.full(len(c), ok, np.float32) for c, ok in zip(token_ids, counted, strict=True)],
        groups=np.array([i for i, _, _ in each]),
    )


def completion_arrays(
    completions: Completions,
    advantages: np.ndarray,
    index: Sequence[int],
    *,
    length_bucket: int,
    share_prompt: bool,
) -> CompletionArrays:
    """Pad the completions of `index` to a micro-batch; `advantages` (N,) are of all of them.

    With `share_prompt`, the prompt of a single group is kept apart where that saves tokens.
    """
    # Empty sequences keep the number of shapes small: a compiled step is traced once per shape.
    empty = padded_size(len(index)) - len(index)
    one_group = len(set(completions.groups[list(index)])) == 1
    tokens, prompt = group_batch(
        [completions.prompts[i] for i in index] + [np.zeros(1, np.int32)] * empty,
        [completions.token_ids[i] for i in index] + [np.zeros(0, np.int32)] * empty,
        masks=[completions.masks[i] for i in index] + [np.zeros(0, np.float32)] * empty,
        length_bucket=length_bucket,
        one_prompt=share_prompt and one_group,
    )

    filling = np.zeros(empty, np.float32)
    weights = np.concatenate([advantages[list(index)], filling])
    sampling_logprobs = aligned([completions.sampling_logprobs[i] for i in index], tokens)
    arrays: CompletionArrays = {
        **to_device(tokens),
        "advantages": mx.array(weights.astype(np.float32)),
        "sampling_logprobs": mx.array(sampling_logprobs),
        "sequence_mask": mx.array(np.concatenate([np.ones(len(index), np.float32), filling])),
    }
    if prompt is not None:
        arrays["prompt"] = prompt
    return arrays


def batch_metrics(batch: TrainBatch, completions: Completions) -> dict[str, float]:
    """Return metrics of completions, their lengths in tokens, rewards and staleness."""
    lengths = np.array([len(ids) for ids in completions.token_ids])
    ended = lengths[completions.finished]
    ages = [
        batch.trained_at - span.version
        for item in batch.groups
        for completion in item.group.completions
        for span in completion.policy_spans
    ]
    faults = [fault for item in batch.groups for fault in item.group.reward.faults]

    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - completions.finished.mean()),
        "completions/mean_terminated_length": float(ended.mean()) if ended.size else 0.0,
        "completions/min_terminated_length": float(ended.min()) if ended.size else 0.0,
        "completions/max_terminated_length": float(ended.max()) if ended.size else 0.0,
        "staleness/mean": float(np.mean(ages)),
        "staleness/max": float(max(ages)),
        "rewards/faults": float(len(faults)),
        "rewards/timeouts": float(sum(fault.kind == "timeout" for fault in faults)),
        "time/reward_s": float(np.mean([g.group.reward_s for g in batch.groups])),
        "time/generation_s": float(np.mean([g.group.generation_s for g in batch.groups])),
        "batch_tokens": float(lengths.sum() + sum(len(p) for p in completions.prompts)),
    }

    return metrics | _logged_by_functions(batch)


def _logged_by_functions(batch: TrainBatch) -> dict[str, float]:
    """Return the metrics that reward functions logged: means over the groups that have them.

    The prefix keeps them apart from the run's own, whatever their names.
    """
    found: dict[str, list[float]] = {}
    for item in batch.groups:
        for name, value in item.group.reward.log_metric.items():
            found.setdefault(f"log_metric/{name}", []).append(value)
    return {name: fmean(values) for name, values in found.items()}
