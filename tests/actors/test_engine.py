"""The engine on tiny random models, in float32."""

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

from actors.engine import GenerationRequest, GenerationResult
from actors.mlx_engine import MlxEngine
from protocol.arrays import floats_view, ids_view
from protocol.errors import DataError, ModelError
from protocol.parts import Completion, Sampling

VOCAB = 50
STOP = 7


def tiny_llama(seed: int = 0) -> nn.Module:
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
    # Larger weights make the distributions uneven, so that a wrong row or position shows.
    model.update(tree_map(lambda w: w * 3 if w.ndim > 1 else w, model.parameters()))
    mx.eval(model.parameters())
    return model


def engine_of(model: nn.Module, *, version: int = 0, **kwargs) -> MlxEngine:
    kwargs = {"stop_token_ids": [STOP], "vocab_size": VOCAB, "max_rows": 32} | kwargs
    engine = MlxEngine(model, **kwargs)
    if version >= 0:
        engine.set_policy(lambda: None, version, f"d{version}")
    return engine


def request(key: str, prompt: list[int] | None = None, *, seed: int = 1, **kwargs):
    policy = {k: kwargs.pop(k) for k in ("min_policy_version", "pinned_version") if k in kwargs}
    sampling = Sampling(**({"num_generations": 4, "max_completion_length": 12} | kwargs))
    prompt = prompt or [3, 9, 14, 2, 31]
    return GenerationRequest(key=key, prompt_ids=prompt, sampling=sampling, seed=seed, **policy)


def run(engine: MlxEngine, steps: int = 500) -> dict[str, GenerationResult]:
    results: dict[str, GenerationResult] = {}
    for _ in range(steps):
        step = engine.step()
        results.update({str(result.key): result for result in step.finished})
        if not step.progressed:
            return results
    raise AssertionError("the engine did not come to rest")


def tokens(completion: Completion) -> list[int]:
    return ids_view(completion.token_ids).tolist()


def all_tokens(result: GenerationResult) -> list[list[int]]:
    return [tokens(completion) for completion in result.completions]


def reference_logprobs(model: nn.Module, prompt: list[int], completion: list[int], scale: float):
    logits = model(mx.array([prompt + completion]))[0].astype(mx.float32) * scale
    logps = nn.log_softmax(logits, axis=-1)
    rows = mx.arange(len(completion)) + len(prompt) - 1
    return np.array(logps[rows, mx.array(completion)])


@pytest.mark.parametrize("prompt", [[5], [3, 9, 14, 2, 31]])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_behaviour_logprobs_are_those_of_a_full_forward(prompt, temperature):
    model = tiny_llama()
    engine = engine_of(model)
    engine.add(request("a", prompt, temperature=temperature, num_generations=16))
    result = run(engine)["a"]
    assert len(result.completions) == 16
    reasons = set()
    for completion in result.completions:
        ids = tokens(completion)
        expected = reference_logprobs(model, prompt, ids, 1 / temperature)
        np.testing.assert_allclose(
            floats_view(completion.behaviour_logprobs), expected, atol=2e-5, rtol=0
        )
        assert completion.kept_logmass == b""
        assert STOP not in ids[:-1]
        assert completion.finish_reason == ("stop" if ids[-1] == STOP else "length")
        assert ids[-1] == STOP or len(ids) == 12
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def test_greedy_takes_the_argmax_with_logprobs_at_temperature_one():
    model = tiny_llama()
    engine = engine_of(model)
    engine.add(request("a", temperature=0, num_generations=1))
    completion = run(engine)["a"].completions[0]
    ids, prompt = tokens(completion), [3, 9, 14, 2, 31]
    for t, token in enumerate(ids):
        assert int(mx.argmax(model(mx.array([prompt + ids[:t]]))[0, -1])) == token
    np.testing.assert_allclose(
        floats_view(completion.behaviour_logprobs),
        reference_logprobs(model, prompt, ids, 1.0),
        atol=2e-5,
    )


def test_the_same_task_gives_the_same_tokens_in_any_company():
    model = tiny_llama()
    alone = engine_of(model)
    alone.add(request("a", seed=5))
    expected = all_tokens(run(alone)["a"])
    assert len({tuple(ids) for ids in expected}) == 4  # completions have streams of their own

    others = [
        request("b", [4] * 11, seed=6, num_generations=7, temperature=0.5),
        request("c", [8], seed=7, num_generations=3, top_p=0.9, top_k=20),
        request("d", [1, 2], seed=8, num_generations=1, temperature=0),
    ]
    for order in ([0, 1, 2], [2, 1, 0]):
        engine = engine_of(model, max_rows=9)
        for i in order[:2]:
            engine.add(others[i])
        engine.step()
        engine.step()
        engine.add(request("a", seed=5))
        engine.step()
        engine.add(others[order[2]])
        assert all_tokens(run(engine)["a"]) == expected


def test_groups_larger_than_max_rows_are_split():
    model = tiny_llama()
    wide, narrow = engine_of(model), engine_of(model, max_rows=3)
    for engine in (wide, narrow):
        engine.add(request("a", num_generations=8))
    assert narrow.free_rows == 0
    assert all_tokens(run(narrow)["a"]) == all_tokens(run(wide)["a"])
    assert narrow.free_rows == 3


def test_filters_keep_their_mass_and_their_tokens():
    model = tiny_llama()
    engine = engine_of(model)
    engine.add(request("k", top_k=3, num_generations=8))
    engine.add(request("p", top_p=0.6, num_generations=8))
    engine.add(request("m", min_p=0.3, num_generations=8))
    engine.add(request("n", num_generations=2))
    results = run(engine)
    prompt = [3, 9, 14, 2, 31]
    for key in "kpm":
        for completion in results[key].completions:
            ids = tokens(completion)
            kept = floats_view(completion.kept_logmass)
            logits = np.array(model(mx.array([prompt + ids]))[0], dtype=np.float64)
            for t, token in enumerate(ids):
                p = np.exp(logits[len(prompt) - 1 + t])
                p = np.sort(p / p.sum())[::-1]
                chosen = np.exp(logits[len(prompt) - 1 + t][token])
                chosen /= np.exp(logits[len(prompt) - 1 + t]).sum()
                count = {
                    "k": 3,
                    "p": int((np.cumsum(p) - p < 0.6).sum()),
                    "m": int((p >= 0.3 * p[0]).sum()),
                }[key]
                assert kept[t] == pytest.approx(np.log(p[:count].sum()), abs=2e-5)
                assert chosen >= p[count - 1] * (1 - 1e-4)
    assert results["n"].completions[0].kept_logmass == b""


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
        logps = floats_view(completion.behaviour_logprobs)
        expected = reference_logprobs(old, prompt, ids, 1.0)
        np.testing.assert_allclose(logps[:6], expected[:6], atol=2e-5)
        # From the seventh on: new weights over the old keys and values.
        cache = _cache(old, prompt + ids[:5])
        logits = swapper.other(mx.array([ids[5:]]), cache=cache)[0]
        new = nn.log_softmax(logits.astype(mx.float32), axis=-1)
        expected_new = np.array(new[mx.arange(len(ids) - 6), mx.array(ids[6:])])
        np.testing.assert_allclose(logps[6:], expected_new, atol=2e-5)


def _cache(model: nn.Module, ids: list[int]):
    cache = make_prompt_cache(model)
    model(mx.array([ids]), cache=cache)
    return cache


def test_rows_that_had_not_started_are_prefilled_again_after_a_swap():
    swapper = Swapper()
    engine = engine_of(swapper.model, max_rows=2, stop_token_ids=[])
    engine.add(request("a", num_generations=4, max_completion_length=3))
    engine.step()
    engine.set_policy(swapper.apply, 1, "d1")
    late = run(engine)["a"].completions[2:]
    for completion in late:
        assert [s.version for s in completion.policy_spans] == [1]
        expected = reference_logprobs(swapper.other, [3, 9, 14, 2, 31], tokens(completion), 1.0)
        np.testing.assert_allclose(floats_view(completion.behaviour_logprobs), expected, atol=2e-5)


def test_a_prompt_is_prefilled_once_for_its_group():
    engine = engine_of(tiny_llama(), max_rows=4)
    engine.add(request("a", [3] * 20, num_generations=8))
    prefilled = 0
    while (step := engine.step()).progressed:
        prefilled += step.prefilled
    assert prefilled == 20


def test_nothing_is_sampled_below_the_least_version():
    engine = engine_of(tiny_llama(), version=-1)
    engine.add(request("a", min_policy_version=2))
    assert run(engine) == {}
    engine.set_policy(lambda: None, 1, "d1")
    assert run(engine) == {}
    engine.set_policy(lambda: None, 2, "d2")
    spans = [s for c in run(engine)["a"].completions for s in c.policy_spans]
    assert {s.version for s in spans} == {2}


def test_pinned_rows_defer_the_swap():
    engine = engine_of(tiny_llama())
    engine.add(request("later", pinned_version=1))
    engine.add(request("now", pinned_version=0))
    assert not engine.wants_policy(1)
    with pytest.raises(ModelError, match="rows pinned to a version must finish first"):
        engine.set_policy(lambda: None, 1, "d1")
    results = run(engine)
    assert list(results) == ["now"]
    assert engine.wants_policy(1)
    assert not engine.wants_policy(2)
    engine.set_policy(lambda: None, 1, "d1")
    spans = [s for c in run(engine)["later"].completions for s in c.policy_spans]
    assert {s.version for s in spans} == {1}
    with pytest.raises(ModelError, match="pinned to policy version 0, which has passed"):
        engine.add(request("never", pinned_version=0))


def test_cancel_leaves_the_others_alone():
    model = tiny_llama()
    alone = engine_of(model)
    alone.add(request("a", seed=5))
    expected = all_tokens(run(alone)["a"])
    engine = engine_of(model, max_rows=6)
    engine.add(request("b", seed=9))
    engine.add(request("a", seed=5))
    engine.step()
    engine.step()
    assert engine.cancel("b")
    assert not engine.cancel("b")
    results = run(engine)
    assert list(results) == ["a"]
    assert all_tokens(results["a"]) == expected
    engine.add(request("b", seed=9))
    engine.step()
    engine.cancel("b")
    assert run(engine) == {}
    assert engine.free_rows == 6


def test_requests_that_cannot_be_sampled_are_refused():
    engine = engine_of(tiny_llama(), context_length=8)
    with pytest.raises(DataError, match="at least one token"):
        engine.add(
            GenerationRequest(
                key="x",
                prompt_ids=[],
                sampling=Sampling(num_generations=1, max_completion_length=1),
                seed=0,
            )
        )
    with pytest.raises(DataError, match=r"must lie in \[0, 50\), got 50"):
        engine.add(request("x", [1, 50]))
    with pytest.raises(DataError, match="got -1"):
        engine.add(request("x", [1, -1]))
    with pytest.raises(ModelError, match="context of 8 tokens, got 8"):
        engine.add(request("x", [1] * 8))
    engine.add(request("x", [1] * 7))
    with pytest.raises(DataError, match="held already"):
        engine.add(request("x"))


def test_reset_forgets_requests_and_version():
    engine = engine_of(tiny_llama(), version=3)
    engine.add(request("a"))
    engine.step()
    assert engine.oldest_version == 3
    engine.reset()
    assert (engine.version, engine.free_rows, engine.oldest_version) == (-1, 32, -1)
    assert engine.wants_policy(0)
