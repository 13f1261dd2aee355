"""Recompute a run's staleness: `launch/staleness.py RUN_DIR [--max N]`.

Staleness and the overlap of sampling and training are computed from what the run wrote, not from
what it counted. Exit status 1: some token is staler than `queue.max_staleness` of
RUN_DIR/config.toml (or N). Exit status 2: the records cannot be read.
"""

import argparse
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from protocol.config.settings import QueueSettings
from protocol.errors import ConfigError, DataError, PippinError

Interval = tuple[float, float]  # start and end, Unix s


class Staleness(msgspec.Struct, frozen=True, kw_only=True):
    """What the records show: staleness in batches, per span of tokens; times in seconds."""

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
    """Measure the lines of rollouts.jsonl, evaluation left out, and of metrics.jsonl.

    Raises:
        DataError: a line of a trained group lacks a field, or there is no such line.

    """
    ages: list[int] = []
    sampling: list[Interval] = []
    for number, line in enumerate(rollouts, start=1):
        if line.get("kind", "train") != "train":
            continue
        try:
            spans = chain.from_iterable(line["policy_spans"])  # of all completions of a group
            ages += [line["trained_at"] - span["version"] for span in spans]
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
    """Return the same times as ascending intervals that do not touch each other."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def overlap(first: list[Interval], second: list[Interval]) -> float:
    """Return the seconds that lie in both; each is as `union` returns it."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        total += max(0.0, end - start)
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--max", type=int, help="the bound; default: queue.max_staleness")
    args = parser.parse_args(argv)

    try:
        bound = _bound(args.run_dir) if args.max is None else args.max
        seen = measure(
            _lines(args.run_dir / "rollouts.jsonl"), _lines(args.run_dir / "metrics.jsonl")
        )
    except PippinError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2

    share = seen.overlap_s / seen.training_s if seen.training_s else 0.0
    print(f"groups {seen.groups}, spans {seen.spans}")
    print(f"staleness max {seen.max}, mean {seen.mean:.3f}, bound {bound}")
    print(
        f"sampling {seen.sampling_s:.1f} s, training {seen.training_s:.1f} s, "
        f"both at once {seen.overlap_s:.1f} s ({share:.0%} of training)"
    )
    return int(seen.max > bound)


def _bound(folder: Path) -> int:
    path = folder / "config.toml"
    try:
        queue = tomllib.loads(path.read_text(encoding="utf-8")).get("queue", {})
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; or give --max") from error
    return int(queue.get("max_staleness", QueueSettings().max_staleness))


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        return [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} holds a line that is not a JSON object: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
