"""Examples of offline training and how they are built from rows."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from learner.data.filter import Report
from learner.data.prompts import json_row
from learner.data.row_tokens import (
    SideTokens,
    tokenise_answer,
    tokenise_pair,
    tokenise_sequence,
    with_explicit_prompt,
)
from learner.data.rows import RawRow
from learner.data.tokens import RowError, Tokenizer
from protocol.config.settings import DataSettings

Logprobs = npt.NDArray[np.float32]  # (tokens of a completion,) nats


@dataclass(frozen=True)
class PreferenceExample:
    """A pair: chosen follows `prompt_ids`, rejected follows `rejected_prompt_ids`.

    The two contexts are equal unless truncation from the start cut them differently, or the pair
    shares nothing. Each holds at least one token, as does each answer. `score` is the row's
    `preference_score`. `ref_logprobs`: the reference's of chosen and rejected, if precomputed.
    `row_json`: see `with_rows`.
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
    """An answer judged good (`label`) or bad; context and answer hold at least one token.

    `ref_logprobs`: the reference's of the answer, if precomputed, and `kl_ref_logprobs` those of
    the answer before it in its batch, to this prompt. `row_json`: see `with_rows`.
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
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class SftExample:
    """A sequence (T,), T >= 2; `completion_mask` (T,) is 1 where a token counts, at least once
    after token 0. `row_json`: see `with_rows`."""

    row: int
    input_ids: list[int]
    completion_mask: list[int]
    row_json: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return len(self.input_ids)


Example = PreferenceExample | UnpairedExample | SftExample
E = TypeVar("E", PreferenceExample, UnpairedExample, SftExample)
Build = Callable[[int, RawRow, Report], E]


def pairs(settings: DataSettings, tokenizer: Tokenizer) -> Build[PreferenceExample]:
    """Build pairs from rows with chosen, rejected and, unless it is implicit, prompt."""

    def build(number: int, row: RawRow, report: Report) -> PreferenceExample:
        chosen, rejected = tokenise_pair(
            tokenizer,
            row,
            max_length=settings.max_length,
            truncation_mode=settings.truncation_mode,
        )
        score = _score(row.get("preference_score"))
        if chosen.truncated or rejected.truncated:
            report.truncate(number)
        chosen_prompt, chosen_ids = _with_context(chosen)
        rejected_prompt, rejected_ids = _with_context(rejected)
        if (chosen_prompt, chosen_ids) == (rejected_prompt, rejected_ids):
            report.same(number)
        return PreferenceExample(
            number, chosen_prompt, chosen_ids, rejected_prompt, rejected_ids, score
        )

    return build


@dataclass(frozen=True)
class AnswerBuild:
    """Builds judged answers from rows with prompt, completion and label, or from pairs.

    As in TRL, a pair is a good answer and a bad one, each tokenised on its own. The result has a
    place for each answer: None where its prompt leaves it no room.
    """

    settings: DataSettings
    tokenizer: Tokenizer

    def __call__(
        self, number: int, row: RawRow, report: Report
    ) -> tuple[UnpairedExample | None, ...]:
        columns: dict[str, Any] = {"completion": row.get("label")}
        if row.get("completion") is None and {"chosen", "rejected"} & row.keys():
            row = dict(with_explicit_prompt(row))
            columns = {"chosen": True, "rejected": False}
        truncated = False
        faults: list[RowError] = []
        found: list[UnpairedExample | None] = []
        for column, label in columns.items():
            try:
                example, cut = self._answer(number, row, column, label)
            except RowError as error:
                if error.kind != "prompt_too_long":
                    raise
                faults.append(error)
                found.append(None)
                continue
            found.append(example)
            truncated |= cut
        if faults and (len(faults) == len(found) or self.settings.on_bad_row == "error"):
            raise faults[0]
        for fault in faults:
            reason = f"{fault.reason}; the pair's other answer is kept"
            report.drop(number, RowError(fault.kind, reason))
        if truncated:
            report.truncate(number)
        return tuple(found)

    def _answer(
        self,
        number: int,
        row: RawRow,
        column: str,
        label: Any,  # noqa: ANN401 - a cell
    ) -> tuple[UnpairedExample, bool]:
        side = tokenise_answer(
            self.tokenizer,
            row,
            max_length=self.settings.max_length,
            truncation_mode=self.settings.truncation_mode,
            column=column,
        )
        if label is None:
            raise RowError("missing_column", f"no label; the row has {sorted(row)}")
        if label not in (0, 1, False, True):
            raise RowError("mixed_types", f"label must be true or false, not {label!r}")
        return UnpairedExample(number, *_with_context(side), bool(label)), side.truncated


def answers(settings: DataSettings, tokenizer: Tokenizer) -> AnswerBuild:
    """Build judged answers from rows with prompt, completion and label, or from pairs."""
    return AnswerBuild(settings, tokenizer)


def sequences(
    settings: DataSettings, tokenizer: Tokenizer, *, completion_only_loss: bool | None = None
) -> Build[SftExample]:
    """Build sequences from rows with messages, text, or prompt and completion."""

    def build(number: int, row: RawRow, report: Report) -> SftExample:
        tokens = tokenise_sequence(
            tokenizer,
            row,
            max_length=settings.max_length,
            truncation_mode=settings.truncation_mode,
            completion_only=completion_only_loss,
        )
        if tokens.truncated:
            report.truncate(number)
        return SftExample(number, tokens.input_ids, tokens.completion_mask)

    return build


def with_rows(build: Build[Any] | AnswerBuild) -> Build[Any]:
    """Make `build` put each row into its examples: the columns that a reward function is given.

    For held-out rows only: the rows of a large training set would fill the memory. A pair's
    implicit prompt is made explicit; columns that JSON cannot hold are left out.
    """

    def built(number: int, row: RawRow, report: Report) -> Any:  # noqa: ANN401 - as `build`
        made = build(number, row, report)
        sequence = isinstance(made, SftExample)
        if not sequence and row.get("prompt") is None:
            row = dict(with_explicit_prompt(row))
        data = msgspec.json.encode(_json_columns(row))
        if isinstance(made, tuple):
            return tuple(example and replace(example, row_json=data) for example in made)
        return replace(made, row_json=data)

    return built


def _json_columns(row: RawRow) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column, value in row.items():
        try:
            found |= json_row({column: value})
        except RowError:  # an image, say: no reward function of GRPO would be given it either
            continue
    return found


def _with_context(side: SideTokens) -> tuple[list[int], list[int]]:
    """Move the first token to an empty prompt: nothing predicts it (TRL's shift leaves it out)."""
    prompt, completion = side.prompt_ids, side.completion_ids
    if not prompt:
        prompt, completion = completion[:1], completion[1:]
    if not completion:
        raise RowError("empty_answer", "a single token without a prompt: nothing predicts it")
    return prompt, completion


def _score(value: Any) -> float | None:  # noqa: ANN401 - a cell of a dataset
    if value is None:
        return None
    if not isinstance(value, bool) and isinstance(value, int | float):
        with suppress(OverflowError):  # JSON's integers have no bound
            if math.isfinite(value):
                return _not_negative(float(value))
    raise RowError("mixed_types", f"preference_score must be a finite number, not {value!s:.40}")


def _not_negative(score: float) -> float:
    if score < 0:
        reason = f"preference_score must be at least 0, not {score:g}: it is the weight of the pair"
        raise RowError("invalid_score", reason)
    return score
