"""Log-probs, entropies and their gradients against a plain log-softmax over all logits."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from learner.model import chunked
from learner.model.batches import TokenArrays, to_device
from learner.model.logprobs import Head, completion_logprobs
from protocol.model.snapshots import trainable
from tests.learner.model.heads import CASES, HEADS, assert_close, gradients, plain, trained
from tests.tiny import ragged_batch


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 24)  # 128 targets: six chunks, the last shorter


def logprobs_of(model: nn.Module, *, arrays: TokenArrays, head: Head, entropy: bool):
    return completion_logprobs(
        model,
        arrays["input_ids"],
        arrays["positions"],
        arrays["targets"],
        head=head,
        entropy=entropy,
    )


@pytest.mark.parametrize("case", CASES)
def test_chunked_head_equals_log_softmax(case):
    model, arrays = CASES[case](), to_device(ragged_batch(bucket=32))
    ids = arrays["input_ids"], arrays["positions"], arrays["targets"]

    def chunked(model):
        return completion_logprobs(
            model, *ids, temperature=0.7, head="chunked", entropy_gradient=True
        )

    expected = plain(model, arrays, 0.7)
    for got in (
        chunked(model),
        completion_logprobs(model, *ids, temperature=0.7, entropy=True, gradient=False),
        completion_logprobs(model, *ids, temperature=0.7, entropy=True, head="full"),
    ):
        for value, wanted in zip(got[:2], expected, strict=True):
            assert value.dtype == mx.float32
            np.testing.assert_allclose(value, wanted, rtol=2e-6, atol=5e-6)
    value, grads = gradients(model, arrays, chunked)
    wanted, wanted_grads = gradients(model, arrays, lambda model: plain(model, arrays, 0.7))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert_close(grads, wanted_grads, 5e-6)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_entropy_without_gradient_leaves_the_log_prob_gradient_alone(kind):
    model, arrays = trained(kind), to_device(ragged_batch())
    by_head = {}
    for head in HEADS:
        with_entropy, without = (
            gradients(
                model, arrays, partial(logprobs_of, arrays=arrays, head=head, entropy=entropy)
            )[1]
            for entropy in (True, False)
        )
        assert_close(with_entropy, without, 0.0)
        by_head[head] = without
    assert_close(by_head["chunked"], by_head["full"], 5e-6)


def test_gradients_against_finite_differences():
    model, arrays = trained("full", tie_word_embeddings=False), to_device(ragged_batch())
    ids = arrays["input_ids"], arrays["positions"], arrays["targets"]

    def forward(model):
        return completion_logprobs(model, *ids, temperature=1.3, entropy_gradient=True)

    _, grads = gradients(model, arrays, forward)
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        start = trainable(model)[name]
        direction = grads[name] / mx.linalg.norm(grads[name])
        values = []
        for step in (1e-2, -1e-2):
            model.load_weights([(name, start + step * direction)], strict=False)
            values.append(gradients(model, arrays, forward)[0].item())
        model.load_weights([(name, start)], strict=False)
        slope = (values[0] - values[1]) / 2e-2
        assert slope == pytest.approx(mx.linalg.norm(grads[name]).item(), rel=5e-3), name


def test_padding_changes_nothing():
    model = trained("lora")
    logprobs = {}
    for bucket in (1, 8, 32):
        batch = ragged_batch(bucket=bucket)
        arrays = to_device(batch)
        values, entropies, *_ = completion_logprobs(
            model, arrays["input_ids"], arrays["positions"], arrays["targets"], entropy=True
        )
        assert mx.isfinite(values).all().item()
        assert mx.isfinite(entropies).all().item()
        logprobs[bucket] = np.array(values)[batch.mask > 0]
    np.testing.assert_allclose(logprobs[8], logprobs[1], rtol=0, atol=5e-6)
    np.testing.assert_allclose(logprobs[32], logprobs[1], rtol=0, atol=5e-6)


def test_extreme_logits_stay_finite():
    model = trained("full", tie_word_embeddings=False)
    model.load_weights([("lm_head.weight", trainable(model)["lm_head.weight"] * 1e4)], strict=False)
    arrays = to_device(ragged_batch())
    ids = arrays["input_ids"], arrays["positions"], arrays["targets"]
    value, grads = gradients(
        model, arrays, lambda m: completion_logprobs(m, *ids, entropy_gradient=True)
    )
    assert mx.isfinite(value).item()
    assert all(mx.isfinite(array).all().item() for array in grads.values())


def test_bfloat16_logits_become_float32_as_the_sampler_sees_them():
    model = trained("lora")
    model.set_dtype(mx.bfloat16)
    arrays = to_device(ragged_batch())
    ids = arrays["input_ids"], arrays["positions"], arrays["targets"]
    logits = model(arrays["input_ids"])
    assert logits.dtype == mx.bfloat16
    scaled = logits.astype(mx.float32) * (1 / 0.7)
    logs = scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)
    logs = mx.take_along_axis(logs, arrays["positions"][..., None], axis=1)
    wanted = mx.take_along_axis(logs, arrays["targets"][..., None], axis=-1).squeeze(-1)
    got, *_ = completion_logprobs(model, *ids, temperature=0.7, gradient=False)
    assert got.dtype == mx.float32
    # The head sees another number of tokens at once, which changes how bfloat16 logits are rounded.
    difference = mx.abs(got - wanted) * arrays["mask"]
    assert float(difference.max()) < 0.1
    assert float(difference.sum() / arrays["mask"].sum()) < 0.01
