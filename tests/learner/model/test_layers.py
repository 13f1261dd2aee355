"""The ordered backward pass and gradient checkpointing: exact, and undone afterwards."""

from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from learner.model.batches import to_device
from learner.model.layers import layer_by_layer
from learner.model.logprobs import completion_logprobs
from protocol.errors import ModelError
from protocol.model.snapshots import trainable
from tests.learner.model.heads import assert_close, gradients, trained
from tests.tiny import ragged_batch, tiny_model


def layers_of(model):
    return list(model.layers)


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
