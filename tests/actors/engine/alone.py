"""What the engine's completions should be: decoded alone by mlx-lm, a token at a time."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from protocol.messages.arrays import floats_view
from protocol.messages.parts import Completion
from tests.actors.engine.engines import engine_of, reference_logprobs, request, run, tokens

PROMPTS = {"a": [3, 9, 14, 2, 31, 8, 8, 1], "b": [5], "c": [7, 6, 5]}


def alone_logprobs(model: nn.Module, prompt: list[int], completion: Completion) -> np.ndarray:
    """Return log-probs (C,) of a completion decoded by itself, read in the engine's chunks."""
    cache = make_prompt_cache(model)
    if len(prompt) > 1:
        model(mx.array([prompt[:-1]]), cache=cache)

    ids, found = tokens(completion), []
    for given, token in zip([prompt[-1], *ids], ids, strict=False):
        logits = model(mx.array([[given]]), cache=cache)[0, -1]
        found.append(nn.log_softmax(logits.astype(mx.float32))[token].item())
    return np.array(found)


def sampled(model: nn.Module, vocab_size: int) -> list[tuple[list[int], Completion]]:
    """Sample nine completions of three prompts in seven rows: some join when others have left."""
    engine = engine_of(
        model, vocab_size=vocab_size, stop_token_ids=[], max_concurrent_completions=7
    )
    for seed, (key, prompt) in enumerate(PROMPTS.items()):
        size = {"num_generations": 3, "max_completion_length": 6 + seed}
        engine.add(request(key, prompt, seed=seed, **size))
    results = run(engine)
    return [(PROMPTS[key], row) for key in PROMPTS for row in results[key].completions]


def differences(model: nn.Module, vocab_size: int) -> tuple[float, float]:
    """Return by how much log-probs of sampled tokens differ at most, in nats.

    First between the engine and decoding alone, then between decoding alone and one pass over the
    whole sequence without caches, as the learner makes it.
    """
    engine, learner = [0.0], [0.0]
    for prompt, completion in sampled(model, vocab_size):
        alone = alone_logprobs(model, prompt, completion)
        plain = reference_logprobs(model, prompt, tokens(completion), 1.0)
        engine.append(np.abs(floats_view(completion.sampling_logprobs) - alone).max())
        learner.append(np.abs(plain - alone).max())
    return float(max(engine)), float(max(learner))
