"""Which policy samples which token: swaps between steps, least and pinned versions."""

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from protocol.errors import ModelError
from protocol.messages.arrays import floats_view
from tests.actors.engine.engines import (
    engine_of,
    reference_logprobs,
    request,
    run,
    tiny_llama,
    tokens,
)


@dataclass
class Swapper:
    """Two sets of weights of one shape, and a model that holds either."""

    model: nn.Module = field(default_factory=tiny_llama)
    other: nn.Module = field(default_factory=lambda: tiny_llama(1))

    def apply(self) -> None:
        self.model.update(self.other.parameters())


def test_spans_say_which_weights_drew_each_token():
    old, swapper = tiny_llama(), Swapper()
    engine = engine_of(swapper.model, stop_token_ids=[])
    prompt = [3, 9, 14, 2, 31]
    engine.add(request("a", prompt, num_generations=2))
    for _ in range(5):
        assert engine.step().tokens == 2
    engine.set_policy(swapper.apply, 1, "d1")
    result = run(engine)["a"]
    for completion in result.completions:
        # Five tokens were delivered and the sixth drawn before the swap.
        assert [(s.start, s.version, s.digest) for s in completion.policy_spans] == [
            (0, 0, "d0"),
            (6, 1, "d1"),
        ]
        ids = tokens(completion)
        logprobs = floats_view(completion.sampling_logprobs)
        expected = reference_logprobs(old, prompt, ids, 1.0)
        np.testing.assert_allclose(logprobs[:6], expected[:6], atol=2e-5)
        # From the seventh on: new weights over the old keys and values.
        cache = _cache(old, prompt + ids[:5])
        logits = swapper.other(mx.array([ids[5:]]), cache=cache)[0]
        new = nn.log_softmax(logits.astype(mx.float32), axis=-1)
        expected_new = np.array(new[mx.arange(len(ids) - 6), mx.array(ids[6:])])
        np.testing.assert_allclose(logprobs[6:], expected_new, atol=2e-5)


def _cache(model: nn.Module, ids: list[int]):
    cache = make_prompt_cache(model)
    model(mx.array([ids]), cache=cache)
    return cache


def test_rows_that_had_not_started_are_prefilled_again_after_a_swap():
    swapper = Swapper()
    engine = engine_of(swapper.model, max_concurrent_completions=2, stop_token_ids=[])
    engine.add(request("a", num_generations=4, max_completion_length=3))
    engine.step()
    engine.set_policy(swapper.apply, 1, "d1")
    late = run(engine)["a"].completions[2:]
    for completion in late:
        assert [s.version for s in completion.policy_spans] == [1]
        expected = reference_logprobs(swapper.other, [3, 9, 14, 2, 31], tokens(completion), 1.0)
        np.testing.assert_allclose(floats_view(completion.sampling_logprobs), expected, atol=2e-5)


def test_nothing_is_sampled_below_the_least_version():
    engine = engine_of(tiny_llama(), version=-1)
    engine.add(request("a", min_policy_version=2))
    assert run(engine) == {}
    engine.set_policy(lambda: None, 1, "d1")
    assert run(engine) == {}
    engine.set_policy(lambda: None, 2, "d2")
    spans = [s for c in run(engine)["a"].completions for s in c.policy_spans]
    assert {s.version for s in spans} == {2}


def test_pinned_requests_defer_the_swap():
    engine = engine_of(tiny_llama())
    engine.add(request("later", pinned_version=1))
    engine.add(request("now", pinned_version=0))
    assert not engine.wants_policy(1)
    with pytest.raises(ModelError, match="requests pinned to a version must finish first"):
        engine.set_policy(lambda: None, 1, "d1")
    results = run(engine)
    assert list(results) == ["now"]
    assert engine.wants_policy(1)
    assert not engine.wants_policy(2)
    engine.set_policy(lambda: None, 1, "d1")
    spans = [s for c in run(engine)["later"].completions for s in c.policy_spans]
    assert {s.version for s in spans} == {1}
    with pytest.raises(ModelError, match="pinned to policy version 0, but the engine is"):
        engine.add(request("never", pinned_version=0))


def test_reset_forgets_requests_and_version():
    engine = engine_of(tiny_llama(), version=3)
    engine.add(request("a"))
    engine.step()
    engine.reset()
    assert engine.wants_policy(0)
    assert engine.free_completions == 32
    assert run(engine) == {}
    assert engine.wants_policy(0)
