"""Sampled answers of an offline evaluation: greedy, to held-out prompts, by the policy as it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import msgspec

from learner.sources.examples import E, SftExample

DEFAULT_LENGTH = 256


@dataclass
class Answers:
    """Answers held-out prompts with mlx-lm's batch generation, `batch_size` prompts at once.

    `tokenizer` is mlx-lm's TokenizerWrapper. An answer ends at a stop token, which is not part of
    it, or after `max_tokens`. Equal prompts are answered once, examples without a prompt never.
    Examples hold their rows (`with_rows`), so that lines hold what a reward function is given.
    """

    model: nn.Module
    tokenizer: Any
    batch_size: int
    max_tokens: int = DEFAULT_LENGTH

    def __call__(
        self, examples: Sequence[E], version: int
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return metrics (lengths in tokens) and a line of rollouts.jsonl for each prompt."""
        asked = {tuple(prompt_of(e)): e for e in reversed(examples) if prompt_of(e)}
        items = sorted(asked.items(), key=lambda item: item[1].row)
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
        if example.row_json is None:
            raise TypeError(f"the example of row {example.row} was not built by `with_rows`")
        columns: dict[str, Any] = msgspec.json.decode(example.row_json)
        return {
            "kind": "eval",
            "trained_at": version,
            "row": example.row,
            "prompt": columns.pop("prompt"),
            "completions": [text],
            "lengths": [count],
            "finish_reasons": ["length" if count >= self.max_tokens else "stop"],
            "columns": columns,
        }


def prompt_of(example: Any) -> list[int]:  # noqa: ANN401 - any example
    """Return an example's prompt; of a sequence, what stands before its first counted token."""
    if isinstance(example, SftExample):
        return example.input_ids[: example.completion_mask.index(1)]
    return example.prompt_ids
