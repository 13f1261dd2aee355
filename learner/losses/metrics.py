"""Metrics that merge exactly over micro-batches: sums with their weights, minima and maxima.

A `Metrics` is a tree of arrays (named tuples and dicts), so that a compiled step can return it.
"""

# pyright: reportUnknownVariableType=false
# (mlx.utils.tree_map has no types)

import math
import operator
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import Any, NamedTuple, TypeVar, cast

import mlx.core as mx
from mlx.utils import tree_map

T = TypeVar("T")
_NONE: dict[str, Any] = {}


class Mean(NamedTuple):
    """A mean in two parts that add up over micro-batches, () float32 each."""

    total: mx.array
    weight: mx.array


class Metrics(NamedTuple):
    """The metrics of a micro-batch by kind, then by name; the kind says how a metric merges.

    A new metric only needs a name here: the trainer merges, finishes and logs it.
    """

    means: dict[str, Mean] = _NONE  # 0 where nothing was counted, as in most of TRL's trainers
    means_if_any: dict[str, Mean] = _NONE  # left out where nothing was counted, as in TRL's KTO
    margins: dict[str, tuple[Mean, Mean]] = _NONE  # first mean minus second, if both count any
    shares: dict[str, mx.array] = _NONE  # parts that add up to the batch's value
    minima: dict[str, mx.array] = _NONE  # inf where nothing was counted, finished as NaN
    maxima: dict[str, mx.array] = _NONE  # -inf where nothing was counted, finished as NaN


def number(array: mx.array) -> float:
    """Return a scalar array as a number; evaluates it."""
    return float(cast(float, array.item()))


def token_mean(values: mx.array, mask: mx.array) -> Mean:
    """Return the mean of `values` (B, C) over the tokens that `mask` (B, C) counts."""
    return Mean(mx.where(mask > 0, values, 0.0).sum(), mask.sum())


def detached(metrics: Metrics) -> Metrics:
    """Return the metrics without gradients."""
    return tree_map(mx.stop_gradient, metrics)


def merge_metrics(first: Metrics, second: Metrics) -> Metrics:
    """Merge the metrics of two micro-batches, or of two parts of a loss."""
    add = partial(tree_map, operator.add)
    return Metrics(
        means=_merge(first.means, second.means, add),
        means_if_any=_merge(first.means_if_any, second.means_if_any, add),
        margins=_merge(first.margins, second.margins, add),
        shares=_merge(first.shares, second.shares, add),
        minima=_merge(first.minima, second.minima, mx.minimum),
        maxima=_merge(first.maxima, second.maxima, mx.maximum),
    )


def finish_metrics(metrics: Metrics) -> dict[str, float]:
    """Return the metrics as numbers under their names; evaluates them."""
    finished = {name: _quotient(mean, empty=0.0) for name, mean in metrics.means.items()}

    optional = {name: _quotient(mean) for name, mean in metrics.means_if_any.items()}
    for name, (first, second) in metrics.margins.items():
        optional[name] = _quotient(first) - _quotient(second)
    finished |= {name: value for name, value in optional.items() if not math.isnan(value)}
    finished |= {name: number(value) for name, value in metrics.shares.items()}

    for name, extreme in (*metrics.minima.items(), *metrics.maxima.items()):
        value = number(extreme)
        finished[name] = value if math.isfinite(value) else math.nan
    return finished


def finish_batches(batches: Iterable[tuple[Metrics, int]]) -> dict[str, float]:
    """Return the metrics of batches, each with its number of examples, as those of one batch.

    Means are over all that was counted. Shares and extremes, of which a batch has one value, are
    averaged over batches, weighted by their examples; an extreme of nothing is left out.
    """
    # As Python floats, so that many batches are added up in float64.
    parts = [_as_means(tree_map(number, metrics), count) for metrics, count in batches]
    total = reduce(merge_metrics, parts, Metrics())
    return finish_metrics(tree_map(mx.array, total))


def _as_means(numbers: Metrics, examples: int) -> Metrics:
    """Return metrics that all add up over batches; the leaves are floats."""
    means = dict(numbers.means)
    weight: Any = float(examples)
    for values in (numbers.shares, numbers.minima, numbers.maxima):
        for name, value in values.items():
            if abs(value) != math.inf:
                means[name] = Mean(value * weight, weight)
    return Metrics(means=means, means_if_any=numbers.means_if_any, margins=numbers.margins)


def _merge(first: dict[str, T], second: dict[str, T], combine: Callable[[T, T], T]) -> dict[str, T]:
    merged = dict(first)
    for name, value in second.items():
        merged[name] = combine(merged[name], value) if name in merged else value
    return merged


def _quotient(mean: Mean, *, empty: float = math.nan) -> float:
    total, weight = number(mean.total), number(mean.weight)
    return total / weight if weight else empty
