"""Examples for offline training, and how each kind is built from dataset rows."""

import math
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from learner.data.filter import Builder, Report
from learner.data.row_tokens import (
    SideTokens,
    tokenise_answer,
    tokenise_pair,
    tokenise_sequence,
    with_explicit_prompt,
)
from learner.data.rows import Json, Row, RowError, json_row
from learner.data.tokens import Tokenizer
from protocol.config.settings import ExampleData

Logprobs = npt.NDArray[np.float32]  # (tokens of a completion,) nats


@dataclass(frozen=True)
class PreferenceExample:
    """A pair: chosen follows `prompt_ids`, rejected follows `rejected_prompt_ids`.

    The two contexts are equal unless truncation from the start cut them differently, or the pair
    shares nothing. Each context and each answer holds at least one token. `score` is the row's
    `preference_score`. `ref_logprobs`: of chosen and rejected, if precomputed. `row_json`: see
    `with_rows`.
    """

    row: int
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_prompt_ids: list[int]
    rejected_ids: list[int]
    score: float | None = None
    ref_logprobs: tuple[Logprobs, Logprobs] | None = field(default=None, compare=False, repr=False)
    row_json: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def length(self) -> int:
        """Tokens of the longer side."""
        return max(
            len(self.prompt_ids) + len(self.chosen_ids),
            len(self.rejected_prompt_ids) + len(self.rejected_ids),
        )


@dataclass(frozen=True)
class UnpairedExample:
    """An answer judged good (`label`) or bad; prompt and answer hold at least one token each.

    If precomputed, `ref_logprobs` are those of the answer, and `kl_ref_logprobs` those of the
    answer before it in its batch, given this prompt. `row_json`: see `with_rows`.
    """

    row: int
    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool
    ref_logprobs: Logprobs | None = field(default=None, compare=False, repr=False)
    kl_ref_logprobs: Logprobs | None = field(default=None, compare=False, repr=False)
    row_json: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class SftExample:
    """A sequence (T,), T >= 2; `completion_mask` (T,) is 1 where a token counts in the loss.

    At least one token after token 0 counts. `row_json`: see `with_rows`.
    """

    row: int
    input_ids: list[int]
    completion_mask: list[int]
    row_json: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def length(self) -> int:
        return len(self.input_ids)


Example = PreferenceExample | UnpairedExample | SftExample
E = TypeVar("E", PreferenceExample, UnpairedExample, SftExample)

_ALWAYS = ("prompt", "tools", "chat_template_kwargs")
PAIR_COLUMNS = (*_ALWAYS, "chosen", "rejected", "preference_score")
ANSWER_COLUMNS = (*_ALWAYS, "completion", "label", "chosen", "rejected")
SEQUENCE_COLUMNS = (*_ALWAYS, "completion", "messages", "text")
ANSWER_BLOCK = 1000  # rows whose answers TRL orders together: the default batch of `Dataset.map`


def pairs(settings: ExampleData, tokenizer: Tokenizer) -> Builder[PreferenceExample]:
    """Build pairs from rows with chosen, rejected and, unless it is implicit, prompt."""

    def build(number: int, row: Row, report: Report) -> tuple[PreferenceExample]:
        chosen, rejected = tokenise_pair(tokenizer, row, settings)
        score = _score(row.get("preference_score"))
        if chosen.truncated or rejected.truncated:
            report.note_truncated(number)

        chosen_prompt, chosen_ids = _with_context(chosen)
        rejected_prompt, rejected_ids = _with_context(rejected)
        if (chosen_prompt, chosen_ids) == (rejected_prompt, rejected_ids):
            report.note_identical(number)
        sides = chosen_prompt, chosen_ids, rejected_prompt, rejected_ids
        return (PreferenceExample(number, *sides, score),)

    return Builder(build, PAIR_COLUMNS)


def answers(settings: ExampleData, tokenizer: Tokenizer) -> Builder[UnpairedExample]:
    """Build judged answers from rows with prompt, completion and label, or from pairs.

    As in TRL, a pair is a good answer and a bad one, each tokenised on its own. One of them may be
    dropped alone, where its prompt leaves it no room.
    """

    def build(number: int, row: Row, report: Report) -> tuple[UnpairedExample | None, ...]:
        labels: dict[str, Json] = {"completion": row.get("label")}
        if row.get("completion") is None and {"chosen", "rejected"} & row.keys():
            row = with_explicit_prompt(row)
            labels = {"chosen": True, "rejected": False}

        truncated = False
        errors: list[RowError] = []
        found: list[UnpairedExample | None] = []
        for column, label in labels.items():
            try:
                side = _judged_side(settings, tokenizer, row, column, label)
                example = UnpairedExample(number, *_with_context(side), bool(label))
            except RowError as error:
                if error.kind != "prompt_too_long":
                    raise
                errors.append(error)
                found.append(None)
            else:
                truncated |= side.truncated
                found.append(example)

        if errors and (len(errors) == len(found) or settings.on_bad_row == "error"):
            raise errors[0]
        for error in errors:
            reason = f"{error.reason}; the pair's other answer is kept"
            report.note_dropped(number, RowError(error.kind, reason))
        if truncated:
            report.note_truncated(number)
        return tuple(found)

    return Builder(build, ANSWER_COLUMNS, ANSWER_BLOCK)


def _judged_side(
    settings: ExampleData, tokenizer: Tokenizer, row: Row, column: str, label: Json
) -> SideTokens:
    """Return the tokens of the answer in `column`, which must have a label."""
    side = tokenise_answer(tokenizer, row, settings, column)
    if label is None:
        raise RowError("missing_column", f"no label; the row has {sorted(row)}")
    if label not in (0, 1, False, True):
        raise RowError("mixed_types", f"label must be true or false, not {label!r}")
    return side


def sequences(
    settings: ExampleData, tokenizer: Tokenizer, *, completion_only_loss: bool | None = None
) -> Builder[SftExample]:
    """Build sequences from rows with messages, text, or prompt and completion."""

    def build(number: int, row: Row, report: Report) -> tuple[SftExample]:
        tokens = tokenise_sequence(tokenizer, row, settings, completion_only=completion_only_loss)
        if tokens.truncated:
            report.note_truncated(number)
        return (SftExample(number, tokens.input_ids, tokens.completion_mask),)

    return Builder(build, SEQUENCE_COLUMNS)


def with_rows(builder: Builder[E]) -> Builder[E]:
    """Return a builder whose examples also hold their row as JSON, for reward functions.

    For held-out rows only: the rows of a large training set would fill the memory. A pair's
    implicit prompt is made explicit; columns that JSON cannot hold are left out.
    """
    of_pairs = "chosen" in (builder.columns or ())

    def build(number: int, row: Row, report: Report) -> tuple[E | None, ...]:
        examples = builder.build(number, row, report)
        if of_pairs and row.get("prompt") is None:
            row = with_explicit_prompt(row)

        columns: Row = {}
        for column, value in row.items():
            with suppress(RowError):  # an image, say; GRPO would not send it to rewards either
                columns |= json_row({column: value})
        row_json = msgspec.json.encode(columns)
        return tuple(example and replace(example, row_json=row_json) for example in examples)

    return replace(builder, build=build)


def _with_context(side: SideTokens) -> tuple[list[int], list[int]]:
    """Return prompt and completion; an empty prompt gets the first token: nothing predicts it."""
    # TRL's shift leaves that token out of the loss.
    prompt, completion = side.prompt_ids, side.completion_ids
    if not prompt:
        prompt, completion = completion[:1], completion[1:]
    if not completion:
        raise RowError("empty_answer", "a single token without a prompt: nothing predicts it")
    return prompt, completion


def _score(value: Json) -> float | None:
    if value is None:
        return None

    score = math.nan
    if not isinstance(value, bool) and isinstance(value, int | float):
        with suppress(OverflowError):  # integers in JSON may be too large for a float
            score = float(value)
    if not math.isfinite(score):
        reason = f"preference_score must be a finite number, not {value!s:.40}"
        raise RowError("mixed_types", reason)
    if score < 0:
        reason = f"preference_score must be at least 0, not {score:g}: it is the weight of the pair"
        raise RowError("invalid_score", reason)
    return score
