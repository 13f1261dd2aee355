"""The optimiser step: AdamW by hand, micro-batches, resume, and mlx-lm's own training loop."""

import math
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.tuner.trainer import default_loss

from learner.model.batches import sequence_batch, to_device
from learner.model.logprobs import completion_logprobs
from learner.optim.adamw import ExactAdamW
from learner.optim.step import MAX_SKIPS, Step, random_state, set_random_state, should_compile
from protocol.config.settings import ModelSettings, OptimizerSettings
from protocol.errors import CheckpointError, TrainingError
from protocol.model.adapters import attach_adapters
from protocol.model.snapshots import trainable
from tests.tiny import VOCAB, ragged_batch, tiny_model


class Weights(nn.Module):
    """A model of one vector, whose gradient a loss can set."""

    def __init__(self, values, dtype=mx.float32):
        super().__init__()
        self.w = mx.array(values, dtype=dtype)


def pull(model, arrays):
    """Make a loss whose gradient with respect to w is `arrays["g"]`."""
    return (model.w * arrays["g"]).sum(), {"seen": arrays["g"].sum()}


def adamw(weights, gradients, settings, rates):
    """AdamW as torch.optim.AdamW documents it, in float64, with norm clipping before."""
    w = np.array(weights, np.float64)
    m = v = np.zeros_like(w)
    norms = []
    for step, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = np.array(g, np.float64)
        norms.append(np.linalg.norm(g))
        if settings.max_grad_norm > 0:
            g = g * min(1.0, settings.max_grad_norm / (norms[-1] + 1e-6))
        m = settings.adam_beta1 * m + (1 - settings.adam_beta1) * g
        v = settings.adam_beta2 * v + (1 - settings.adam_beta2) * g**2
        w = w * (1 - rate * settings.weight_decay)
        m_hat = m / (1 - settings.adam_beta1**step)
        v_hat = v / (1 - settings.adam_beta2**step)
        w = w - rate * m_hat / (np.sqrt(v_hat) + settings.adam_epsilon)
    return w, norms


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_by_hand(max_norm, decay):
    settings = OptimizerSettings(
        learning_rate=0.01, weight_decay=decay, max_grad_norm=max_norm, adam_beta2=0.95
    )
    model = Weights([1.0, -2.0, 0.5])
    step = Step(model, settings, total_steps=4, compiled=False)
    gradients = [[0.1, -0.2, 0.05], [3.0, 4.0, 0.0], [1e-3, 0.0, -0.5], [0.2, 0.2, 0.2]]
    wanted, norms = adamw([1.0, -2.0, 0.5], gradients, settings, [0.01, 0.0075, 0.005, 0.0025])
    rates = []
    for gradient, norm in zip(gradients, norms, strict=True):
        _, metrics = step.accumulate({"g": mx.array(gradient)}, pull)
        assert metrics["seen"].item() == pytest.approx(sum(gradient), rel=1e-6)
        update = step.apply()
        assert update.applied
        assert update.grad_norm == pytest.approx(norm, rel=1e-6)  # before clipping
        rates.append(update.learning_rate)
    np.testing.assert_allclose(model.w, wanted, rtol=0, atol=2e-7)
    assert [round(rate, 9) for rate in rates] == [0.01, 0.0075, 0.005, 0.0025]


def test_the_first_step_is_the_learning_rate():
    """Without bias correction it would be 3.16 times as long."""
    model = Weights([1.0])
    settings = OptimizerSettings(learning_rate=1e-3, max_grad_norm=0.0)
    step = Step(model, settings, total_steps=10, compiled=False)
    step.accumulate({"g": mx.array([0.7])}, pull)
    step.apply()
    assert 1.0 - model.w.item() == pytest.approx(1e-3, rel=1e-4)


def test_bfloat16_weights_move_as_float32_ones_do():
    settings = OptimizerSettings(learning_rate=1e-6, lr_scheduler_type="constant")
    start = [1.0, -0.75, 0.01]
    models = {dtype: Weights(start, dtype) for dtype in (mx.bfloat16, mx.float32)}
    exact = mx.array(models[mx.bfloat16].w, mx.float32)
    models[mx.float32].w = exact
    steps = {
        dtype: Step(model, settings, total_steps=1, compiled=False)
        for dtype, model in models.items()
    }
    gradient = mx.array([0.5, 0.25, -1.0])  # exact in bfloat16
    for _ in range(300):
        for step in steps.values():
            step.accumulate({"g": gradient}, pull)
            step.apply()
    master = steps[mx.bfloat16].state()["master.w"]
    assert mx.array_equal(master, models[mx.float32].w)
    assert models[mx.bfloat16].w.dtype == mx.bfloat16
    assert mx.array_equal(models[mx.bfloat16].w, master.astype(mx.bfloat16))
    moved = np.array(exact - master)
    np.testing.assert_allclose(moved, [3e-4, 3e-4, -3e-4], rtol=0.02)  # an ulp at 1 is 6e-8
    assert "master.w" not in steps[mx.float32].state()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_dropped_and_counted(bad, caplog):
    model = Weights([1.0, 2.0])
    step = Step(model, OptimizerSettings(learning_rate=0.1), total_steps=4, compiled=False)
    step.accumulate({"g": mx.array([1.0, bad])}, pull)
    update = step.apply()
    assert not update.applied
    assert not math.isfinite(update.grad_norm)
    assert step.skipped_updates == 1
    assert "update skipped, 1 so far" in caplog.text
    assert model.w.tolist() == [1.0, 2.0]
    assert step.state()["step"].item() == 0
    assert step.state()["m.w"].tolist() == [0.0, 0.0]
    step.accumulate({"g": mx.array([1.0, 1.0])}, pull)
    assert step.apply().learning_rate == pytest.approx(0.075)  # the schedule went on


def test_gradients_that_are_never_finite_end_the_run():
    model = Weights([1.0])
    step = Step(model, OptimizerSettings(), total_steps=99, compiled=False)
    for gradient in [math.nan] * (MAX_SKIPS - 1) + [1.0] + [math.nan] * (MAX_SKIPS - 1):
        step.accumulate({"g": mx.array([gradient])}, pull)
        step.apply()
    step.accumulate({"g": mx.array([math.inf])}, pull)
    with pytest.raises(TrainingError, match="10 gradients in a row were not finite"):
        step.apply()
    assert step.skipped_updates == 2 * MAX_SKIPS - 1
    assert model.w.item() == pytest.approx(1.0, abs=2e-6)


def test_skip_moves_the_schedule_only():
    model = Weights([1.0])
    step = Step(model, OptimizerSettings(learning_rate=0.1), total_steps=2, compiled=False)
    step.accumulate({"g": mx.array([1.0])}, pull)
    assert step.skip().applied is False
    assert model.w.item() == 1.0
    with pytest.raises(ValueError, match="at least one accumulate"):
        step.apply()
    step.accumulate({"g": mx.array([1.0])}, pull)
    assert step.apply().learning_rate == pytest.approx(0.05)


def nll(model, arrays):
    """Negative log-likelihood over a normaliser of the whole batch."""
    logprobs, *_ = completion_logprobs(
        model, arrays["input_ids"], arrays["positions"], arrays["targets"]
    )
    return -(logprobs * arrays["mask"]).sum() / arrays["count"], {
        "logps": (logprobs * arrays["mask"]).sum()
    }


def lora_model(seed=0):
    model = tiny_model(seed)
    mx.random.seed(9)
    attach_adapters(model, ModelSettings())
    return model


@pytest.mark.parametrize("parts", [2, 4])
def test_splits_give_the_gradient_of_the_whole(parts):
    arrays: Any = {**to_device(ragged_batch()), "count": mx.array(50.0)}
    steps = []
    for split in (1, parts):
        step = Step(lora_model(), OptimizerSettings(), total_steps=1, compiled=False)
        size = 4 // split
        losses = [
            step.accumulate(
                {k: v if v.ndim == 0 else v[at : at + size] for k, v in arrays.items()}, nll
            )[0].item()
            for at in range(0, 4, size)
        ]
        steps.append((sum(losses), step.gradients()))
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-6)
    for name, whole in steps[0][1].items():
        difference = float(mx.linalg.norm(whole - steps[1][1][name]))
        assert difference <= 1e-5 * max(float(mx.linalg.norm(whole)), 1e-12), name


def test_resume_is_bit_exact(tmp_path):
    settings = OptimizerSettings(learning_rate=1e-2)
    arrays: Any = {**to_device(ragged_batch()), "count": mx.array(50.0)}

    def go_on(step, updates):
        done = []
        for _ in range(updates):
            step.accumulate(arrays, nll)
            done.append(step.apply())
        return done[-1]

    model = lora_model()
    straight = Step(model, settings, total_steps=6, compiled=False)
    go_on(straight, 3)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), straight.state())
    mx.save_safetensors(str(tmp_path / "policy.safetensors"), trainable(model))
    last = go_on(straight, 3)

    other = lora_model()
    resumed = Step(other, settings, total_steps=6, compiled=False)
    other.load_weights(str(tmp_path / "policy.safetensors"), strict=False)
    resumed.load_state(dict(mx.load(str(tmp_path / "state.safetensors"))))  # pyright: ignore
    assert go_on(resumed, 3) == last
    theirs = trainable(other)
    assert all(mx.array_equal(array, theirs[name]) for name, array in trainable(model).items())
    left, right = straight.state(), resumed.state()
    assert all(mx.array_equal(left[name], right[name]) for name in left)


def test_a_state_of_another_run_is_refused():
    one, two = (
        Step(Weights(values), OptimizerSettings(), total_steps=1, compiled=False)
        for values in ([1.0], [1.0, 2.0])
    )
    with pytest.raises(CheckpointError, match=r"2 of 3 tensors differ, first m\.w"):
        two.load_state(one.state())
    with pytest.raises(CheckpointError, match=r"first v\.w"):
        one.load_state({k: v for k, v in one.state().items() if k != "v.w"})


def sft_loss(head):
    def loss(model, arrays):
        logprobs, *_ = completion_logprobs(
            model, arrays["input_ids"], arrays["positions"], arrays["targets"], head=head
        )
        return -(logprobs * arrays["mask"]).sum() / arrays["mask"].sum(), {}

    return loss


@pytest.mark.parametrize(("head", "tolerance"), [("full", 0.0), ("chunked", 1e-6)])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_thirty_steps_of_sft_equal_mlx_lm_default_loss(head, tolerance, kind):
    """A plain loop over mlx-lm's loss with the same AdamW, on the same batches."""
    rng = np.random.default_rng(4)
    settings = OptimizerSettings(
        learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0
    )
    models = []
    for _ in range(2):
        model = tiny_model()
        mx.random.seed(9)
        attach_adapters(model, ModelSettings(fine_tune_type=kind))
        models.append(model)
    ours = Step(models[0], settings, total_steps=30, compiled=False)
    adam = ExactAdamW(learning_rate=1e-3, weight_decay=0.0)
    theirs = nn.value_and_grad(models[1], default_loss)
    loss_fn = sft_loss(head)
    for _ in range(30):
        rows = [rng.integers(2, VOCAB, 17, dtype=np.int32) for _ in range(3)]
        batch = sequence_batch(rows, length_bucket=16)
        loss, _ = ours.accumulate(to_device(batch), loss_fn)
        ours.apply()
        # Lengths without padding: default_loss counts a padding token where there is one.
        lengths = mx.array([[0, 17]] * 3)
        (wanted, count), grads = theirs(models[1], mx.array(np.stack(rows)), lengths)
        adam.update(models[1], grads)
        mx.eval(models[1].parameters(), adam.state)
        assert count.item() == batch.mask.sum()
        assert loss.item() == pytest.approx(wanted.item(), rel=tolerance, abs=0.0)
    if not tolerance:
        right = trainable(models[1])
        assert all(mx.array_equal(a, right[name]) for name, a in trainable(models[0]).items())


def test_sft_stays_within_rounding_of_a_loop_over_mlx_alone():
    """MLX's own AdamW takes 1 - beta**t in float32, 1.3e-5 off at first; nothing else differs."""
    rows = np.random.default_rng(4).integers(2, VOCAB, (30, 3, 17), dtype=np.int32)
    settings = OptimizerSettings(
        learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0
    )
    models = [lora_model(), lora_model()]
    ours = Step(models[0], settings, total_steps=30, compiled=False)
    adam = optim.AdamW(learning_rate=1e-3, weight_decay=0.0, bias_correction=True)
    theirs = nn.value_and_grad(models[1], default_loss)
    for batch in rows:
        arrays = to_device(sequence_batch(list(batch), length_bucket=16))
        loss, _ = ours.accumulate(arrays, sft_loss("full"))
        ours.apply()
        (wanted, _), grads = theirs(models[1], mx.array(batch), mx.array([[0, 17]] * 3))
        adam.update(models[1], grads)
        mx.eval(models[1].parameters(), adam.state)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.slow  # `nll` writes its sum twice, which mx.compile merges: metrics must survive it
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_compiled_equals_eager(kind):
    arrays: Any = {**to_device(ragged_batch()), "count": mx.array(50.0)}
    results = []
    for compiled in (False, True):
        model = tiny_model()
        mx.random.seed(9)
        attach_adapters(model, ModelSettings(fine_tune_type=kind))
        step = Step(model, OptimizerSettings(learning_rate=1e-3), total_steps=9, compiled=compiled)
        updates = []
        for _ in range(3):
            for rows in (slice(0, 2), slice(2, 4)):
                step.accumulate({k: v if v.ndim == 0 else v[rows] for k, v in arrays.items()}, nll)
            updates.append(step.apply())
        results.append((updates, trainable(model)))
    assert results[0][0] == results[1][0]
    assert all(mx.array_equal(a, results[1][1][name]) for name, a in results[0][1].items())


def test_the_model_keeps_no_traces_and_its_own_names():
    model = lora_model()
    before = trainable(model)
    step = Step(model, OptimizerSettings(), total_steps=1, compiled=False)
    step.accumulate({**to_device(ragged_batch()), "count": mx.array(50.0)}, nll)
    after = trainable(model)
    assert after.keys() == before.keys() == step.gradients().keys()
    assert all(after[name] is before[name] for name in before)
    assert tree_unflatten(list(after.items())).keys() == {"model"}


def test_random_state_goes_back():
    mx.random.seed(123)
    mx.random.uniform(shape=(2,))
    state = random_state()
    first = mx.random.uniform(shape=(4,))
    set_random_state(state)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), first)


def test_compile_settings():
    assert should_compile("on")
    assert not should_compile("off")
    assert should_compile("auto") == (mx.default_device().type == mx.DeviceType.gpu)


def test_the_bias_corrections_are_exact_in_float32():
    """The first update is the learning rate times g / (|g| + eps); MLX's own is 6e-6 shorter."""
    moved = []
    for kind in (ExactAdamW, partial(optim.AdamW, bias_correction=True)):
        model = Weights([0.0, 0.0])
        kind(learning_rate=1.0, weight_decay=0.0).update(model, {"w": mx.array([2.0, -3.0])})
        moved.append(np.array(model.w))
    np.testing.assert_allclose(moved[0], [-1.0, 1.0], rtol=3e-7)
    assert np.abs(np.abs(moved[1]) - 1).min() > 5e-6
