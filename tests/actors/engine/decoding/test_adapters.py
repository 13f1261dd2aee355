"""Stacked adapters: which layers are stacked, that they compute the same, and what they share."""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import qwen2
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from actors.engine.decoding.adapters import stack_adapters, unstack_adapters

TOKENS = mx.array([[3, 9, 14, 2, 31]])


def adapted(*, bits: int = 0, scale: float = 1.7) -> nn.Module:
    """Make a Qwen2, whose q, k and v have biases, with adapters that change its output."""
    mx.random.seed(0)
    model = qwen2.Model(
        qwen2.ModelArgs(
            model_type="qwen2",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            vocab_size=50,
            rope_theta=1e4,
            tie_word_embeddings=True,
        )
    )
    for layer in model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = layer.self_attn[name]
            projection.bias = mx.random.normal(projection.bias.shape)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": scale, "dropout": 0.0})
    randomise(model)
    model.eval()
    return model


def randomise(model: nn.Module) -> None:
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape) * 0.3
    mx.eval(model.parameters())


@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize("bits", [0, 8])
def test_stacks_compute_what_the_layers_did_also_after_new_adapters(join: bool, bits: int):
    model = adapted(bits=bits)
    plain = np.array(model(TOKENS))
    stacks = stack_adapters(model, join=join)
    # Per block: q, k and v; the output; gate and up; down.
    assert [len(stack.state["b"]) for stack in stacks] == [12, 4, 8, 4] * 2
    np.testing.assert_allclose(model(TOKENS), plain, atol=2e-5)

    randomise(model)
    for stack in stacks:
        stack.refresh()
    changed = np.array(model(TOKENS))
    assert np.abs(changed - plain).max() > 0.1
    unstack_adapters(model)
    np.testing.assert_allclose(model(TOKENS), changed, atol=2e-5)


def test_the_tree_keeps_its_names_and_its_weights_are_slices_of_the_stacks():
    model = adapted()
    before = {name: np.array(array) for name, array in parameters(model).items()}
    stack = stack_adapters(model, join=True)[0]
    after = parameters(model)
    assert set(after) == set(before)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    attention = cast(Any, model).layers[0].self_attn
    rows = np.concatenate(
        [attention[name].linear.weight for name in ("q_proj", "k_proj", "v_proj")]
    )
    np.testing.assert_array_equal(stack.state["weight"][: len(rows)], rows)


def parameters(model: nn.Module) -> dict[str, mx.array]:
    found = {}
    for path, module in model.named_modules():
        for name, value in module.items():
            if isinstance(value, mx.array):
                found[f"{path}.{name}"] = value
    return found


def lora(scale: float) -> LoRALinear:
    layer = LoRALinear(8, 8, r=2, scale=scale)
    layer.lora_b = mx.random.normal((2, 8))
    return layer


class TwoPaths(nn.Module):
    """Layers on one array, on another one, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.other, self.twice = (lora(2.0) for _ in range(4))
        self.scaled = lora(3.0)
        self.embedding = nn.Embedding(4, 8)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embedding(tokens)
        y = x + 1
        both = self.one(x) + self.two(x) + self.scaled(x)
        return both + self.other(y) + self.twice(x) + self.twice(y)


def test_only_layers_of_one_kind_on_one_array_are_stacked():
    mx.random.seed(3)
    model = TwoPaths()
    tokens = mx.array([[1, 2]])
    plain = np.array(model(tokens))
    stacks = stack_adapters(model, join=True)
    assert [len(stack.state["b"]) for stack in stacks] == [4, 2, 2]  # one and two; scaled; other
    assert type(model.twice) is LoRALinear
    np.testing.assert_allclose(model(tokens), plain, atol=1e-5)
