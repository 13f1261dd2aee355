"""The GRPO family: splits into micro-batches, finite differences, extreme log-probs."""

import math
from typing import get_args, get_type_hints

import mlx.core as mx
import numpy as np
import pytest

from learner.losses.grpo import VARIANTS, entropy_quantile, grpo_loss, grpo_normalisers
from learner.losses.importance import importance_ratio, k3
from learner.losses.metrics import Metrics, finish_metrics, merge_metrics, number
from protocol.config.settings import GrpoSettings

LOSSES = get_args(get_type_hints(GrpoSettings)["loss_type"])
LEVELS = ("token", "sequence")
DETACHED = ("cispo", "vespo")  # their weight has no gradient, so differences say nothing


def batch(rows=8, width=6, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, rows)
    lengths[0] = 1
    mask = (np.arange(width) < lengths[:, None]).astype(np.float32)
    old = -rng.exponential(0.8, mask.shape)
    data = {
        "logps": old + 0.2 * rng.standard_normal(mask.shape),
        "old": old,
        "ref": old + 0.3 * rng.standard_normal(mask.shape),
        "ent": rng.exponential(1.0, mask.shape),
        "adv": rng.standard_normal(rows),
    }
    return {k: v.astype(np.float32) for k, v in data.items()} | {"mask": mask}


def run(data, settings, index=None):
    """Return loss, gradient and metrics of `index` with the normalisers of all of `data`."""
    rows = np.arange(len(data["adv"])) if index is None else index
    values = grpo_normalisers(mask_sums=data["mask"].sum(1), max_completion_length=16)
    if settings.top_entropy_quantile < 1:
        rho = settings.top_entropy_quantile
        threshold, tokens = entropy_quantile(data["ent"], data["mask"], rho)
        values |= {"entropy_threshold": threshold, "entropy_tokens": max(tokens, 1.0)}
    part = {k: mx.array(v[rows]) for k, v in data.items()}

    def loss(logprobs):
        return grpo_loss(
            logprobs,
            part["ent"],
            advantages=part["adv"],
            mask=part["mask"],
            old_logprobs=part["old"],
            ref_logprobs=part["ref"],
            normalisers={k: mx.array(v) for k, v in values.items()},
            settings=settings,
        )

    (value, metrics), grad = mx.value_and_grad(loss)(part["logps"])
    return number(value), np.array(grad), metrics


def test_the_table_of_variants_has_the_losses_of_the_settings():
    assert tuple(VARIANTS) == LOSSES


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_micro_batches_add_up(loss_type, level, parts):
    settings = GrpoSettings(
        loss_type=loss_type, importance_sampling_level=level, beta=0.04,
        top_entropy_quantile=0.5, entropy_coef=0.01, off_policy_mask_threshold=0.05,
    )  # fmt: skip
    data = batch()
    whole, grad, metrics = run(data, settings)
    pieces = [run(data, settings, rows) for rows in np.split(np.arange(8), parts)]
    summed = np.concatenate([piece[1] for piece in pieces])
    assert sum(piece[0] for piece in pieces) == pytest.approx(whole, rel=1e-5, abs=1e-7)
    assert np.linalg.norm(summed - grad) <= 1e-5 * np.linalg.norm(grad)
    merged = Metrics()
    for piece in pieces:
        merged = merge_metrics(merged, piece[2])
    assert finish_metrics(merged) == pytest.approx(finish_metrics(metrics), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name not in DETACHED])
def test_gradients_equal_finite_differences(loss_type, level):
    settings = GrpoSettings(loss_type=loss_type, importance_sampling_level=level, beta=0.04)
    data = batch(rows=4, width=3, seed=3)
    grad = run(data, settings)[1]
    direction = np.random.default_rng(1).standard_normal(grad.shape).astype(np.float32)
    step = np.float32(1e-3)
    up = run(data | {"logps": data["logps"] + step * direction}, settings)[0]
    down = run(data | {"logps": data["logps"] - step * direction}, settings)[0]
    slope = (up - down) / (2 * float(step))
    assert float((grad * direction).sum()) == pytest.approx(slope, rel=5e-3, abs=2e-3)


def frozen_weight(data, settings):
    """CISPO's min(r, cap) or VESPO's phi, per token or sequence, in float64 by the formulas."""
    gap, mask = (data["logps"] - data["old"]).astype(np.float64), data["mask"]
    if settings.loss_type == "cispo":
        if settings.importance_sampling_level == "sequence":
            gap = (gap * mask).sum(1, keepdims=True) / mask.sum(1, keepdims=True)
        return np.minimum(np.exp(gap), settings.epsilon_high)
    positive = data["adv"][:, None] >= 0
    k, scale = np.where(positive, 2.0, 3.0), np.where(positive, 3.0, 2.0)
    omega = (gap * mask).sum(1, keepdims=True)
    return np.exp(scale + k * omega - scale * np.exp(omega))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", DETACHED)
def test_gradients_with_a_detached_weight_equal_differences_at_that_weight(loss_type, level):
    settings = GrpoSettings(
        loss_type=loss_type, importance_sampling_level=level, epsilon_high=1.0, beta=0.04
    )
    data = batch(rows=4, width=3, seed=3)
    mask, weight = data["mask"], frozen_weight(data, settings)
    if loss_type == "cispo":
        assert 0 < (weight == settings.epsilon_high).sum() < weight.size  # the cap binds, somewhere

    def loss(logprobs):
        gap, ahead = logprobs - data["old"], data["ref"] - logprobs
        if level == "sequence":
            gap = (gap * mask).sum(1, keepdims=True) / mask.sum(1, keepdims=True)
        kl = (np.exp(ahead) - ahead - 1) * np.exp(gap)  # the bias-corrected k3
        each = -weight * data["adv"][:, None] * logprobs + settings.beta * kl
        return (each * mask).sum() / mask.sum()

    logprobs, step = data["logps"].astype(np.float64), 1e-6
    wanted = np.zeros_like(logprobs)
    for index in np.ndindex(*logprobs.shape):
        up, down = logprobs.copy(), logprobs.copy()
        up[index] += step
        down[index] -= step
        wanted[index] = (loss(up) - loss(down)) / (2 * step)
    np.testing.assert_allclose(run(data, settings)[1], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("zero", [False, True])
def test_extreme_log_probs_stay_finite(loss_type, level, zero):
    values = np.array([0.0, -1e-8, -80.0, -200.0], np.float32)
    grid = np.array(np.meshgrid(values, values, values)).reshape(3, -1, 4)
    data = dict(zip(("logps", "old", "ref"), grid, strict=True))
    rows = len(data["logps"])
    mask = np.ones((rows, 4), np.float32)
    mask[0], mask[1, 1:] = 0.0, 0.0
    advantage = np.zeros(rows, np.float32) if zero else np.resize([1.0, -1.0, 0.0], rows)
    data |= {"mask": mask, "ent": np.ones_like(mask), "adv": advantage.astype(np.float32)}
    settings = GrpoSettings(loss_type=loss_type, importance_sampling_level=level, beta=0.04)
    value, grad, metrics = run(data, settings)
    assert math.isfinite(value)
    assert np.isfinite(grad).all()
    assert all(math.isfinite(v) for v in finish_metrics(metrics).values())


@pytest.mark.parametrize("gain", [2.0, -2.0])
def test_a_ratio_beyond_float32_has_its_limit(gain):
    data = {name: np.full((1, 1), -1e-8, np.float32) for name in ("logps", "ref", "ent")}
    data |= {"old": np.full((1, 1), -200.0, np.float32), "mask": np.ones((1, 1), np.float32)}
    value, grad, _ = run(data | {"adv": np.full(1, gain, np.float32)}, GrpoSettings())
    if gain > 0:  # clipped: -(1 + epsilon) A, whose gradient is 0
        assert value == pytest.approx(-2.4)
        assert grad == 0.0
    else:  # nothing clips it: its gradient's norm will be inf, so that the step is left out
        assert value > 1e34
        assert grad > 1e34


@pytest.mark.parametrize("gap", [1e-4, -1e-4, 0.3, 19.99, 20.01, 60.0])
@pytest.mark.parametrize("weight", [0.0, -0.5])
def test_k3_keeps_its_digits(gap, weight):
    value, grad = mx.value_and_grad(lambda x: k3(x, mx.array(weight)))(mx.array(gap))
    exact = float(np.float32(gap))
    wanted = math.exp(weight) * (math.expm1(exact) - exact)
    assert value.item() == pytest.approx(wanted, rel=5e-6, abs=2e-11)
    assert grad.item() == pytest.approx(math.exp(weight) * math.expm1(exact), rel=5e-6)


def test_a_ratio_of_0_times_an_infinite_kl_is_the_ratio_of_reference_and_sampler():
    value = k3(mx.array(199.0), mx.array(-200.0))  # reference -1, policy -200, sampler 0
    assert value.item() == pytest.approx(math.exp(-1.0), rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[2.0, 0.5]]),
        ("token_mask", [[0.0, 0.5]]),
        ("sequence_truncate", [[2.0]]),
        ("sequence_mask", [[2.0]]),
    ],
)
def test_importance_ratio_modes(mode, expected):
    # ratios 4 and 1/2 a token, 2 a sequence, at most 2
    settings = GrpoSettings(importance_sampling_mode=mode, importance_sampling_clip_max=2.00001)
    gap = mx.array([[math.log(4.0), -math.log(2.0)]])
    ratio = importance_ratio(gap, mx.zeros((1, 2)), mx.ones((1, 2)), settings)
    assert np.array(ratio) == pytest.approx(np.array(expected), rel=1e-4)


def test_a_batch_of_masked_rows_has_means_of_zero_and_no_extremes():
    """TRL divides by at least one token; its smallest and largest of no sequence are NaN."""
    data = batch()
    data["mask"] = np.zeros_like(data["mask"])
    loss, grad, metrics = run(data, GrpoSettings(beta=0.1, entropy_coef=0.1))
    assert loss == 0.0
    assert not grad.any()
    finished = finish_metrics(metrics)
    for name in ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/region_mean"):
        assert finished[name] == 0.0
    assert math.isnan(finished["clip_ratio/low_min"])
    assert math.isnan(finished["clip_ratio/high_max"])
