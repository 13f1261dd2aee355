"""Small models with every kind of head, and gradients of their scores."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from learner.model.logprobs import Head
from protocol.config.settings import LoraSettings, ModelSettings
from protocol.model.adapters import attach_adapters
from protocol.model.snapshots import trainable
from tests.tiny import tiny_model

GEMMA2 = {
    "model_type": "gemma2",
    "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 50.0,
    "query_pre_attn_scalar": 32.0,
}
COHERE = {
    "model_type": "cohere",
    "logit_scale": 0.25,
    "layer_norm_eps": 1e-5,
    "layer_norm_bias": False,
}
HELIUM = {"model_type": "helium", "attention_bias": False, "mlp_bias": False}
PHI = {"model_type": "phi", "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5}

HEADS: tuple[Head, ...] = ("chunked", "full")


def trained(kind, *, bits=0, keys=None, **changes):
    model = tiny_model(**changes)
    if bits:
        nn.quantize(model, 32, bits)
    settings = ModelSettings(fine_tune_type=kind, lora=LoraSettings(keys=keys, rank=4))
    attach_adapters(model, settings)
    mx.random.seed(1)
    for name, array in trainable(model).items():
        if name.endswith("lora_b"):
            model.load_weights([(name, mx.random.normal(array.shape) * 0.1)], strict=False)
    return model


def plain(model, arrays, temperature):
    """Return log-probs and entropies by log-softmax over all logits."""
    logits = model(arrays["input_ids"]).astype(mx.float32) / temperature
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    logs = mx.take_along_axis(logs, arrays["positions"][..., None], axis=1)
    logprobs = mx.take_along_axis(logs, arrays["targets"][..., None], axis=-1).squeeze(-1)
    return logprobs, -(mx.exp(logs) * logs).sum(axis=-1)


def gradients(model, arrays, forward):
    """Return gradients of randomly weighted log-probs and entropies: no two tokens count alike."""
    mx.random.seed(2)
    weights = mx.random.normal((2, *arrays["mask"].shape)) * arrays["mask"]

    def loss(model):
        logprobs, entropies, *_ = forward(model)
        return (logprobs * weights[0]).sum() + (entropies * weights[1]).sum()

    value, tree = nn.value_and_grad(model, loss)(model)
    return value, dict(tree_flatten(tree))


def assert_close(left, right, tolerance):
    assert left.keys() == right.keys()
    for name in left:
        scale = mx.abs(right[name]).max().item() + 1e-6
        assert mx.abs(left[name] - right[name]).max().item() <= tolerance * scale, name


CASES = {
    "lora": lambda: trained("lora"),
    "lora, 4 bits": lambda: trained("lora", bits=4),
    "lora, untied": lambda: trained("lora", tie_word_embeddings=False),
    "lora, untied, 4 bits": lambda: trained("lora", bits=4, tie_word_embeddings=False),
    "dora": lambda: trained("dora"),
    "full, tied": lambda: trained("full"),
    "full, untied": lambda: trained("full", tie_word_embeddings=False),
    "full, 4 bits": lambda: trained("full", bits=4),
    "lora on the head": lambda: trained(
        "lora", keys=["self_attn.q_proj", "lm_head"], tie_word_embeddings=False
    ),
    "lora on the embedding": lambda: trained("lora", keys=["model.embed_tokens"]),
    "llama": lambda: trained("lora", model_type="llama"),
    "soft cap": lambda: trained("lora", **GEMMA2),
    "soft cap, full": lambda: trained("full", **GEMMA2),
    "logit scale": lambda: trained("lora", **COHERE),
    "tied beside a head that is not read": lambda: trained("full", **HELIUM),
    "a trunk that asks for a cache": lambda: trained("full", **PHI),
}
