"""Models whose caches are not the plain one: sliding windows, states, caches that do not merge."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gemma3_text, llama, mamba
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache

from actors.engine.base import GenerationRequest
from protocol.messages.arrays import floats_view
from protocol.messages.parts import Sampling
from tests.actors.engine.alone import alone_logprobs
from tests.actors.engine.engines import VOCAB, engine_of, sharpen
from tests.actors.engine.engines import run as run_out


def sliding_window() -> nn.Module:
    mx.random.seed(0)
    args = gemma3_text.ModelArgs(
        model_type="gemma3_text",
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        query_pre_attn_scalar=8,
        sliding_window=4,
        sliding_window_pattern=3,
    )
    return gemma3_text.Model(args)


def state_space() -> nn.Module:
    mx.random.seed(0)
    args = mamba.ModelArgs(
        model_type="mamba",
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        state_size=4,
        num_hidden_layers=2,
        conv_kernel=4,
        use_bias=False,
        use_conv_bias=True,
        time_step_rank=2,
    )
    return mamba.Model(args)


class Llama(llama.Model):
    """A llama with caches of another kind."""

    def __init__(self, make) -> None:
        super().__init__(
            llama.ModelArgs(
                model_type="llama",
                hidden_size=64,
                num_hidden_layers=2,
                intermediate_size=64,
                num_attention_heads=2,
                num_key_value_heads=1,
                rms_norm_eps=1e-5,
                vocab_size=VOCAB,
            )
        )
        self._make = make

    def make_cache(self):
        return [self._make() for _ in self.layers]


def quantised_cache() -> nn.Module:
    mx.random.seed(0)
    return sharpen(Llama(lambda: QuantizedKVCache(group_size=32, bits=8)))


def pinned_window() -> nn.Module:
    mx.random.seed(0)
    return sharpen(Llama(lambda: RotatingKVCache(max_size=64, keep=4)))


def run(model: nn.Module, requests: list[GenerationRequest], rows: int = 16):
    engine = engine_of(model, stop_token_ids=[], max_concurrent_completions=rows)
    for request in requests:
        engine.add(request)
    return run_out(engine)


def request(key: str, prompt: list[int], seed: int, **kwargs) -> GenerationRequest:
    sampling = Sampling(**({"num_generations": 3, "max_completion_length": 8} | kwargs))
    return GenerationRequest(key=key, prompt_ids=prompt, sampling=sampling, seed=seed)


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [(sliding_window, 5e-5), (state_space, 5e-5), (quantised_cache, 5e-3), (pinned_window, 5e-5)],
)
def test_rows_of_any_cache_decode_as_they_would_alone(make, tolerance):
    model = make()
    prompts = {"a": [3, 9, 14, 2, 31, 8, 8, 1], "b": [5], "c": [7, 6, 5]}
    requests = [request(key, prompt, seed) for seed, (key, prompt) in enumerate(prompts.items())]
    together = run(model, requests, rows=7)
    for key, prompt in prompts.items():
        for completion in together[key].completions:
            np.testing.assert_allclose(
                floats_view(completion.sampling_logprobs),
                alone_logprobs(model, prompt, completion),
                atol=tolerance,
            )
    alone = run(model, requests[:1])["a"].completions
    assert [c.token_ids for c in alone] == [c.token_ids for c in together["a"].completions]
