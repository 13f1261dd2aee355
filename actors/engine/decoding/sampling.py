"""Samples one token per completion of a batch: temperature, top-k, top-p, min-p, then the draw.

`draw` is the whole step; `_filter_threshold` applies top-k, top-p and min-p. They apply in the
order of transformers' generate, which TRL uses: temperature, top-k, top-p over what top-k leaves,
min-p. Tokens tied with the last one kept are kept too.

A token is drawn by inverting the cumulative distribution in two stages: first a block of the
vocabulary, then a token of that block, by one uniform number each. So one pass over the logits,
which gives every block's logsumexp, is all that a vocabulary-sized array takes.

The random numbers of a completion depend on its seed and the token's index only, and no row is
computed from another, so a completion does not depend on what it is batched with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from protocol.messages.parts import Sampling

UInt64Array = npt.NDArray[np.uint64]
Float32Array = npt.NDArray[np.float32]
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


def token_uniforms(seeds: UInt64Array, indices: npt.NDArray[np.integer]) -> Float32Array:
    """Return two uniform numbers in [0, 1) for each token: (N, 2) float32.

    They depend on the token's index (N,) and its completion's seed (N,) alone. Each column has 24
    bits, the most that float32 holds evenly, from its own half of one 64-bit hash.
    """
    mixed = splitmix64(seeds ^ splitmix64(indices.astype(np.uint64)))
    halves = np.stack([mixed >> np.uint64(40), mixed & np.uint64(0xFFFFFF)], axis=-1)
    return halves.astype(np.float32) * np.float32(2.0**-24)


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

    @property
    def filtered(self) -> bool:
        """Whether a filter applies to any completion."""
        return any(column is not None for column in (self.top_k, self.top_p, self.log_min_p))

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

    def start(self) -> None:
        """Have it computed, without waiting."""
        kept = [] if self.kept_logmass is None else [self.kept_logmass]
        mx.async_eval(  # pyright: ignore[reportUnknownMemberType]
            self.tokens, self.logprobs, *kept
        )


def has_filter(sampling: Sampling) -> bool:
    """Whether `kept_logmass` is recorded for such a completion."""
    filters = sampling.top_p < 1 or sampling.top_k > 0 or bool(sampling.min_p)
    return sampling.temperature > 0 and filters


def draw(logits: mx.array, uniforms: mx.array, parameters: SamplingParameters) -> Draw:
    """Sample one token per completion; greedy ones take the argmax.

    `logits` (B, V) float32 may differ from log-probs by a constant per row. `uniforms` (B, 2)
    float32, in [0, 1), choose the block and the token in it. The log-probs returned are those of
    the distribution at the completion's temperature (1 where greedy), before any filter.

    No token of probability 0 is drawn. Blocks and tokens are chosen in steps of 2**-24 each, so the
    distribution is exact to about 1e-7 per block and 1e-7 of the block's mass per token.

    The function can be compiled: it evaluates nothing, and branches only on which `parameters`
    there are.
    """
    if parameters.scale is not None:
        logits = logits * parameters.scale
    blocks = _blocks(logits)
    masses = mx.logsumexp(blocks, axis=-1)
    total = mx.logsumexp(masses, axis=-1)

    kept_logmass = None
    if parameters.filtered:
        kept = logits >= _filter_threshold(logits, parameters)
        blocks = _blocks(mx.where(kept, logits, -mx.inf))
        masses = mx.logsumexp(blocks, axis=-1)
        kept_logmass = mx.logsumexp(masses, axis=-1) - total

    if parameters.all_greedy:
        tokens = _likeliest(logits)
    else:
        tokens = _drawn(blocks, masses, uniforms)
        if parameters.greedy is not None:
            tokens = mx.where(parameters.greedy, _likeliest(logits), tokens)

    chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return Draw(tokens, chosen - total, kept_logmass)


def _likeliest(logits: mx.array) -> mx.array:
    """Return the argmax (B,) of logits (B, V), the first of equals.

    A maximum per block comes first, because one argmax over a large vocabulary takes as long as
    half of a decode step on a GPU.
    """
    blocks = _blocks(logits)
    block = mx.argmax(blocks.max(axis=-1), axis=-1)
    inside = mx.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * blocks.shape[-1] + mx.argmax(inside, axis=-1)


def _drawn(blocks: mx.array, masses: mx.array, uniforms: mx.array) -> mx.array:
    """Draw tokens (B,) from logits as blocks (B, N, size) with logsumexps `masses` (B, N)."""
    block = _invert(mx.softmax(masses, axis=-1), uniforms[:, :1])
    inside = mx.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token = _invert(mx.softmax(inside, axis=-1), uniforms[:, 1:])
    return block * blocks.shape[-1] + token


def _invert(probabilities: mx.array, uniforms: mx.array) -> mx.array:
    """Return the indices (B,) at which the cumulative sums of (B, N) exceed `uniforms` (B, 1).

    By rounding, the sums of a parallel scan may fall here and there, and end beside 1. So only
    indices of positive probability count, and the uniforms are scaled to the greatest sum among
    them. There always is an index that exceeds it: a float32 number times 1 - 2**-24, the greatest
    uniform, rounds to less than itself.
    """
    sums = mx.where(probabilities > 0, mx.cumsum(probabilities, axis=-1), 0.0)
    reached = sums > uniforms * sums.max(axis=-1, keepdims=True)
    return mx.argmax(reached, axis=-1)


def _blocks(logits: mx.array) -> mx.array:
    """View logits (B, V) as blocks (B, N, size), padded with -inf where size does not divide V."""
    vocab_size = logits.shape[-1]
    size = _block_size(vocab_size)
    if vocab_size % size:
        logits = mx.pad(logits, [(0, 0), (0, -vocab_size % size)], constant_values=-math.inf)
    return mx.unflatten(logits, 1, (-1, size))


@cache
def _block_size(vocab_size: int) -> int:
    """Return a divisor of `vocab_size` within a factor of four of its root, or else the root.

    The larger of two that are equally near is taken.
    """
    root = math.isqrt(vocab_size - 1) + 1
    pairs = ((vocab_size // n, n) for n in range(root, root // 4, -1) if vocab_size % n == 0)
    return max(next(pairs, (root,)))


def _filter_threshold(logits: mx.array, parameters: SamplingParameters) -> mx.array:
    """Return the logit (B, 1) below which top-k, top-p and min-p drop a token."""
    threshold = mx.full((logits.shape[0], 1), -mx.inf)

    if parameters.top_k is not None or parameters.top_p is not None:
        ordered = -mx.sort(-logits, axis=-1)
        count = mx.full(threshold.shape, logits.shape[-1], dtype=mx.int32)
        if parameters.top_k is not None:
            count = parameters.top_k
        if parameters.top_p is not None:
            count = _top_p_count(ordered, count, parameters.top_p)
        threshold = mx.take_along_axis(ordered, count - 1, axis=-1)

    if parameters.log_min_p is not None:
        highest = logits.max(axis=-1, keepdims=True)
        threshold = mx.maximum(threshold, highest + parameters.log_min_p)

    return threshold


def _top_p_count(ordered: mx.array, count: mx.array, top_p: mx.array) -> mx.array:
    """Return how many of the first `count` (B, 1) tokens top-p keeps: the fewest that hold it.

    `ordered` (B, V) are logits in descending order; masses are relative to those of the first
    `count` tokens.
    """
    rank = mx.arange(ordered.shape[-1])[None]
    mass = mx.where(rank < count, mx.exp(ordered - ordered[:, :1]), 0.0)
    cumulative = mx.cumsum(mass, axis=-1)
    before = (cumulative - mass) / cumulative[:, -1:]

    # A completion without top-p (1.0) must not lose tokens to the rounding of the sum.
    inside = (before < top_p) | (top_p >= 1)
    return mx.minimum(mx.maximum(inside.sum(axis=-1, keepdims=True), 1), count)
