"""Engines over tiny random models in float32, requests to them, and what they should answer."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import llama

from actors.engine.base import GenerationRequest, GenerationResult
from actors.engine.mlx_engine import MlxEngine
from protocol.messages.arrays import ids_view
from protocol.messages.parts import Completion, Sampling

VOCAB = 50
STOP = 7


def sharpen(model: nn.Module) -> nn.Module:
    """Make the distributions uneven, by larger weights, so that a wrong row or position shows."""
    model.update(tree_map(lambda w: w * 3 if w.ndim > 1 else w, model.parameters()))
    mx.eval(model.parameters())
    return model


def tiny_llama(seed: int = 0) -> nn.Module:
    """Make a llama of VOCAB tokens."""
    mx.random.seed(seed)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=VOCAB,
            tie_word_embeddings=False,
        )
    )
    return sharpen(model)


def engine_of(model: nn.Module, *, version: int = 0, **kwargs) -> MlxEngine:
    """Make an engine with a policy in force, unless `version` is negative."""
    kwargs = {
        "stop_token_ids": [STOP],
        "vocab_size": VOCAB,
        "max_concurrent_completions": 32,
    } | kwargs
    engine = MlxEngine(model, **kwargs)
    if version >= 0:
        engine.set_policy(lambda: None, version, f"d{version}")
    return engine


def request(key: str, prompt: list[int] | None = None, *, seed: int = 1, **kwargs):
    """Make a request of four completions of at most twelve tokens."""
    policy = {k: kwargs.pop(k) for k in ("min_policy_version", "pinned_version") if k in kwargs}
    sampling = Sampling(**({"num_generations": 4, "max_completion_length": 12} | kwargs))
    prompt = prompt or [3, 9, 14, 2, 31]
    return GenerationRequest(key=key, prompt_ids=prompt, sampling=sampling, seed=seed, **policy)


def run(engine: MlxEngine, steps: int = 500) -> dict[str, GenerationResult]:
    """EngineStep until nothing moves; return the groups by key."""
    results: dict[str, GenerationResult] = {}
    for _ in range(steps):
        step = engine.step()
        results.update({str(result.key): result for result in step.finished})
        if not step.made_progress:
            return results
    raise AssertionError("the engine did not come to rest")


def tokens(completion: Completion) -> list[int]:
    """Return a completion's token IDs."""
    return ids_view(completion.token_ids).tolist()


def all_tokens(result: GenerationResult) -> list[list[int]]:
    """Return the token IDs of a group."""
    return [tokens(completion) for completion in result.completions]


def reference_logprobs(model: nn.Module, prompt: list[int], completion: list[int], scale: float):
    """Return the log-probs (C,) of a completion from one pass over all its tokens."""
    logits = model(mx.array([prompt + completion]))[0].astype(mx.float32) * scale
    logprobs = nn.log_softmax(logits, axis=-1)
    rows = mx.arange(len(completion)) + len(prompt) - 1
    return np.array(logprobs[rows, mx.array(completion)])
