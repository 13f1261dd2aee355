"""Two-digit addition: the rows and the reward of the embedded default run.

Of the 8,100 sums of two numbers from 10 to 99, 512 are held out and never trained on, neither in
the model's SFT nor in GRPO.
"""

import random
import re
from collections.abc import Iterator
from typing import Any

HELD_OUT = 512


def _pairs() -> list[tuple[int, int]]:
    """Return all pairs in a fixed random order; the first `HELD_OUT` are held out."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(20_260).shuffle(pairs)
    return pairs


def _row(a: int, b: int) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": f"{a}+{b}="}], "answer": str(a + b)}


def train_rows() -> Iterator[dict[str, Any]]:
    """Yield the prompts to train on, with their answers."""
    for a, b in _pairs()[HELD_OUT:]:
        yield _row(a, b)


def held_out_rows() -> Iterator[dict[str, Any]]:
    """Yield the prompts of the evaluation, with their answers."""
    for a, b in _pairs()[:HELD_OUT]:
        yield _row(a, b)


def sft_rows() -> Iterator[dict[str, Any]]:
    """Yield the training pairs as prompt and completion, for SFT."""
    for row in train_rows():
        yield {
            "prompt": row["prompt"],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }


def exact_match(
    completions: list[list[dict[str, str]]], answer: list[str], **_: object
) -> list[float]:
    """Return 1.0 for each completion that is the sum and nothing else, 0.0 for the others."""
    return [
        float(completion[0]["content"].strip() == expected)
        for completion, expected in zip(completions, answer, strict=True)
    ]


def last_number(
    completions: list[list[dict[str, str]]], answer: list[str], **_: object
) -> list[float]:
    """Return 1.0 for each completion whose last number is the sum, 0.0 for the others."""
    return [
        float(re.findall(r"\d+", completion[0]["content"])[-1:] == [expected])
        for completion, expected in zip(completions, answer, strict=True)
    ]
