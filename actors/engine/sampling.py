"""Keyed sampling of a batch of rows, with the log-probs of what was sampled.

A row's random numbers depend on its seed and the token's index alone, so that a completion does
not depend on what it is batched with. Filters apply in the order of transformers' generate (which
TRL uses): temperature, top-k, top-p of what top-k left, min-p; ties with the last kept token stay.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from protocol.messages.parts import Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Mix (N,) uint64 into (N,) uint64 (Steele, Lea and Flood 2014, the output function)."""
    z = values + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def row_seed(seed: int, position: int) -> int:
    """Return the 64-bit seed of completion `position` of a task."""
    mixed = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    return int(splitmix64(mixed + np.uint64(position))[0])


def token_keys(seeds: np.ndarray, indices: np.ndarray) -> mx.array:
    """Return the keys of the tokens at `indices` (N,) of rows `seeds` (N,): (N, 2) uint32."""
    mixed = splitmix64(seeds ^ splitmix64(indices.astype(np.uint64)))
    return mx.array(mixed.view(np.uint32).reshape(-1, 2))


@dataclass(frozen=True)
class RowParameters:
    """How the B rows of a batch are sampled, as columns (B, 1). None: off for every row."""

    scale: mx.array | None  # 1 / temperature, 1 for greedy rows
    greedy: mx.array | None
    all_greedy: bool
    top_k: mx.array | None
    top_p: mx.array | None
    log_min_p: mx.array | None

    @classmethod
    def of(cls, rows: Sequence[Sampling], vocab_size: int) -> "RowParameters":
        """Gather the parameters of the rows of a batch."""

        def column(values: list[float]) -> mx.array:
            return mx.array(values, dtype=mx.float32)[:, None]

        greedy = [s.temperature == 0 for s in rows]
        top_k = [min(s.top_k or vocab_size, vocab_size) for s in rows]
        min_p = [s.min_p or 0.0 for s in rows]
        drawn = [s for s in rows if s.temperature > 0]
        return cls(
            scale=column([1 / s.temperature if s.temperature else 1.0 for s in rows])
            if any(s.temperature not in (0, 1) for s in rows)
            else None,
            greedy=mx.array(greedy) if any(greedy) else None,
            all_greedy=all(greedy),
            top_k=mx.array(top_k)[:, None] if any(s.top_k for s in drawn) else None,
            top_p=column([s.top_p for s in rows]) if any(s.top_p < 1 for s in drawn) else None,
            log_min_p=column([math.log(p) if p else -math.inf for p in min_p])
            if any(s.min_p for s in drawn)
            else None,
        )

    @property
    def filtered(self) -> bool:
        """Whether a filter is in force in any row."""
        return not (self.top_k is None and self.top_p is None and self.log_min_p is None)


@dataclass(frozen=True)
class Draw:
    """Sampled tokens (B,), their log-probs (B,) float32, nats, and the kept log-mass (B,)."""

    tokens: mx.array
    logprobs: mx.array
    kept_logmass: mx.array | None


def has_filter(sampling: Sampling) -> bool:
    """Whether `kept_logmass` is recorded for such a completion."""
    filters = sampling.top_p < 1 or sampling.top_k > 0 or bool(sampling.min_p)
    return sampling.temperature > 0 and filters


def draw(logprobs: mx.array, keys: mx.array, rows: RowParameters) -> Draw:
    """Sample one token a row with `keys` (B, 2); greedy rows take the argmax.

    `logprobs` (B, V) float32, nats, are normalised, at temperature 1. The log-probs returned are
    those of the distribution at the row's temperature (1 for greedy rows), before any filter.
    """
    if rows.scale is not None:
        scaled = logprobs * rows.scale
        logprobs = scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)
    kept_logmass = None
    candidates = logprobs
    if rows.filtered and not rows.all_greedy:
        kept = logprobs >= _threshold(logprobs, rows)
        candidates = mx.where(kept, logprobs, -mx.inf)
        kept_logmass = mx.logsumexp(candidates, axis=-1)
    if rows.all_greedy:
        tokens = mx.argmax(logprobs, axis=-1)
    else:
        tokens = mx.vmap(_categorical)(candidates, keys)
        if rows.greedy is not None:
            tokens = mx.where(rows.greedy, mx.argmax(logprobs, axis=-1), tokens)
    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return Draw(tokens, chosen, kept_logmass)


def _categorical(logprobs: mx.array, key: mx.array) -> mx.array:
    return mx.random.categorical(logprobs, key=key)


def _threshold(logprobs: mx.array, rows: RowParameters) -> mx.array:
    """Return the log-prob (B, 1) below which tokens are left out."""
    threshold = mx.full((logprobs.shape[0], 1), -mx.inf)
    if rows.top_k is not None or rows.top_p is not None:
        ordered = -mx.sort(-logprobs, axis=-1)
        count = mx.full(threshold.shape, logprobs.shape[-1], dtype=mx.int32)
        if rows.top_k is not None:
            count = rows.top_k
        if rows.top_p is not None:
            rank = mx.arange(logprobs.shape[-1])[None]
            mass = mx.where(rank < count, mx.exp(ordered), 0.0)
            cumulative = mx.cumsum(mass, axis=-1)
            before = (cumulative - mass) / cumulative[:, -1:]
            # A row without top-p (1.0) must not lose tokens to the rounding of the sum.
            inside = (before < rows.top_p) | (rows.top_p >= 1)
            count = mx.minimum(mx.maximum(inside.sum(axis=-1, keepdims=True), 1), count)
        threshold = mx.take_along_axis(ordered, count - 1, axis=-1)
    if rows.log_min_p is not None:
        threshold = mx.maximum(threshold, logprobs.max(axis=-1, keepdims=True) + rows.log_min_p)
    return threshold
