"""The completions of a batch of groups, one row each, and what is logged of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learner.online.experience import PromptGroup, TrainBatch
from protocol.messages.arrays import floats_view, ids_view


@dataclass(frozen=True)
class Rows:
    """The N completions of a batch, rows in group order. `groups` holds each row's group."""

    prompts: list[np.ndarray]
    completions: list[np.ndarray]
    sampling_logprobs: list[np.ndarray]
    finished: np.ndarray  # (N,) bool, False: cut at max_completion_length
    groups: np.ndarray  # (N,) int


def gather_rows(groups: Sequence[PromptGroup]) -> Rows:
    """Return the rows of `groups`."""
    pairs = [(i, item, c) for i, item in enumerate(groups) for c in item.group.completions]
    return Rows(
        prompts=[np.asarray(item.prompt.prompt_ids, np.int32) for _, item, _ in pairs],
        completions=[ids_view(c.token_ids) for _, _, c in pairs],
        sampling_logprobs=[floats_view(c.sampling_logprobs) for _, _, c in pairs],
        finished=np.array([c.finish_reason == "stop" for _, _, c in pairs]),
        groups=np.array([i for i, _, _ in pairs]),
    )


def batch_metrics(batch: TrainBatch, rows: Rows) -> dict[str, float]:
    """Return what a batch logs of its completions, rewards and ages; lengths in tokens."""
    lengths = np.array([len(c) for c in rows.completions])
    ended = lengths[rows.finished]
    ages = [
        batch.trained_at - s.version
        for item in batch.groups
        for c in item.group.completions
        for s in c.policy_spans
    ]
    faults = [f for item in batch.groups for f in item.group.reward.faults]
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - rows.finished.mean()),
        "completions/mean_terminated_length": float(ended.mean()) if ended.size else 0.0,
        "completions/min_terminated_length": float(ended.min()) if ended.size else 0.0,
        "completions/max_terminated_length": float(ended.max()) if ended.size else 0.0,
        "staleness/mean": float(np.mean(ages)),
        "staleness/max": float(max(ages)),
        "rewards/faults": float(len(faults)),
        "rewards/timeouts": float(sum(f.kind == "timeout" for f in faults)),
        "time/reward_s": float(np.mean([g.group.reward_s for g in batch.groups])),
        "time/generation_s": float(np.mean([g.group.generation_s for g in batch.groups])),
        "batch_tokens": float(lengths.sum() + sum(len(p) for p in rows.prompts)),
    }
    for item in batch.groups:
        for name, value in item.group.reward.log_metric.items():
            metrics[name] = metrics.get(name, 0.0) + value / len(batch.groups)
    return metrics
