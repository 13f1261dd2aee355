"""The trial at the start: what a model's way of decoding is, and that wrong ones are found."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from actors.engine.decoding.trials import Trial, decoding_path, stacked_adapters
from tests.actors.engine.decoding.test_adapters import adapted
from tests.actors.engine.engines import VOCAB, engine_of, request, run, tiny_llama, tokens
from tests.actors.engine.test_caches import quantised_cache, sliding_window, state_space


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (tiny_llama, "slots"),
        (sliding_window, "slots"),
        (state_space, "batched"),
        (quantised_cache, "alone"),
    ],
)
def test_the_way_of_decoding_follows_from_the_caches(make, path):
    found, reason = decoding_path(Trial(make()))
    assert found == path
    assert ("caches of another kind" in reason) == (path != "slots")


class Forgetful(nn.Module):
    """A llama that is right alone, and that computes rows of a batch at their neighbour's place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()
        self.layers = self.inner.layers

    def __call__(self, inputs: mx.array, cache=None) -> mx.array:
        logits = self.inner(inputs, cache=cache)
        return mx.roll(logits, 1, 0) if len(inputs) > 1 else logits


def test_a_model_that_is_wrong_in_any_batch_decodes_one_by_one(caplog: pytest.LogCaptureFixture):
    model = Forgetful()
    found, reason = decoding_path(Trial(model))
    assert found == "alone"
    assert reason.count("the logits differ by") == 2

    engine = engine_of(model, vocab_size=VOCAB, stop_token_ids=[])
    assert "decodes one completion at a time" in caplog.text
    right = engine_of(tiny_llama(), stop_token_ids=[])
    for each in (engine, right):
        each.add(request("a", temperature=0))
    found, expected = (run(each)["a"].completions[0] for each in (engine, right))
    assert tokens(found) == tokens(expected)


def test_rounding_of_short_types_is_measured_and_allowed():
    model = adapted()
    model.set_dtype(mx.bfloat16)
    assert decoding_path(Trial(model)) == ("slots", "")
    assert len(stacked_adapters(Trial(model))) == 8
