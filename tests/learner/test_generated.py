"""Answers to held-out prompts against a greedy loop over the model's own logits."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load

from learner.interfaces import Arrays, Prepared
from learner.sources.examples import PreferenceExample, SftExample
from learner.sources.generated import Answers, prompt_of
from learner.sources.stored import StoredEvaluator
from tests.tiny import write_model_folder


class Rows:
    """A loss of 2 for every batch."""

    num_iterations = 1

    def prepare(self, batch: list[PreferenceExample]) -> Prepared:
        return Prepared([{"rows": mx.array(len(batch))}], {})

    def loss(self, model: nn.Module, arrays: Arrays) -> tuple[mx.array, Arrays]:
        return mx.array(2.0), {}

    def merge(self, first: Arrays, second: Arrays) -> Arrays:
        return first

    def finish(self, metrics: Arrays) -> dict[str, float]:
        return {}


def greedy(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        token = np.array(model(mx.array([ids]))[0, -1]).argmax().item()
        if token == 1:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_answers_are_greedy_and_written_as_eval_rollouts(tmp_path):
    model, tokenizer = load(str(write_model_folder(tmp_path / "m")))[:2]
    prompts = [[5, 9, 2], [7], [5, 9, 2], [40, 3, 8, 11, 6]]
    examples = [
        PreferenceExample(
            i, p, [4, 1], p, [6, 1], row_json=json.dumps({"prompt": str(p), "id": i}).encode()
        )
        for i, p in enumerate(prompts)
    ]
    answers = Answers(model, tokenizer, batch_size=2, max_tokens=5)
    evaluator = StoredEvaluator(model, Rows(), examples, 2, answers)
    evaluator.start(3)
    result = evaluator.poll()
    assert result is not None
    version, metrics, lines = result
    assert version == 3
    assert metrics["eval/loss"] == 2.0
    assert [line["row"] for line in lines] == [0, 1, 3]
    for line, prompt in zip(lines, (prompts[0], prompts[1], prompts[3]), strict=True):
        expected = greedy(model, prompt, 5)
        assert line["completions"] == [tokenizer.decode(expected)]
        assert line["lengths"] == [len(expected)]
        assert line["finish_reasons"] == ["length" if len(expected) == 5 else "stop"]
        assert (line["prompt"], line["columns"]) == (str(prompt), {"id": line["row"]})
        assert (line["kind"], line["trained_at"]) == ("eval", 3)
    mean = sum(line["lengths"][0] for line in lines) / 3
    assert metrics["eval/completions/mean_length"] == mean


def test_examples_without_their_rows_are_no_held_out_ones(tmp_path):
    model, tokenizer = load(str(write_model_folder(tmp_path / "m")))[:2]
    with pytest.raises(TypeError, match="row 7 was not built by `with_rows`"):
        Answers(model, tokenizer, 1, 1)([PreferenceExample(7, [5], [4, 1], [5], [6, 1])], 0)


def test_the_prompt_of_a_sequence_ends_where_tokens_count():
    assert prompt_of(SftExample(0, [5, 6, 7, 1], [0, 0, 1, 1])) == [5, 6]
    assert prompt_of(SftExample(0, [5, 6, 7, 1], [1, 1, 1, 1])) == []
