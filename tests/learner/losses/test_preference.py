"""Preference losses by hand, by finite differences, and under every split into micro-batches."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from learner.losses.dpo import DPO_LOSSES
from learner.losses.metrics import Metrics, finish_metrics, merge_metrics, number
from learner.losses.orpo_cpo import CPO_LOSSES, log_sigmoid_odds
from learner.losses.pairs import PairBatch, pair_normalisers
from learner.losses.preference import needs_whole_batch, preference_loss
from protocol.config import preference_checks
from protocol.config.settings import PreferenceSettings

CPO = [("cpo", [name], alpha) for name in ("sigmoid", "hinge", "ipo") for alpha in (0.0, 0.25)]
SINGLE = [("dpo", [name], 0.0) for name in DPO_LOSSES]
ALL = [*SINGLE, *CPO, ("simpo", ["sigmoid"], 0.0), ("orpo", ["sigmoid"], 0.0)]
EXTREME = [[0.0, 0.0, 0.0], [-1e-8, 0.0, 0.0], [-80.0, -80.0, -80.0], [-0.5, -1.0, -2.0]]


def settings_for(method, loss_type, alpha=0.0, **extra):
    smoothing = 0.1 if set(loss_type) & {"exo_pair", "robust"} else 0.0
    values = {"label_smoothing": smoothing, "alpha": alpha, **extra}
    return PreferenceSettings(method=method, loss_type=loss_type, **values)


def batch(pairs=8, width=6, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, 2 * pairs)
    mask = (np.arange(width) < lengths[:, None]).astype(np.float32)
    logprobs = -rng.exponential(0.8, mask.shape).astype(np.float32)
    ref = -rng.exponential(0.8, mask.shape).astype(np.float32)
    return logprobs, ref, mask


def call(logprobs, ref, mask, settings, rows, tokens):
    values = pair_normalisers(pairs=rows, chosen_tokens=tokens)
    pairs = PairBatch(
        logprobs=logprobs,
        mask=mx.array(mask),
        ref_logprobs=mx.array(ref),
        log_sum_sq_probs=mx.full(mask.shape, -0.5),
        normalisers={k: mx.array(v) for k, v in values.items()},
    )
    return preference_loss(pairs, settings)


def gradient(logprobs, ref, mask, settings, rows=None, tokens=None):
    half = len(mask) // 2
    rows = half if rows is None else rows
    tokens = float(mask[:half].sum()) if tokens is None else tokens

    def loss(x):
        return call(x, ref, mask, settings, rows, tokens)

    (value, metrics), grad = mx.value_and_grad(loss)(mx.array(logprobs))
    return number(value), np.array(grad), metrics


@pytest.mark.parametrize(("method", "loss_type", "alpha"), ALL)
def test_gradients_equal_finite_differences(method, loss_type, alpha):
    logprobs, ref, mask = batch(pairs=3, width=3)
    settings = settings_for(method, loss_type, alpha)
    _, grad, _ = gradient(logprobs, ref, mask, settings)
    direction = np.random.default_rng(1).standard_normal(mask.shape).astype(np.float32)
    step = np.float32(2e-3)
    up = gradient(logprobs + step * direction, ref, mask, settings)[0]
    down = gradient(logprobs - step * direction, ref, mask, settings)[0]
    assert float((grad * direction).sum()) == pytest.approx(
        (up - down) / (2 * float(step)), rel=5e-3, abs=2e-3 * max(1.0, abs(up))
    )


@pytest.mark.parametrize(("method", "loss_type", "alpha"), ALL)
@pytest.mark.parametrize("side", [0, 1, 2])
def test_extreme_log_probs_stay_finite(method, loss_type, alpha, side):
    chosen, rejected = EXTREME, EXTREME[side:] + EXTREME[:side]
    logprobs = np.array(chosen + rejected, np.float32)
    mask = np.ones_like(logprobs)
    mask[3] = 0.0  # an answer whose tokens are all masked
    mask[7, 1:] = 0.0  # one token
    ref = np.full_like(logprobs, -1.0)
    value, grad, metrics = gradient(logprobs, ref, mask, settings_for(method, loss_type, alpha))
    assert math.isfinite(value)
    assert np.isfinite(grad).all()
    assert all(math.isfinite(v) for v in finish_metrics(metrics).values())


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "simpo"])
def test_alphapo_of_extreme_log_probs_stays_finite(name):
    logprobs = np.array(
        [[0.0, -1e-8], [-200.0, -200.0]], np.float32
    )  # the reward is -exp(100) / 0.5
    settings = settings_for("cpo", [name], 0.5)
    value, grad, _ = gradient(logprobs, np.zeros_like(logprobs), np.ones_like(logprobs), settings)
    assert math.isfinite(value)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "exo_pair", "discopop"])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_divergences_of_extreme_log_probs_stay_finite(divergence, name, side):
    logprobs = np.array(EXTREME + EXTREME[side:] + EXTREME[:side], np.float32)
    settings = settings_for("dpo", [name], f_divergence_type=divergence)
    value, grad, _ = gradient(
        logprobs, np.full_like(logprobs, -1.0), np.ones_like(logprobs), settings
    )
    assert math.isfinite(value)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize(("method", "loss_type", "alpha"), ALL)
def test_micro_batches_add_up(method, loss_type, alpha, parts):
    settings = settings_for(method, loss_type, alpha)
    if needs_whole_batch(settings):
        assert loss_type[0].startswith("aot")
        return
    logprobs, ref, mask = batch()
    tokens = float(mask[:8].sum())
    whole, grad, metrics = gradient(logprobs, ref, mask, settings)
    total, merged, summed = 0.0, Metrics(), np.zeros_like(grad)
    for first in range(0, 8, 8 // parts):
        index = np.r_[first : first + 8 // parts]
        index = np.concatenate([index, index + 8])
        value, part, some = gradient(logprobs[index], ref[index], mask[index], settings, 8, tokens)
        total += value
        summed[index] += part
        merged = merge_metrics(merged, some)
    assert total == pytest.approx(whole, rel=1e-5, abs=1e-7)
    assert np.linalg.norm(summed - grad) <= 1e-5 * np.linalg.norm(grad)
    assert finish_metrics(merged) == pytest.approx(finish_metrics(metrics), rel=1e-5, abs=1e-6)


def test_dpo_begins_at_log_two():
    logprobs, _, mask = batch()
    assert gradient(logprobs, logprobs, mask, settings_for("dpo", ["sigmoid"]))[0] == pytest.approx(
        0.693147, abs=1e-6
    )


@pytest.mark.parametrize("z", [-16.0, 4.0, 16.0])
def test_exo_pair_keeps_the_digits_of_its_gradient_in_the_tails(z):
    logprobs = np.array([[-0.5], [-1.0]], np.float32)
    ref = np.array([[-0.5 - z], [-1.0]], np.float32)
    settings = settings_for("dpo", ["exo_pair"], beta=1.0)
    _, grad, _ = gradient(logprobs, ref, np.ones((2, 1), np.float32), settings)
    # d/dz of KL(softmax || (0.9, 0.1)): p (1 - p) (z - log 9)
    p = 1 / (1 + math.exp(-z))
    q = 1 / (1 + math.exp(z))
    assert grad[0, 0] == pytest.approx(p * q * (z - math.log(9)), rel=1e-5)


def test_orpo_ratio_of_certain_answers_is_its_limit():
    # p_c = 1: odds_c / (odds_c + odds_r) = 1, and its gradient is odds_r = 1 at p_r = 1/2
    half = mx.array([-math.log(2)])
    value, grad = mx.value_and_grad(lambda c: log_sigmoid_odds(c, half).sum())(mx.array([0.0]))
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert grad.item() == pytest.approx(1.0, rel=1e-6)


def test_preference_score_scales_a_pair():
    logprobs, ref, mask = batch(pairs=2)
    values = pair_normalisers(pairs=2, chosen_tokens=1.0)
    pairs = PairBatch(
        logprobs=mx.array(logprobs),
        mask=mx.array(mask),
        ref_logprobs=mx.array(ref),
        normalisers={k: mx.array(v) for k, v in values.items()},
    )
    settings = settings_for("dpo", ["sigmoid"])
    plain = [
        preference_loss(replace(pairs, scores=mx.array(s)), settings)[0].item()
        for s in ([1.0, 0.0], [0.0, 1.0], [2.0, 0.5])
    ]
    assert plain[2] == pytest.approx(2.0 * plain[0] + 0.5 * plain[1], rel=1e-6)


def test_every_named_loss_is_there():
    assert tuple(DPO_LOSSES) == preference_checks.DPO_LOSSES
    assert tuple(CPO_LOSSES) == preference_checks.METHOD_LOSSES["cpo"]
