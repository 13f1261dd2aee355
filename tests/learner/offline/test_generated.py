"""Answers to held-out prompts against a greedy loop over the model's own logits."""

import json
import logging

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load

from learner.data.examples import PreferenceExample, SftExample, sequences, with_rows
from learner.data.filter import Report
from learner.interfaces import Prepared
from learner.losses.metrics import Metrics
from learner.offline.generated import Answers, prompt_of
from learner.offline.held_out import HeldOutEvaluator
from protocol.config.settings import ExampleData
from protocol.errors import ConfigError
from tests.parity import tiny_tokenizer
from tests.tiny import write_model_folder


class Rows:
    """A loss of 2 for every batch."""

    num_iterations = 1

    def prepare(self, batch: list[PreferenceExample]) -> Prepared[dict[str, mx.array]]:
        return Prepared([{"rows": mx.array(len(batch))}], {})

    def loss(self, model: nn.Module, arrays: dict[str, mx.array]) -> tuple[mx.array, Metrics]:
        return mx.array(2.0), Metrics()


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
    evaluator = HeldOutEvaluator(model, Rows(), examples, 2, answers)
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


def test_examples_without_their_rows_are_refused(tmp_path):
    model, tokenizer = load(str(write_model_folder(tmp_path / "m")))[:2]
    with pytest.raises(TypeError, match="row 7 was not built by `with_rows`"):
        Answers(model, tokenizer, 1, 1)([PreferenceExample(7, [5], [4, 1], [5], [6, 1])], 0)


def sequence(tokenizer, row, **settings):
    build = sequences(ExampleData(**settings), tokenizer)
    return built(build, row)


def built(builder, row):
    (example,) = with_rows(builder).build(0, row, Report("rows"))
    assert example is not None
    return example


def test_the_prompt_of_a_sequence_ends_where_tokens_count():
    example = SftExample(0, [5, 6, 7, 1], [0, 0, 1, 1])
    assert prompt_of(example, tiny_tokenizer.build()) == [5, 6]


def test_the_prompt_of_a_sequence_whose_tokens_all_count_is_its_rows():
    tokenizer = tiny_tokenizer.build()
    user, reply = {"role": "user", "content": "the"}, {"role": "assistant", "content": "is"}
    messages = [user, reply, user, reply, user]  # the last turn has no answer, an earlier one has
    asked = prompt_of(sequence(tokenizer, {"messages": messages}), tokenizer)
    turn = "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(asked) == f"{turn}is<|im_end|>\n{turn}"
    cut = sequence(tokenizer, {"messages": messages}, max_length=len(asked))
    assert prompt_of(cut, tokenizer) == asked
    cut = sequence(tokenizer, {"messages": messages}, max_length=len(asked) - 1)
    assert prompt_of(cut, tokenizer) == []
    for silent in ({"text": "the is"}, {"messages": [user]}, {"messages": [reply]}):
        assert prompt_of(sequence(tokenizer, silent), tokenizer) == []
    whole = sequences(ExampleData(), tokenizer, completion_only_loss=False)
    row = {"prompt": "the is", "completion": " blue"}
    example = built(whole, row)
    assert tokenizer.decode(prompt_of(example, tokenizer)) == "the is"


def test_rows_without_a_prompt_are_reported_and_refused_where_none_has_one(caplog):
    caplog.set_level(logging.INFO, "pippin.data")
    tokenizer = tiny_tokenizer.build()
    answers = Answers(nn.Module(), tokenizer, 1, 1)
    text = sequence(tokenizer, {"text": "the is"})
    with pytest.raises(ConfigError, match=r"eval\.generate: none of the 2 held-out rows .*prepare"):
        answers.check([text, text])
    assert not caplog.records
    answers.check([text, sequence(tokenizer, {"prompt": "the", "completion": " is"})])
    assert caplog.messages == ["1 of 2 held-out rows have no prompt to answer"]


def test_chats_are_answered_from_before_their_last_answer(tmp_path):
    model, tokenizer = load(str(write_model_folder(tmp_path / "m")))[:2]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    user, reply = {"role": "user", "content": "w5 w9"}, {"role": "assistant", "content": "w4"}
    example = sequence(tokenizer, {"messages": [user, reply], "answer": "w4"})
    prompt = prompt_of(example, tokenizer)
    assert prompt == tokenizer.encode("w5 w9")
    metrics, (line,) = Answers(model, tokenizer, 1, 5)([example], 2)
    assert line["completions"] == [tokenizer.decode(greedy(model, prompt, 5))]
    assert (line["prompt"], line["columns"]["answer"]) == ([user], "w4")
    assert metrics["eval/completions/mean_length"] == line["lengths"][0]
