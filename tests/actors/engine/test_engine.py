"""The engine on tiny random models, in float32: tokens, log-probs, groups, refusals."""

import mlx.core as mx
import numpy as np
import pytest

from actors.engine.base import GenerationRequest
from protocol.errors import DataError, ModelError
from protocol.messages.arrays import floats_view
from protocol.messages.parts import Sampling
from tests.actors.engine.engines import (
    STOP,
    all_tokens,
    engine_of,
    reference_logprobs,
    request,
    run,
    tiny_llama,
    tokens,
)


@pytest.mark.parametrize("prompt", [[5], [3, 9, 14, 2, 31]])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampling_logprobs_are_those_of_a_full_forward(prompt, temperature):
    model = tiny_llama()
    engine = engine_of(model)
    engine.add(request("a", prompt, temperature=temperature, num_generations=32))
    result = run(engine)["a"]
    assert len(result.completions) == 32
    reasons = set()
    for completion in result.completions:
        ids = tokens(completion)
        expected = reference_logprobs(model, prompt, ids, 1 / temperature)
        np.testing.assert_allclose(
            floats_view(completion.sampling_logprobs), expected, atol=2e-5, rtol=0
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
        floats_view(completion.sampling_logprobs),
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
        engine = engine_of(model, max_concurrent_completions=9)
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
    wide, narrow = engine_of(model), engine_of(model, max_concurrent_completions=3)
    for engine in (wide, narrow):
        engine.add(request("a", num_generations=8))
    assert narrow.free_completions == 0
    assert all_tokens(run(narrow)["a"]) == all_tokens(run(wide)["a"])
    assert narrow.free_completions == 3


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


def test_a_prompt_is_prefilled_once_for_its_group():
    engine = engine_of(tiny_llama(), max_concurrent_completions=4)
    engine.add(request("a", [3] * 20, num_generations=8))
    prefilled = 0
    while (step := engine.step()).made_progress:
        prefilled += step.prefilled
    assert prefilled == 20


def test_cancel_leaves_the_others_alone():
    model = tiny_llama()
    alone = engine_of(model)
    alone.add(request("a", seed=5))
    expected = all_tokens(run(alone)["a"])
    engine = engine_of(model, max_concurrent_completions=6)
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
    assert engine.free_completions == 6


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
    with pytest.raises(DataError, match="already added"):
        engine.add(request("x"))
