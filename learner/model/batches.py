"""Prompts and completions as right-padded arrays in bucketed shapes, first in numpy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
Tokens = Sequence[int] | Int32Array


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """B sequences of prompt and completion; T and C are padded to multiples of the bucket.

    The last completion token is in `targets` only, because nothing is predicted from it.
    Padding: `input_ids` 0, `targets` 0, `positions` 0, `mask` 0.
    """

    input_ids: Int32Array  # (B, T) prompt, then completion without its last token
    targets: Int32Array  # (B, C) completion tokens
    positions: Int32Array  # (B, C) index into T of the state that predicts the target
    mask: Float32Array  # (B, C) 1 = the token counts


class TokenArrays(TypedDict):
    """A `TokenBatch` on the device: the arrays that every micro-batch has."""

    input_ids: mx.array  # (B, T) int32
    targets: mx.array  # (B, C) int32
    positions: mx.array  # (B, C) int32
    mask: mx.array  # (B, C) float32


def bucketed(length: int, bucket: int) -> int:
    """Return the smallest positive multiple of `bucket` that holds `length`."""
    return max(1, -(-length // bucket)) * bucket


def padded_size(count: int) -> int:
    """Return the batch size that `count` sequences are padded to: at most a quarter more."""
    step = max(1, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


def token_batch(
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    *,
    length_bucket: int,
    masks: Sequence[Sequence[float] | Float32Array] | None = None,
) -> TokenBatch:
    """Pad B prompts (each at least one token) and their completions (possibly empty).

    `masks` says which completion tokens count; without it, all do. Raises ValueError for an empty
    prompt and for lists of different lengths.
    """
    if not (len(prompts) == len(completions) and (masks is None or len(masks) == len(prompts))):
        raise ValueError(
            f"token_batch needs as many prompts as completions and masks, got {len(prompts)}, "
            f"{len(completions)} and {len(masks) if masks is not None else 'no masks'}"
        )
    pairs = list(zip(prompts, completions, strict=True))

    size = len(pairs)
    width = bucketed(max(len(p) + max(len(c), 1) - 1 for p, c in pairs), length_bucket)
    count = bucketed(max(len(c) for c in completions), length_bucket)
    input_ids = np.zeros((size, width), np.int32)
    targets = np.zeros((size, count), np.int32)
    positions = np.zeros((size, count), np.int32)
    mask = np.zeros((size, count), np.float32)

    for i, (prompt, completion) in enumerate(pairs):
        start, length = len(prompt), len(completion)
        if not start:
            raise ValueError(f"sequence {i} has an empty prompt: its first token has no context")

        input_ids[i, :start] = prompt
        input_ids[i, start : start + max(length, 1) - 1] = completion[:-1]
        targets[i, :length] = completion
        positions[i, :length] = np.arange(start - 1, start - 1 + length)
        mask[i, :length] = 1.0 if masks is None else masks[i]

    return TokenBatch(input_ids=input_ids, targets=targets, positions=positions, mask=mask)


def sequence_batch(
    sequences: Sequence[Tokens],
    *,
    length_bucket: int,
    masks: Sequence[Sequence[float] | Float32Array] | None = None,
) -> TokenBatch:
    """Pad whole sequences for SFT: everything after token 0 is the completion.

    `masks` is per token of the sequence; its entry for token 0 is not used.
    """
    return token_batch(
        [sequence[:1] for sequence in sequences],
        [sequence[1:] for sequence in sequences],
        length_bucket=length_bucket,
        masks=None if masks is None else [mask[1:] for mask in masks],
    )


def to_device(tokens: TokenBatch) -> TokenArrays:
    """Return a token batch as MLX arrays."""
    return {
        "input_ids": mx.array(tokens.input_ids),
        "targets": mx.array(tokens.targets),
        "positions": mx.array(tokens.positions),
        "mask": mx.array(tokens.mask),
    }


def aligned(values: Sequence[Sequence[float] | Float32Array], batch: TokenBatch) -> Float32Array:
    """Pad per-token values of each completion with 0 to (B, C) float32, like `batch.targets`."""
    padded = np.zeros(batch.targets.shape, np.float32)
    for i, line in enumerate(values):
        padded[i, : len(line)] = line
    return padded
