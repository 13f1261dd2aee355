"""Metrics that merge exactly over micro-batches: sums, counts, smallest and largest values.

A metric's array is stored under a name that says how it merges: `sum:x`, `count:x` (the mean of x
is their quotient), `min:x`, `max:x`. A `sum:x` without `count:x` is logged as it is.
"""

import math
from typing import cast

import mlx.core as mx

Metrics = dict[str, mx.array]


def number(array: mx.array) -> float:
    """Return a scalar array as a number; evaluates it."""
    return float(cast(float, array.item()))


def mean(name: str, total: mx.array, count: mx.array) -> Metrics:
    """Return a mean in parts."""
    return {f"sum:{name}": total, f"count:{name}": count}


def token_mean(name: str, values: mx.array, mask: mx.array) -> Metrics:
    """Return the mean of `values` (B, C) over the tokens that `mask` (B, C) counts, in parts."""
    return mean(name, mx.where(mask > 0, values, 0.0).sum(), mask.sum())


def minimum(name: str, value: mx.array) -> Metrics:
    """Return a smallest value; inf where there is none."""
    return {f"min:{name}": value}


def maximum(name: str, value: mx.array) -> Metrics:
    """Return a largest value; -inf where there is none."""
    return {f"max:{name}": value}


def merge_metrics(first: Metrics, second: Metrics) -> Metrics:
    """Merge the metrics of two micro-batches."""
    merged = dict(first)
    for name, value in second.items():
        if name not in merged:
            merged[name] = value
        elif name.startswith("min:"):
            merged[name] = mx.minimum(merged[name], value)
        elif name.startswith("max:"):
            merged[name] = mx.maximum(merged[name], value)
        else:
            merged[name] = merged[name] + value
    return merged


def finish_metrics(metrics: Metrics, *, empty: float = 0.0) -> dict[str, float]:
    """Return the metrics as numbers under their own names.

    A mean of nothing is `empty`: 0 in TRL's trainers, but KTO's. An extreme of nothing is NaN.
    """
    values = {name: number(value) for name, value in metrics.items()}
    finished: dict[str, float] = {}
    for key, value in values.items():
        kind, name = key.split(":", 1)
        if kind == "sum":
            count = values.get(f"count:{name}", 1.0)
            finished[name] = value / count if count else empty
        elif kind in ("min", "max"):
            finished[name] = value if math.isfinite(value) else math.nan
    return finished
