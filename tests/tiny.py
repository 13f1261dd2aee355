"""Tiny models and token batches for tests, made on the spot from a seed."""

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from learner.model.batches import TokenBatch, token_batch
from protocol.model.snapshots import named_arrays

VOCAB = 64
MOST_PARAMETERS = 4_000_000

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def tiny_model(seed: int = 0, **changes: object) -> nn.Module:
    """Make a model of CONFIG with `changes`, in float32 and eval mode."""
    return random_model({**CONFIG, **changes}, seed)


def random_model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Make a model of mlx-lm's `config` with random weights, in float32 and eval mode."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(seed)
    # Some types write into what they are given.
    model = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))

    size = sum(array.size for array in tensors(model).values())
    if size > MOST_PARAMETERS:  # a setting kept its default; nothing is allocated yet
        raise ValueError(f"a tiny {config['model_type']} has {size:,} parameters")

    # Small weights give nearly equal logits, which hide faults.
    for name, array in tensors(model).items():
        if array.ndim > 1:
            model.load_weights([(name, mx.random.normal(array.shape) * 0.2)], strict=False)
    model.set_dtype(mx.float32)
    model.eval()
    mx.eval(model.parameters())
    return model


def tensors(model: nn.Module) -> dict[str, mx.array]:
    """Return every tensor of `model` by name."""
    return named_arrays(model.parameters())


def write_model_folder(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write a tiny model with a tokenizer of VOCAB words as mlx-lm reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    model = tiny_model(seed, **changes)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        tensors(model),
        metadata={"format": "mlx"},
    )
    (folder / "config.json").write_text(json.dumps(config))
    words = {"<pad>": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<eos>",
                "pad_token": "<pad>",
            }
        )
    )
    return folder


def ragged_batch(seed: int = 0, bucket: int = 8) -> TokenBatch:
    """Make four rows of mixed lengths, one with a completion of a single token."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, VOCAB, n, dtype=np.int32) for n in (5, 2, 9, 1)]
    completions = [rng.integers(2, VOCAB, n, dtype=np.int32) for n in (7, 30, 1, 12)]
    return token_batch(prompts, completions, length_bucket=bucket)
