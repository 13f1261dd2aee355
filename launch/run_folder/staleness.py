"""Staleness and overlap, recomputed from what a run wrote rather than from what it counted."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from protocol.errors import DataError

Interval = tuple[float, float]


class Staleness(msgspec.Struct, frozen=True, kw_only=True):
    """What the records say. Staleness in batches, a span of tokens each; times in seconds."""

    groups: int
    spans: int
    max: int
    mean: float
    sampling_s: float
    training_s: float
    overlap_s: float


def measure(
    rollouts: Iterable[Mapping[str, Any]], metrics: Iterable[Mapping[str, Any]]
) -> Staleness:
    """Measure the lines of rollouts.jsonl (evaluation is left out) and metrics.jsonl.

    Raises:
        DataError: a trained line lacks a field, or no line was trained.

    """
    ages: list[int] = []
    sampling: list[Interval] = []
    for number, line in enumerate(rollouts, start=1):
        if line.get("kind", "train") != "train":
            continue
        try:
            ages += [line["trained_at"] - span["version"] for span in _spans(line["policy_spans"])]
            sampling.append((line["started_at"], line["finished_at"]))
        except KeyError as error:
            raise DataError(f"rollouts.jsonl, line {number} has no field {error}") from error
    if not ages:
        raise DataError("rollouts.jsonl has no trained line; give the folder of a GRPO run")
    training = [
        (line["train_started_at"], line["train_finished_at"])
        for line in metrics
        if "train_started_at" in line
    ]
    sampled, trained = union(sampling), union(training)
    return Staleness(
        groups=len(sampling),
        spans=len(ages),
        max=max(ages),
        mean=sum(ages) / len(ages),
        sampling_s=sum(end - start for start, end in sampled),
        training_s=sum(end - start for start, end in trained),
        overlap_s=overlap(sampled, trained),
    )


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same times as ascending intervals that do not meet."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def overlap(first: list[Interval], second: list[Interval]) -> float:
    """Return the seconds that lie in both; each as `union` returns it."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        total += max(0.0, end - start)
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total


def _spans(value: list[Any]) -> list[Mapping[str, Any]]:
    """Return the spans of a completion, or of all completions of a group."""
    if value and isinstance(value[0], list):
        return [span for spans in value for span in spans]
    return value
