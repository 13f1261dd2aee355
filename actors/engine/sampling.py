"""Samples one token per completion of a batch: temperature, top-k, top-p, min-p, keyed draw.

`draw` is the whole step; `_filter_threshold` applies top-k, top-p and min-p. They apply in the
order of transformers' generate, which TRL uses: temperature, top-k, top-p over what top-k leaves,
min-p. Tokens tied with the last one kept are kept too.

The random numbers of a completion depend on its seed and the token's index only, so a completion
does not depend on what it is batched with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from protocol.messages.parts import Sampling

UInt64Array = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(values: UInt64Array) -> UInt64Array:
    """Mix (N,) uint64 into (N,) uint64: SplitMix64's output function (Steele et al., 2014)."""
    z = values + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def completion_seed(seed: int, position: int) -> int:
    """Return the 64-bit seed of completion `position` of a task."""
    mixed = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    return int(splitmix64(mixed + np.uint64(position))[0])


def token_keys(seeds: UInt64Array, indices: npt.NDArray[np.integer]) -> mx.array:
    """Return the random keys (N, 2) uint32 of the tokens at `indices` (N,), one per seed (N,)."""
    mixed = splitmix64(seeds ^ splitmix64(indices.astype(np.uint64)))
    return mx.array(mixed.view(np.uint32).reshape(-1, 2))


@dataclass(frozen=True)
class SamplingParameters:
    """How the B completions of a batch are sampled, as columns (B, 1).

    A column is None where no completion of the batch uses it.
    """

    scale: mx.array | None  # 1 / temperature, 1 for greedy completions
    greedy: mx.array | None
    all_greedy: bool
    top_k: mx.array | None
    top_p: mx.array | None
    log_min_p: mx.array | None

    @classmethod
    def of(cls, samplings: Sequence[Sampling], vocab_size: int) -> "SamplingParameters":
        """Gather the parameters of a batch's completions."""
        greedy = [s.temperature == 0 for s in samplings]
        drawn = [s for s in samplings if s.temperature > 0]  # greedy ones ignore the filters

        scale = top_k = top_p = log_min_p = None
        if any(s.temperature not in (0, 1) for s in samplings):
            scale = _column([1 / s.temperature if s.temperature else 1.0 for s in samplings])
        if any(s.top_k for s in drawn):
            top_k = mx.array([min(s.top_k or vocab_size, vocab_size) for s in samplings])[:, None]
        if any(s.top_p < 1 for s in drawn):
            top_p = _column([s.top_p for s in samplings])
        if any(s.min_p for s in drawn):
            log_min_p = _column([math.log(s.min_p) if s.min_p else -math.inf for s in samplings])

        return cls(
            scale=scale,
            greedy=mx.array(greedy) if any(greedy) else None,
            all_greedy=all(greedy),
            top_k=top_k,
            top_p=top_p,
            log_min_p=log_min_p,
        )


def _column(values: list[float]) -> mx.array:
    return mx.array(values, dtype=mx.float32)[:, None]


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


def draw(logprobs: mx.array, keys: mx.array, parameters: SamplingParameters) -> Draw:
    """Sample one token per completion with `keys` (B, 2); greedy ones take the argmax.

    `logprobs` (B, V) float32, nats, are normalised, at temperature 1. The log-probs returned are
    those of the distribution at the completion's temperature (1 where greedy), before any filter.
    """
    if parameters.scale is not None:
        scaled = logprobs * parameters.scale
        logprobs = scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)

    kept_logmass = None
    candidates = logprobs
    filters = (parameters.top_k, parameters.top_p, parameters.log_min_p)
    if not parameters.all_greedy and any(column is not None for column in filters):
        kept = logprobs >= _filter_threshold(logprobs, parameters)
        candidates = mx.where(kept, logprobs, -mx.inf)
        kept_logmass = mx.logsumexp(candidates, axis=-1)

    if parameters.all_greedy:
        tokens = mx.argmax(logprobs, axis=-1)
    else:
        tokens = mx.vmap(_categorical)(candidates, keys)
        if parameters.greedy is not None:
            tokens = mx.where(parameters.greedy, mx.argmax(logprobs, axis=-1), tokens)

    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return Draw(tokens, chosen, kept_logmass)


def _categorical(logprobs: mx.array, key: mx.array) -> mx.array:
    return mx.random.categorical(logprobs, key=key)


def _filter_threshold(logprobs: mx.array, parameters: SamplingParameters) -> mx.array:
    """Return the log-prob (B, 1) below which top-k, top-p and min-p drop a token."""
    threshold = mx.full((logprobs.shape[0], 1), -mx.inf)

    if parameters.top_k is not None or parameters.top_p is not None:
        ordered = -mx.sort(-logprobs, axis=-1)
        count = mx.full(threshold.shape, logprobs.shape[-1], dtype=mx.int32)
        if parameters.top_k is not None:
            count = parameters.top_k
        if parameters.top_p is not None:
            count = _top_p_count(ordered, count, parameters.top_p)
        threshold = mx.take_along_axis(ordered, count - 1, axis=-1)

    if parameters.log_min_p is not None:
        highest = logprobs.max(axis=-1, keepdims=True)
        threshold = mx.maximum(threshold, highest + parameters.log_min_p)

    return threshold


def _top_p_count(ordered: mx.array, count: mx.array, top_p: mx.array) -> mx.array:
    """Return how many of the first `count` (B, 1) tokens top-p keeps: the fewest that hold it.

    `ordered` (B, V) are log-probs in descending order; masses are relative to those of the first
    `count` tokens.
    """
    rank = mx.arange(ordered.shape[-1])[None]
    mass = mx.where(rank < count, mx.exp(ordered), 0.0)
    cumulative = mx.cumsum(mass, axis=-1)
    before = (cumulative - mass) / cumulative[:, -1:]

    # A completion without top-p (1.0) must not lose tokens to the rounding of the sum.
    inside = (before < top_p) | (top_p >= 1)
    return mx.minimum(mx.maximum(inside.sum(axis=-1, keepdims=True), 1), count)
