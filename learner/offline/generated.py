"""Greedy answers to held-out prompts, in an offline evaluation."""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.nn as nn
import msgspec

from learner.data.examples import E, Example, SftExample
from learner.data.rows import Json, Row, RowError
from learner.data.tokens import (
    Messages,
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

    `tokenizer` is mlx-lm's TokenizerWrapper. An answer ends before a stop token, or after
    `max_tokens`. Equal prompts are answered once; examples without a prompt (see `prompt_of`) are
    left out. Examples must hold their rows (`with_rows`), because the lines do: reward functions
    read them.
    """

    model: nn.Module
    tokenizer: Tokenizer
    batch_size: int
    max_tokens: int = DEFAULT_LENGTH

    def check(self, examples: Sequence[E]) -> None:
        """Log how many examples have no prompt; raise ConfigError if none has one."""
        without = sum(not prompt_of(example, self.tokenizer) for example in examples)
        if examples and without == len(examples):
            raise ConfigError(
                f"eval.generate: none of the {without} held-out rows has a prompt to answer, nor "
                "messages before an assistant's, within data.max_length; leave eval.generate out, "
                "or make prompt and completion of such rows in data.prepare"
            )
        if without:
            log.info("%d of %d held-out rows have no prompt to answer", without, len(examples))

    def __call__(
        self, examples: Sequence[E], version: int
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return metrics (lengths in tokens) and a line of rollouts.jsonl for each prompt."""
        # Of equal prompts the first row's example is kept.
        by_prompt = {tuple(prompt_of(e, self.tokenizer)): e for e in reversed(examples)}
        by_prompt.pop((), None)
        items = sorted(by_prompt.items(), key=lambda item: item[1].row)

        training = self.model.training
        self.model.eval()
        lines: list[dict[str, Any]] = []
        for start in range(0, len(items), self.batch_size):
            part = items[start : start + self.batch_size]
            answers = self._generate([list(prompt) for prompt, _ in part])
            for (_, example), ids in zip(part, answers, strict=True):
                lines.append(self._line(example, ids, version))
        self.model.train(training)

        if not lines:
            return {}, []
        clipped = [line["finish_reasons"][0] == "length" for line in lines]
        lengths = [line["lengths"][0] for line in lines]
        return {
            "eval/completions/mean_length": sum(lengths) / len(lines),
            "eval/completions/clipped_ratio": sum(clipped) / len(lines),
        }, lines

    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        from mlx_lm.generate import batch_generate

        response: Any = batch_generate(
            self.model,
            self.tokenizer,
            prompts,
            max_tokens=self.max_tokens,
            return_token_ids=True,
            completion_batch_size=self.batch_size,
        )
        return response.token_ids

    def _line(self, example: Example, ids: list[int], version: int) -> dict[str, Any]:
        row = _row(example)
        prompt = _prompt(row)
        row.pop("prompt", None)
        return {
            "kind": "eval",
            "trained_at": version,
            "row": example.row,
            "prompt": prompt,
            "completions": [self.tokenizer.decode(ids, skip_special_tokens=True)],
            "lengths": [len(ids)],
            "finish_reasons": ["length" if len(ids) >= self.max_tokens else "stop"],
            "columns": row,
        }


def prompt_of(example: Example, tokenizer: Tokenizer) -> list[int]:
    """Return the token IDs of an example's prompt; empty if it has none.

    In a sequence they come before the first token that counts. If every token counts, they are
    those of the row's prompt or of the messages before the last assistant's, unless truncation left
    less of the row than that.
    """
    if not isinstance(example, SftExample):
        return example.prompt_ids
    before = example.completion_mask.index(1)
    if before:
        return example.input_ids[:before]

    row = _row(example)
    prompt = _prompt(row)
    if not prompt:
        return []
    try:
        if isinstance(prompt, str):
            ids = encode(tokenizer, prompt)
        else:
            messages, options = check_messages(prompt, "the prompt"), template_options(row)
            ids = render_chat(tokenizer, messages, options, add_generation_prompt=True)
    except RowError:  # a template that accepts the conversation, but not its beginning
        return []
    return ids if len(ids) <= example.length else []


def _prompt(row: Row) -> Json:
    """Return a row's prompt, or its messages before the assistant's last; None without either."""
    if row.get("prompt") is not None:
        return row["prompt"]
    messages = cast("Messages", row.get("messages") or [])
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1]] if answers else None


def _row(example: Example) -> Row:
    if example.row_json is None:
        raise TypeError(f"the example of row {example.row} was not built by `with_rows`")
    return msgspec.json.decode(example.row_json)
