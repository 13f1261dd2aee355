"""Chats of which only the last answer counts, against mlx-lm's `mask_prompt` and by hand."""

from typing import Any

import pytest
from mlx_lm.tuner.datasets import ChatDataset

from learner.data.row_tokens import SequenceTokens, tokenise_sequence
from learner.data.rows import RowError
from protocol.config.settings import ExampleData
from tests.parity import tiny_tokenizer

SYSTEM = {"role": "system", "content": "the"}
USER = {"role": "user", "content": "is 42"}
ANSWER = {"role": "assistant", "content": "blue"}
TOOLS = [{"type": "function", "function": {"name": "sky"}}]


def tokens(row: dict[str, Any], only: bool | None = True, **options: Any) -> SequenceTokens:
    settings = ExampleData(**{"max_length": None, **options})
    return tokenise_sequence(tiny_tokenizer.build(), row, settings, completion_only=only)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": [SYSTEM, USER, ANSWER, USER, {**ANSWER, "content": " the 12 is"}]},
        {"messages": [USER, ANSWER], "tools": TOOLS},
        {"messages": [ANSWER, ANSWER]},
    ],
)
def test_the_last_answer_is_the_completion_as_mlx_lm_has_it(row: dict[str, Any]):
    ids, offset = ChatDataset([row], tiny_tokenizer.build(), mask_prompt=True).process(row)
    found = tokens(row)
    assert found.input_ids == ids
    assert found.completion_mask == [0] * offset + [1] * (len(ids) - offset)
    for only in (None, False):  # TRL's default: the whole conversation
        assert tokens(row, only).input_ids == ids
        assert tokens(row, only).completion_mask == [1] * len(ids)


def test_masked_chats_by_hand():
    tokenizer = tiny_tokenizer.build()
    found = tokens({"messages": [USER, ANSWER]})
    words = tokenizer.convert_ids_to_tokens(found.input_ids)
    parts = list(zip(words, found.completion_mask, strict=True))
    assert "".join(token for token, counts in parts if not counts) == (
        "<|im_start|>userĊisĠ42<|im_end|>Ċ<|im_start|>assistantĊ"
    )
    assert [token for token, counts in parts if counts] == ["blu", "e", "<|im_end|>", "Ċ"]
    pair = {"prompt": [USER], "completion": [ANSWER]}
    assert tokens(pair) == tokens(pair, None) == found
    start = found.completion_mask.index(1)
    cut = tokens({"messages": [USER, ANSWER]}, max_length=start + 1)
    assert (cut.completion_mask, cut.truncated) == ([0] * start + [1], True)
    with pytest.raises(RowError, match="no completion token is left"):
        tokens({"messages": [USER, ANSWER]}, max_length=start)


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"messages": [USER, ANSWER, USER]}, "invalid_role", "messages ends with a 'user' message"),
        ({"messages": [ANSWER]}, "empty", "only an answer"),
        ({"messages": [USER, {**ANSWER, "content": ""}]}, "empty_answer", "completion is empty"),
        ({"messages": []}, "empty", "messages holds no message"),
        ({"text": "the"}, "missing_column", r"text has no prompt.*leave that key out, or make"),
        ({"words": "the"}, "missing_column", "no text, messages, or prompt and completion"),
    ],
)
def test_rows_without_a_last_answer_are_bad_ones(row: dict[str, Any], kind: str, reason: str):
    with pytest.raises(RowError, match=reason) as error:
        tokens(row)
    assert error.value.kind == kind
