"""Sampled answers of an offline evaluation: greedy, to held-out prompts, by the policy as it is."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import msgspec

from learner.data.examples import E, SftExample
from learner.data.tokens import (
    Json,
    Row,
    RowError,
    Tokenizer,
    check_messages,
    encode,
    render_chat,
    template_options,
)
from protocol.errors import ConfigError

log = logging.getLogger("pippin.data")

DEFAULT_LENGTH = 256


@dataclass
class Answers:
    """Answers held-out prompts with mlx-lm's batch generation, `batch_size` prompts at once.

    `tokenizer` is mlx-lm's TokenizerWrapper. An answer ends at a stop token, which is not part of
    it, or after `max_tokens`. Equal prompts are answered once, examples without one (`prompt_of`)
    never: `check` tells.
    Examples hold their rows (`with_rows`), so that lines hold what a reward function is given.
    """

    model: nn.Module
    tokenizer: Any
    batch_size: int
    max_tokens: int = DEFAULT_LENGTH

    def check(self, examples: Sequence[E]) -> None:
        """Say how many examples ask nothing; raises ConfigError where none asks anything."""
        silent = sum(not prompt_of(example, self.tokenizer) for example in examples)
        if examples and silent == len(examples):
            raise ConfigError(
                f"eval.generate: none of the {silent} held-out rows has a prompt to answer, nor "
                "messages before an assistant's, within data.max_length; leave eval.generate out, "
                "or make prompt and completion of such rows in data.prepare"
            )
        if silent:
            log.info("%d of %d held-out rows have nothing to answer", silent, len(examples))

    def __call__(
        self, examples: Sequence[E], version: int
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return metrics (lengths in tokens) and a line of rollouts.jsonl for each prompt."""
        asked = {tuple(prompt_of(e, self.tokenizer)): e for e in reversed(examples)}
        items = sorted(asked.items(), key=lambda item: item[1].row)
        items = [item for item in items if item[0]]
        training = self.model.training
        self.model.eval()
        lines: list[dict[str, Any]] = []
        for start in range(0, len(items), self.batch_size):
            part = items[start : start + self.batch_size]
            texts, counts = self._generate([list(prompt) for prompt, _ in part])
            for (_, example), text, count in zip(part, texts, counts, strict=True):
                lines.append(self._line(example, text, count, version))
        self.model.train(training)
        if not lines:
            return {}, []
        cut = [line["finish_reasons"][0] == "length" for line in lines]
        lengths = [line["lengths"][0] for line in lines]
        return {
            "eval/completions/mean_length": sum(lengths) / len(lines),
            "eval/completions/clipped_ratio": sum(cut) / len(lines),
        }, lines

    def _generate(self, prompts: list[list[int]]) -> tuple[list[str], list[int]]:
        from mlx_lm.generate import batch_generate

        response: Any = batch_generate(
            self.model,
            self.tokenizer,
            prompts,
            max_tokens=self.max_tokens,
            return_token_ids=True,
            completion_batch_size=self.batch_size,
        )
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in response.token_ids]
        return texts, [len(ids) for ids in response.token_ids]

    def _line(self, example: E, text: str, count: int, version: int) -> dict[str, Any]:
        columns = _columns(example)
        asked = _question(columns)
        columns.pop("prompt", None)
        return {
            "kind": "eval",
            "trained_at": version,
            "row": example.row,
            "prompt": asked,
            "completions": [text],
            "lengths": [count],
            "finish_reasons": ["length" if count >= self.max_tokens else "stop"],
            "columns": columns,
        }


def prompt_of(example: Any, tokenizer: Tokenizer) -> list[int]:  # noqa: ANN401 - any example
    """Return the tokens that an example asks for an answer to; none where it asks nothing.

    Of a sequence, they stand before its first counted token; where every token counts, they are
    those of its row's prompt or of the messages before the last assistant's, unless truncation left
    of the row less than that.
    """
    if not isinstance(example, SftExample):
        return example.prompt_ids
    before = example.completion_mask.index(1)
    if before:
        return example.input_ids[:before]
    row = _columns(example)
    asked = _question(row)
    try:
        ids = _asked_ids(tokenizer, row, asked)
    except RowError:  # a template that takes the conversation, but not its beginning
        return []
    return ids if len(ids) <= example.length else []


def _asked_ids(tokenizer: Tokenizer, row: Row, asked: Json) -> list[int]:
    if not asked:
        return []
    if isinstance(asked, str):
        return encode(tokenizer, asked)
    messages = check_messages(asked, "the prompt")
    return render_chat(tokenizer, messages, template_options(row), add_generation_prompt=True)


def _question(row: Row) -> Json:
    """Return a row's prompt, or its messages before the assistant's last; None without either."""
    if row.get("prompt") is not None:
        return row["prompt"]
    messages = row.get("messages") or []
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1]] if answers else None


def _columns(example: Any) -> dict[str, Any]:  # noqa: ANN401 - any example
    if example.row_json is None:
        raise TypeError(f"the example of row {example.row} was not built by `with_rows`")
    return msgspec.json.decode(example.row_json)
