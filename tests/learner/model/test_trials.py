"""Which models may run their head apart or compute a prompt once; why not is in the log."""

import logging
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers

from learner.model.batches import to_device
from learner.model.logprobs import Head, completion_logprobs
from learner.model.trials import choose_head, choose_shared_prompt
from protocol.config.settings import ModelSettings
from protocol.model.adapters import attach_adapters
from protocol.model.snapshots import trainable
from tests.architectures import build
from tests.learner.model.heads import CASES, plain
from tests.tiny import VOCAB, ragged_batch, tiny_model


def choose(
    models: list[nn.Module],
    wanted: Literal["auto", "on", "off"] = "auto",
    *,
    head: Head = "chunked",
    recompute=False,
    compiled=False,
):
    return choose_shared_prompt(
        models, wanted, head=head, gradient_checkpointing=recompute, compiled=compiled
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_models_that_attend_through_their_caches_are_chosen(kind, dtype, recompute, caplog):
    model = tiny_model()
    attach_adapters(model, ModelSettings(fine_tune_type=kind))
    model.set_dtype(dtype)
    model.train()
    reference = tiny_model()
    reference.freeze()
    before = trainable(model)
    with caplog.at_level(logging.INFO):
        assert choose([model, reference], recompute=recompute)
        assert choose([model, reference], recompute=recompute, head="full")
        assert not choose([model, reference], "off")
    assert not caplog.records
    assert (model.training, reference.training) == (True, False)
    after = trainable(model)
    assert after.keys() == before.keys()
    assert all(after[name] is array for name, array in before.items())


def test_on_cuda_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("learner.model.trials._on_cuda", lambda: True)
    assert not choose([tiny_model()])
    assert choose([tiny_model()], "on")


def windowed():
    types = ["full_attention", "sliding_attention"]
    return tiny_model(model_type="llama", layer_types=types, sliding_window=4)


def dropping():
    model = tiny_model()
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 4, "scale": 2.0, "dropout": 0.1})
    return model


def changed_attention(change):
    """Make a model whose last layer uses its cache in another way than the others."""
    model: Any = tiny_model(num_hidden_layers=3)
    attention = model.layers[-1].self_attn
    kind = type(attention)

    def call(self, x, mask=None, cache=None):
        return kind.__call__(self, x, *change(mask, cache))

    attention.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return model


class Elsewhere:
    """A cache that reports another position."""

    def __init__(self, cache):
        self.offset = 0
        self.update_and_fetch = cache.update_and_fetch


class Cut:
    """A cache whose keys and values of the prompt get no gradient."""

    def __init__(self, cache):
        self.offset = cache.offset
        self.update_and_fetch = lambda *own: tuple(
            mx.concatenate([mx.stop_gradient(both[..., :-8, :]), both[..., -8:, :]], axis=-2)
            for both in cache.update_and_fetch(*own)
        )


def with_mask(mask, cache):
    return ("causal" if cache else mask), cache


def with_elsewhere(mask, cache):
    return mask, Elsewhere(cache) if cache else None


def with_cut(mask, cache):
    return mask, Cut(cache) if cache else None


def with_nothing(mask, _):
    return (mask if isinstance(mask, str) else "causal"), None


OBSTACLES = {
    "windows": (windowed, "RotatingKVCache"),
    "recurrent": (partial(build, "mamba"), "ArraysCache"),
    "dropout": (dropping, "dropout"),
    "own mask": (partial(changed_attention, with_mask), "log-probs differ by"),
    "own positions": (partial(changed_attention, with_elsewhere), "log-probs differ by"),
    "no gradient": (partial(changed_attention, with_cut), "gradients differ by"),
    "no cache": (partial(changed_attention, with_nothing), "has written nothing to its cache"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_other_models_keep_whole_sequences_and_the_log_says_why(case, caplog):
    make, reason = OBSTACLES[case]
    with caplog.at_level(logging.INFO):
        assert not choose([tiny_model(), make()])
    assert "is computed again for each completion of a group" in caplog.text
    assert reason in caplog.text


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


@pytest.mark.parametrize("case", CASES)
def test_models_that_can_be_split_keep_the_chunked_head(case):
    assert choose_head(CASES[case](), "chunked") == "chunked"


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
