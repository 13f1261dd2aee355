"""Log-probs, entropies and their gradients against a plain log-softmax over all logits."""

import logging
from functools import partial
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from learner.model import chunked
from learner.model.batches import TokenArrays, to_device
from learner.model.logprobs import Head, choose_head, completion_logprobs, layer_by_layer
from protocol.errors import ModelError
from protocol.model.snapshots import trainable
from tests.learner.model.heads import CASES, HEADS, assert_close, gradients, trained
from tests.tiny import VOCAB, ragged_batch, tiny_model


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 24)  # 128 targets: six chunks, the last shorter


def layers_of(model):
    return list(model.layers)


def plain(model, arrays, temperature):
    """Log-probs and entropies by log-softmax of all logits."""
    logits = model(arrays["input_ids"]).astype(mx.float32) / temperature
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    logs = mx.take_along_axis(logs, arrays["positions"][..., None], axis=1)
    logprobs = mx.take_along_axis(logs, arrays["targets"][..., None], axis=-1).squeeze(-1)
    return logprobs, -(mx.exp(logs) * logs).sum(axis=-1)


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
    assert choose_head(model, "chunked") == "chunked"

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
    # The head sees another number of rows at once, which moves bfloat16 roundings of the logits.
    difference = mx.abs(got - wanted) * arrays["mask"]
    assert float(difference.max()) < 0.1
    assert float(difference.sum() / arrays["mask"].sum()) < 0.01


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full", "last"])
def test_the_ordered_backward_pass_is_exact_and_leaves_no_trace(kind, recompute):
    model, arrays = trained("lora" if kind == "last" else kind), to_device(ragged_batch())
    if kind == "last":  # layers with nothing to train
        for layer in layers_of(model)[:-1]:
            layer.freeze()
    ids = arrays["input_ids"], arrays["positions"], arrays["targets"]

    def forward(model):
        return completion_logprobs(model, *ids, entropy_gradient=True)

    classes = [type(layer) for layer in layers_of(model)]
    before = trainable(model)
    _, wanted = gradients(model, arrays, forward)
    with layer_by_layer(model, recompute=recompute):
        assert [type(layer) for layer in layers_of(model)] != classes
        _, grads = gradients(model, arrays, forward)
    assert_close(grads, wanted, 1e-6)
    assert [type(layer) for layer in layers_of(model)] == classes
    assert trainable(model).keys() == before.keys()
    assert all(mx.array_equal(array, before[name]) for name, array in trainable(model).items())


class Mixed(nn.Module):
    """A layer that reads arrays from a tuple and from a keyword, and returns two."""

    def __init__(self):
        super().__init__()
        self.weight = mx.array([[0.5, -1.0], [2.0, 0.25]])

    def __call__(self, x, pair, *, extra):
        ids, scale = pair
        return mx.tanh(x @ self.weight) * scale[ids], x * extra


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Mixed(), Mixed()]

    def __call__(self, x):
        ids, scale = mx.array([1, 0]), x.sum(axis=-1, keepdims=True)
        for layer in self.layers:
            left, right = layer(x, (ids, scale), extra=x * x)
            x = left + right
        return x


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_pass_through_every_array_that_a_layer_is_given(recompute):
    model, x = Stack(), mx.array([[0.3, -0.2], [0.1, 0.7]])

    def grads():
        def loss(parameters, x):
            model.update(parameters)
            return (model(x) * mx.array([[1.0, -2.0], [0.5, 3.0]])).sum()

        found = mx.grad(loss, argnums=(0, 1))(model.trainable_parameters(), x)
        return dict(cast("list[tuple[str, mx.array]]", tree_flatten(found)))

    wanted = grads()
    with layer_by_layer(model, recompute=recompute):
        got = grads()
    assert got.keys() == wanted.keys()
    for name, array in got.items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-6)


def test_checkpointing_with_dropout_is_refused():
    model = tiny_model()
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 4, "scale": 2.0, "dropout": 0.1})
    ordered = layer_by_layer(model, recompute=True)
    with pytest.raises(ModelError, match=r"needs model\.lora\.dropout = 0"), ordered:
        pass


class Headless(nn.Module):
    """A model without a trunk."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)

    def __call__(self, tokens):
        return self.table(tokens)


class Biased(nn.Module):
    """A model whose logits need more than the hidden states."""

    def __init__(self):
        super().__init__()
        self.model = nn.Embedding(VOCAB, 8)
        self.lm_head = nn.Linear(8, VOCAB)

    def __call__(self, tokens):
        return self.lm_head(self.model(tokens)) + tokens.sum() / 1000


@pytest.mark.parametrize("kind", [Headless, Biased])
def test_models_that_cannot_be_split_take_the_plain_way_and_say_so(kind, caplog):
    model = kind()
    with caplog.at_level(logging.WARNING):
        assert choose_head(model, "chunked") == "full"
    assert "The memory-bounded head is off" in caplog.text
    arrays = to_device(ragged_batch())
    got, *_ = completion_logprobs(
        model, arrays["input_ids"], arrays["positions"], arrays["targets"], head="full"
    )
    np.testing.assert_allclose(got, plain(model, arrays, 1.0)[0], rtol=0, atol=5e-6)
