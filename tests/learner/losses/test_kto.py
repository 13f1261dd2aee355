"""KTO's loss by hand, its metrics where a side has no answers, and the advice on its weights."""

import math

import mlx.core as mx
import numpy as np
import pytest

from learner.losses.kto import kto_kl, kto_loss, kto_weight_advice
from learner.losses.metrics import finish_metrics, merge_metrics
from protocol.config.settings import PreferenceSettings


def test_kto_by_hand_and_split():
    logprobs = mx.array([[-1.0, -1.0], [-0.5, -9.0]])
    mask = mx.array([[1.0, 1.0], [1.0, 0.0]])
    ref, labels = mx.array([[-2.0, -1.0], [-1.5, 0.0]]), mx.array([1.0, 0.0])
    kl = kto_kl(np.array([1.0, 0.0]))
    assert kl == 0.5
    assert kto_kl(np.array([-1.0])) == 0.0
    settings = PreferenceSettings(method="kto", undesirable_weight=2.0)
    normalisers = {"answers": mx.array(2.0)}

    def loss(rows):
        return kto_loss(
            logprobs[rows], ref_logprobs=ref[rows], mask=mask[rows], labels=labels[rows],
            kl=mx.array(kl), normalisers=normalisers, settings=settings,
        )  # fmt: skip

    # both ratios are 1: 1 - sigmoid(.1 * (1 - .5)) and 2 (1 - sigmoid(.1 * (.5 - 1)))
    low = 1 / (1 + math.exp(0.05))
    value, metrics = loss(slice(0, 2))
    assert value.item() == pytest.approx((low + 2 * (1 - low)) / 2, rel=1e-6)
    first, second = loss(slice(0, 1)), loss(slice(1, 2))
    assert first[0].item() + second[0].item() == pytest.approx(value.item(), rel=1e-6)
    merged = finish_metrics(merge_metrics(first[1], second[1]))
    assert merged == pytest.approx(finish_metrics(metrics))
    assert merged["rewards/chosen"] == pytest.approx(0.1)
    assert merged["rewards/margins"] == merged["rewards/chosen"] - merged["rewards/rejected"]

    # the first answer is good, so nothing is known of bad ones
    assert finish_metrics(first[1]).keys() == {"rewards/chosen", "logps/chosen", "kl"}


def test_kto_weights_that_do_not_balance_the_answers_are_named():
    plain = PreferenceSettings(method="kto")
    # 30 good, 10 bad: 10/30 and 1.33 x 10/30; 30/10/1.33 and 30/10
    advice = kto_weight_advice(30, 10, plain)
    assert "30 good and 10 bad" in advice
    assert "desirable_weight in [0.33, 0.44]" in advice
    assert "undesirable_weight in [2.26, 3.0]" in advice
    assert kto_weight_advice(30, 10, PreferenceSettings(method="kto", undesirable_weight=3)) == ""
    assert kto_weight_advice(30, 10, PreferenceSettings(method="kto", desirable_weight=0.4)) == ""
    assert kto_weight_advice(10, 10, PreferenceSettings(method="kto", desirable_weight=9)) == ""
    assert "7 good and 0 bad" in kto_weight_advice(7, 0, plain)
