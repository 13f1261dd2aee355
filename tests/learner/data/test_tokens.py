"""Tokens against TRL 1.16.0's, which `tests/parity/make_tokens.py` wrote down."""

import importlib.util
import json
from pathlib import Path

import pytest

from learner.data.row_tokens import (
    SideTokens,
    extract_prompt,
    tokenise_answer,
    tokenise_pair,
    tokenise_sequence,
)
from learner.data.rows import RowError
from learner.data.tokens import render_prompt
from protocol.config.settings import ExampleData
from protocol.errors import DataError

PARITY = Path(__file__).parents[2] / "parity"
MODELS = Path(__file__).parents[3].parent / "shared" / "models"
USER = {"role": "user", "content": "Is the sky blue?"}
UNCUT = ExampleData(max_length=None)
ASSISTANT = {"role": "assistant", "content": "It is"}


def _cases(name):
    golden = json.loads((PARITY / "tokens" / f"{name}.json").read_text())
    return [pytest.param(case, id=case["name"]) for case in golden["cases"]]


@pytest.fixture(scope="module")
def tiny():
    spec = importlib.util.spec_from_file_location("tiny_tokenizer", PARITY / "tiny_tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def chat(tiny):
    return tiny.build()


@pytest.fixture(scope="module")
def plain(tiny):
    return tiny.build(chat_template=False)


def _side(side: SideTokens):
    mask = [0] * len(side.prompt_ids) + [1] * len(side.completion_ids)
    return {"input_ids": side.prompt_ids + side.completion_ids, "mask": mask}


def _ours(tokenizer, case):
    settings = ExampleData(**{key: case[key] for key in ("max_length", "truncation_mode")})
    if case["trainer"] == "dpo":
        return [_side(side) for side in tokenise_pair(tokenizer, case["row"], settings)]
    if case["trainer"] == "kto":
        return [_side(tokenise_answer(tokenizer, case["row"], settings))]
    only = case["completion_only"]
    tokens = tokenise_sequence(tokenizer, case["row"], settings, completion_only=only)
    return [{"input_ids": tokens.input_ids, "mask": tokens.completion_mask}]


def _check(tokenizer, case):
    if case["expected"]:
        assert _ours(tokenizer, case) == case["expected"]
    else:
        with pytest.raises(RowError, match="no completion token is left"):
            _ours(tokenizer, case)


@pytest.mark.parametrize("case", _cases("tiny"))
def test_rows_have_trls_tokens(chat, case):
    _check(chat, case)


@pytest.mark.parametrize("case", _cases("tiny-no-template"))
def test_rows_have_trls_tokens_without_a_template(plain, case):
    _check(plain, case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer-qwen3", "stories260K"])
def test_rows_have_trls_tokens_with_real_tokenizers(name):
    from transformers import AutoTokenizer

    folder = MODELS / name
    assert folder.is_dir(), f"this test reads the tokenizer in {folder}, which is not there"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for case in (param.values[0] for param in _cases(name)):
        _check(tokenizer, case)


def test_a_straddling_token_belongs_to_the_completion(chat):
    row = {"prompt": "The sky is ", "chosen": "blue", "rejected": "the 42"}
    chosen, rejected = tokenise_pair(chat, row, UNCUT)
    # "Ġblu" + "e" are one and a half tokens over the prompt's final space.
    assert chat.decode(chosen.prompt_ids) == "The sky is"
    assert chat.decode(chosen.completion_ids) == " blue<|im_end|>"
    assert chosen.prompt_ids == rejected.prompt_ids


def test_implicit_prompts_are_the_longest_common_prefix():
    assert extract_prompt("a b c", "a b d") == ("a b", " c", " d")
    assert extract_prompt("abc", "abd") == ("ab", "c", "d")
    assert extract_prompt("ab", "abc") == ("a", "b", "bc")
    assert extract_prompt("x ", "y") == ("", "x ", "y")  # TRL would move the last space
    assert extract_prompt([USER, ASSISTANT], [USER]) == ([], [USER, ASSISTANT], [USER])


def test_user_turns_get_the_generation_prompt_and_assistant_turns_go_on(chat):
    ids = render_prompt(chat, {"prompt": [USER]})
    head = "<|im_start|>user\nIs the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.decode(ids) == head
    assert ids == chat.encode(head)
    continued = render_prompt(chat, {"prompt": [USER, ASSISTANT]})
    assert chat.decode(continued) == head + "It is"


def test_tools_and_template_arguments_are_honoured(chat):
    row = {
        "prompt": [USER],
        "tools": '[{"type": "function"}]',
        "chat_template_kwargs": {"shout": True, "absent": None},
    }
    text = chat.decode(render_prompt(chat, row))
    assert text.startswith('<|im_start|>system\n[{"type": "function"}]<|im_end|>\n')
    assert "IS THE SKY BLUE?" in text
    assert chat.decode(render_prompt(chat, {**row, "tools": []})).startswith("<|im_start|>user")


def test_mlx_lm_wrappers_give_transformers_tokens(chat):
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    wrapped = TokenizerWrapper(chat)
    assert render_prompt(wrapped, {"prompt": [USER]}) == render_prompt(chat, {"prompt": [USER]})
    assert render_prompt(wrapped, {"prompt": "12 is"}) == chat.encode("12 is")


def test_nulls_that_arrow_fills_in_do_not_reach_the_template(chat):
    filled = {**USER, "tool_calls": None, "name": None}
    assert render_prompt(chat, {"prompt": [filled]}) == render_prompt(chat, {"prompt": [USER]})


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"question": "?"}, "missing_column", "no prompt; the row has"),
        ({"prompt": 3}, "mixed_types", "prompt must be a list of messages, not int"),
        ({"prompt": []}, "empty", "prompt holds no message"),
        ({"prompt": ""}, "empty", "no tokens"),
        ({"prompt": "a\ud800"}, "invalid_text", "lone surrogate .* at character 1"),
        ({"prompt": [{"role": "robot", "content": ""}]}, "invalid_role", "prompt.0..role"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "invalid_role", "ends with"),
        ({"prompt": [{"role": "user", "content": 3}]}, "mixed_types", "content must be text"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "unsupported", "image"),
        ({"prompt": [USER], "tools": "{"}, "mixed_types", "tools is not valid JSON"),
        ({"prompt": [{**USER, "tool_calls": "f()"}]}, "mixed_types", r"prompt.0..tool_calls must"),
        ({"prompt": [{**USER, "tool_calls": ["f"]}]}, "mixed_types", "each a mapping"),
    ],
)
def test_unusable_prompts_say_why(chat, row, kind, words):
    with pytest.raises(RowError, match=words) as error:
        render_prompt(chat, row)
    assert error.value.kind == kind


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "chosen": "b"}, "missing_column"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "empty_answer"),
        ({"prompt": "a", "chosen": "b", "rejected": [ASSISTANT]}, "mixed_types"),
        (
            {"prompt": [USER], "chosen": [{**ASSISTANT, "content": ""}], "rejected": [ASSISTANT]},
            "empty_answer",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": 7}, "mixed_types"),
        ({"prompt": "a", "chosen": "b\udc00", "rejected": "c"}, "invalid_text"),
        ({"chosen": [USER], "rejected": [ASSISTANT]}, "empty"),
    ],
)
def test_unusable_pairs_say_why(chat, row, kind):
    with pytest.raises(RowError) as error:
        tokenise_pair(chat, row, UNCUT)
    assert error.value.kind == kind


def test_a_conversation_that_ends_with_an_empty_answer_says_so(chat):
    row = {"messages": [USER, {**ASSISTANT, "content": ""}]}
    with pytest.raises(RowError, match="the last answer of messages is empty") as error:
        tokenise_sequence(chat, row, UNCUT)
    assert error.value.kind == "empty_answer"


def test_messages_without_a_template_end_the_run(plain):
    with pytest.raises(DataError, match=r"model\.chat_template") as error:
        render_prompt(plain, {"prompt": [USER]})
    assert not isinstance(error.value, RowError)
