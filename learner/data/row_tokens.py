"""Preference and fine-tuning rows to token IDs, equal to TRL 1.16.0's DPO, KTO and SFT trainers.

Every method uses DPO's tokenisation: prompt and answer are encoded together, and the completion
begins where that encoding differs from the prompt's own, so a token that straddles the boundary
belongs to the completion. TRL's experimental ORPO and CPO differ: they step one token back there,
append another EOS after a chat template's end of turn, and truncate the answer before the prompt.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from learner.data.rows import Json, Row, RowError, check_text
from learner.data.tokens import (
    Messages,
    Tokenizer,
    check_messages,
    encode,
    plain_tokenizer,
    render_chat,
    template_options,
)
from protocol.config.settings import ExampleData
from protocol.errors import DataError

_UNCUT = ExampleData(max_length=None)
Content = str | Messages


@dataclass(frozen=True)
class SideTokens:
    """One answer with its context: `prompt_ids`, then `completion_ids`; perhaps truncated."""

    prompt_ids: list[int]
    completion_ids: list[int]
    truncated: bool = False


@dataclass(frozen=True)
class SequenceTokens:
    """A sequence (T,) to fine-tune on; `completion_mask` (T,) is 1 where a token counts."""

    input_ids: list[int]
    completion_mask: list[int]
    truncated: bool = False


def common_prefix_length(ids: Sequence[Any], others: Sequence[Any]) -> int:
    """Return the number of leading elements that are equal."""
    shorter = min(len(ids), len(others))
    return next((at for at in range(shorter) if ids[at] != others[at]), shorter)


def extract_prompt(chosen: Content, rejected: Content) -> tuple[Content, Content, Content]:
    """Split off the implicit prompt, the longest common prefix, as TRL's `extract_prompt`.

    Where one answer is the beginning of the other, its last character or message stays an answer. A
    space before the boundary goes to the answers. TRL looks for that space even if nothing is
    shared, and then sees the last character; we move nothing there.
    """
    index = min(common_prefix_length(chosen, rejected), min(len(chosen), len(rejected)) - 1)
    differs = chosen[index] != rejected[index]
    if differs and index > 0 and chosen[index - 1] == " ":
        index -= 1
    return chosen[:index], chosen[index:], rejected[index:]


def tokenise_pair(
    tokenizer: Tokenizer, row: Row, settings: ExampleData
) -> tuple[SideTokens, SideTokens]:
    """Return the tokens of chosen and rejected of a preference row; the prompt may be implicit.

    The sides' contexts differ only where `keep_end` truncated them. Raises RowError.
    """
    row = with_explicit_prompt(row)
    chosen, rejected = _content(row, "chosen"), _content(row, "rejected")
    prompt = _content(row, "prompt")
    _require_same_kind(prompt=prompt, chosen=chosen, rejected=rejected)

    prompt_ids, sequences = _encoded(tokenizer, row, prompt, [chosen, rejected])
    # One boundary for both, so that they have the same context.
    start = min(common_prefix_length(prompt_ids, ids) for ids in sequences)
    sides = [_truncated(ids, start, settings) for ids in sequences]
    return sides[0], sides[1]


def tokenise_answer(
    tokenizer: Tokenizer, row: Row, settings: ExampleData, column: str = "completion"
) -> SideTokens:
    """Return the tokens of a row with prompt and an answer in `column`. Raises RowError."""
    prompt, completion = _content(row, "prompt"), _content(row, column)
    _require_answer(completion, column)
    _require_same_kind(**{"prompt": prompt, column: completion})
    prompt_ids, (sequence,) = _encoded(tokenizer, row, prompt, [completion])
    start = common_prefix_length(prompt_ids, sequence)
    return _truncated(sequence, start, settings)


def with_explicit_prompt(row: Row) -> Row:
    """Return a pair's row with a prompt, split off chosen and rejected if it is implicit.

    Raises RowError where an answer is missing, empty, or of another kind than the other.
    """
    chosen, rejected = _content(row, "chosen"), _content(row, "rejected")
    _require_answer(chosen, "chosen")
    _require_answer(rejected, "rejected")
    if row.get("prompt") is not None:
        return row

    _require_same_kind(chosen=chosen, rejected=rejected)
    prompt, chosen, rejected = extract_prompt(chosen, rejected)
    if prompt == []:
        raise RowError(
            "empty", "chosen and rejected share no first message, and there is no prompt"
        )
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def tokenise_sequence(
    tokenizer: Tokenizer, row: Row, settings: ExampleData, *, completion_only: bool | None = None
) -> SequenceTokens:
    """Return the tokens of a row for SFT: `messages`, `text`, or `prompt` and `completion`.

    With `completion_only`, only the completion counts; None: of rows that have a prompt. True also
    makes the last of `messages`, which must be the assistant's, the completion, as mlx-lm's
    `mask_prompt` does. Raises RowError.
    """
    if row.get("prompt") is None and row.get("messages") is None and row.get("text") is None:
        raise _missing(row, "text", "no text, messages, or prompt and completion")
    if completion_only and row.get("prompt") is None:
        row = _with_last_answer(row)

    if row.get("prompt") is not None:
        side = tokenise_answer(tokenizer, row, _UNCUT)
        prompt_counts = 1 if completion_only is False else 0
        ids = side.prompt_ids + side.completion_ids
        mask = [prompt_counts] * len(side.prompt_ids) + [1] * len(side.completion_ids)
    else:
        ids = _whole(tokenizer, row)
        mask = [1] * len(ids)

    limit = settings.max_length
    truncated = limit is not None and len(ids) > limit
    kept = _kept(settings)
    ids, mask = ids[kept], mask[kept]
    if not any(mask[1:]):
        if truncated:
            raise RowError("prompt_too_long", f"no completion token is left of {limit} tokens")
        raise RowError("empty_answer", "no token is predicted: the first one has no context")

    return SequenceTokens(ids, mask, truncated)


def _with_last_answer(row: Row) -> Row:
    """Return a row of messages with the last one as `completion`, the others as `prompt`."""
    if row.get("messages") is None:
        raise RowError(
            "missing_column",
            "text has no prompt, which objective.completion_only_loss = true leaves out of the "
            "loss; leave that key out, or make prompt and completion of the text in data.prepare",
        )

    messages = check_messages(row["messages"], "messages")
    role = messages[-1]["role"]
    if role != "assistant":
        raise RowError(
            "invalid_role",
            f"messages ends with a {role!r} message; with objective.completion_only_loss = true "
            "the last one is the answer to train on, and must be the assistant's",
        )
    if len(messages) == 1:
        raise RowError("empty", "messages holds only an answer, without a message before it")
    return {**row, "prompt": messages[:-1], "completion": messages[-1:]}


def _whole(tokenizer: Tokenizer, row: Row) -> list[int]:
    """Return the token IDs of a row's messages or text."""
    if row.get("messages") is not None:
        messages = check_messages(row["messages"], "messages")
        if messages[-1]["role"] == "assistant":
            _require_answer(messages, "the last answer of messages")
        return render_chat(tokenizer, messages, template_options(row))

    text = _content(row, "text")
    if not isinstance(text, str):
        raise RowError(
            "mixed_types", "text must be a string; a conversation belongs in a column messages"
        )
    _require_answer(text, "text")
    return encode(tokenizer, _with_eos(tokenizer, text))


def _encoded(
    tokenizer: Tokenizer, row: Row, prompt: Content, answers: list[Content]
) -> tuple[list[int], list[list[int]]]:
    """Return the token IDs of the prompt alone, and of the prompt with each answer."""
    if isinstance(prompt, str):
        texts = [prompt + _with_eos(tokenizer, cast("str", answer)) for answer in answers]
        return encode(tokenizer, prompt), [encode(tokenizer, text) for text in texts]

    options = template_options(row)
    alone = render_chat(tokenizer, prompt, options, add_generation_prompt=True)
    chats = [prompt + cast("Messages", answer) for answer in answers]
    return alone, [render_chat(tokenizer, chat, options) for chat in chats]


def _with_eos(tokenizer: Tokenizer, text: str) -> str:
    eos: str | None = plain_tokenizer(tokenizer).eos_token
    if eos is None:
        raise DataError(
            "the tokenizer has no EOS token to end plain text with; set eos_token in its "
            "tokenizer_config.json"
        )
    return text if text.endswith(eos) else text + eos


def _truncated(ids: list[int], start: int, settings: ExampleData) -> SideTokens:
    """Return at most `max_length` of the tokens, whose completion begins at `start`."""
    limit, keeps_start = settings.max_length, settings.truncation_mode == "keep_start"
    if limit is not None and keeps_start and start >= limit:
        raise RowError(
            "prompt_too_long",
            f"the prompt's {start} tokens fill data.max_length = {limit}; no completion token is "
            "left",
        )
    if len(ids) == start:
        raise RowError("empty_answer", "the answer adds no token to the prompt")

    kept = ids[_kept(settings)]
    removed = len(ids) - len(kept)
    boundary = start if keeps_start else max(start - removed, 0)
    return SideTokens(kept[:boundary], kept[boundary:], truncated=removed > 0)


def _kept(settings: ExampleData) -> slice:
    limit = settings.max_length
    if limit is None:
        return slice(None)
    return slice(None, limit) if settings.truncation_mode == "keep_start" else slice(-limit, None)


def _content(row: Row, column: str) -> Content:
    value: Json = row.get(column)
    if value is None:
        raise _missing(row, column, f"no {column}")
    if isinstance(value, str):
        return check_text(value, column)
    if isinstance(value, list):
        return check_messages(cast("Json", value), column) if value else []
    raise RowError(
        "mixed_types",
        f"{column} must be a string or a list of messages, not {type(value).__name__}",
    )


def _missing(row: Row, column: str, problem: str) -> RowError:
    """Return the error for a missing column, with a hint at what was probably meant."""
    present = sorted(column for column, value in row.items() if value is not None)
    wanted = ("text", "messages") if column == "text" else (column,)
    near = [(name, *difflib.get_close_matches(name, present, n=1)) for name in wanted]
    near = [names for names in near if len(names) > 1]

    hint = ""
    if column in ("chosen", "rejected") and {"completion", "label"} <= set(present):
        hint = '; for judged answers set objective.method = "kto"'
    elif column in ("text", "completion") and {"chosen", "rejected"} <= set(present):
        hint = "; launch/preference.py trains on pairs"
    elif near:
        ours, theirs = near[0]
        hint = f"; data.columns = {{{ours} = {json.dumps(theirs)}}} would read that column"
    return RowError("missing_column", f"{problem}; the row has {present}{hint}")


def _require_answer(answer: Content, column: str) -> None:
    last = answer if isinstance(answer, str) or not answer else answer[-1]
    if isinstance(last, dict):
        last = last.get("content") or last.get("tool_calls")
    if not last:
        raise RowError("empty_answer", f"{column} is empty")


def _require_same_kind(**contents: Content) -> None:
    kinds = {
        name: "text" if isinstance(value, str) else "messages" for name, value in contents.items()
    }
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise RowError("mixed_types", f"{found}; all must be of one kind; use data.prepare")
    if contents.get("prompt") == []:
        raise RowError("empty", "the prompt holds no message")
