"""Metrics by hand: how each kind merges, what it is without anything counted, and over batches."""

import math

import mlx.core as mx
import pytest

from learner.losses.metrics import Mean, Metrics, finish_batches, finish_metrics, merge_metrics


def mean(total: float, weight: float) -> Mean:
    return Mean(mx.array(total), mx.array(weight))


def metrics_of(total: float, weight: float, extreme: float) -> Metrics:
    return Metrics(
        means={"mean": mean(total, weight)},
        means_if_any={"some": mean(total, weight)},
        margins={"margin": (mean(total, weight), mean(1.0, 2.0))},
        shares={"share": mx.array(total)},
        minima={"low": mx.array(extreme)},
        maxima={"high": mx.array(extreme)},
    )


def test_micro_batches_merge_by_kind():
    merged = merge_metrics(metrics_of(6.0, 2.0, 3.0), metrics_of(3.0, 1.0, 5.0))
    assert finish_metrics(merge_metrics(Metrics(), merged)) == {
        "mean": 3.0, "some": 3.0, "margin": 2.5, "share": 9.0, "low": 3.0, "high": 5.0,
    }  # fmt: skip


def test_what_nothing_was_counted_for_is_0_or_left_out_or_nan():
    nothing = metrics_of(0.0, 0.0, 0.0)._replace(
        minima={"low": mx.array(math.inf)}, maxima={"high": mx.array(-math.inf)}
    )
    found = finish_metrics(nothing)
    assert found.keys() == {"mean", "share", "low", "high"}
    assert found["mean"] == found["share"] == 0.0
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])


def test_over_batches_one_value_per_batch_is_averaged_by_examples():
    found = finish_batches([(metrics_of(6.0, 2.0, 3.0), 4), (metrics_of(3.0, 1.0, math.inf), 1)])
    assert found["mean"] == found["some"] == 3.0
    assert found["margin"] == 2.5
    assert found["share"] == pytest.approx((4 * 6 + 3) / 5)
    assert found["low"] == found["high"] == 3.0  # the second batch has none
