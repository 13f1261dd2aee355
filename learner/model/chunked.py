"""Log-probs, entropies and metrics of tokens through a head, chunk by chunk.

MLX evaluates breadth-first, so the chunks are chained with `mx.depends`: without that, the logits
of all chunks would be alive at once.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUntypedFunctionDecorator=false
# (mlx is only partly typed)

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from learner.model.head import SplitModel, logits_of
from protocol.model.snapshots import trainable

CHUNK = 128  # tokens whose logits exist at once
LEAST = -1e3  # lower log-probs are raised to this: its exp is 0 in float32 too


class TokenScores(NamedTuple):
    """Scores of target tokens: four float32 arrays of one shape, zeros where not requested.

    All are of logits / temperature.
    """

    logprobs: mx.array  # of the targets, nats
    entropies: mx.array  # of the whole distribution, nats
    mean_logits: mx.array  # over the vocabulary
    top1: mx.array  # 1 where the target has the largest logit, and is the first that has it


def chunked_logprobs(
    split: SplitModel,
    hidden: mx.array,
    targets: mx.array,
    *,
    inverse_temperature: float,
    entropy: bool,
    entropy_gradient: bool,
    logit_metrics: bool,
    gradient: bool,
) -> TokenScores:
    """Return scores (N,) of `targets` (N,) int32 after `hidden` (N, D), computed in chunks.

    Entropies are zeros without `entropy` and carry a gradient only with `entropy_gradient`;
    `mean_logits` and `top1` are zeros without `logit_metrics` and never carry one.
    """

    def stats(logits: mx.array, chunk_targets: mx.array) -> _Stats:
        return _Stats(logits, chunk_targets, inverse_temperature, entropy, logit_metrics)

    factor = -inverse_temperature  # left out of the slopes of `_Stats`
    owner = split.owner(hidden) if gradient else nn.Module()
    if not gradient:
        outputs = _by_chunk(
            lambda chunk, of: stats(logits_of(split.head, chunk), of).values(), hidden, targets
        )
    elif trainable(owner):
        outputs = _recomputed(split.head, owner, hidden, targets, stats, factor, entropy_gradient)
    else:
        outputs = _built_forward(split.head, hidden, targets, stats, factor, entropy_gradient)

    return token_scores(*outputs, entropy_gradient=entropy_gradient)


def token_scores(
    logprobs: mx.array, entropies: mx.array, *metrics: mx.array, entropy_gradient: bool
) -> TokenScores:
    """Return scores with gradients only where wanted, and zeros where `metrics` are missing."""
    if not entropy_gradient:
        entropies = mx.stop_gradient(entropies)
    if not metrics:
        return TokenScores(logprobs, entropies, *[mx.zeros_like(logprobs)] * 2)
    return TokenScores(logprobs, entropies, *(mx.stop_gradient(metric) for metric in metrics))


class _Stats:
    """Scores of n tokens, and the gradients of the first two with respect to the logits."""

    def __init__(
        self,
        logits: mx.array,
        targets: mx.array,
        inverse_temperature: float,
        entropy: bool,
        logit_metrics: bool,
    ) -> None:
        # Most arrays here are (n, V), and on CPU about ten of them wait in the queue: avoid copies.
        plain = inverse_temperature == 1.0
        scaled = logits.astype(mx.float32)
        scaled = scaled if plain else scaled * inverse_temperature
        self.logits = logits if plain else scaled
        self.dtype = logits.dtype
        self.targets = targets[:, None]

        self.total = mx.logsumexp(scaled, axis=-1, keepdims=True)
        self.logprobs = mx.take_along_axis(scaled, self.targets, axis=-1) - self.total
        self.logprobs = self.logprobs.squeeze(-1)

        self.entropies = (
            entropies_of(scaled, self.total) if entropy else mx.zeros_like(self.logprobs)
        )
        self.metrics = logit_metrics_of(logits, scaled, targets) if logit_metrics else []

    def values(self) -> list[mx.array]:
        """Return all requested scores."""
        return [self.logprobs, self.entropies, *self.metrics]

    def logprobs_slope(self) -> mx.array:
        """Return p minus one-hot (n, V), in the logits' dtype: -T times each log-prob's gradient.

        The target's p - 1 is computed from the log-prob, because where p is near 1 the difference
        would lose all its digits.
        """
        p = mx.softmax(self.logits, axis=-1, precise=True).astype(self.dtype)
        target = mx.expm1(self.logprobs[:, None]).astype(self.dtype)
        return mx.put_along_axis(p, self.targets, target, axis=-1)

    def entropies_slope(self) -> mx.array:
        """Return p (log p + H) (n, V), in the logits' dtype: -T times each entropy's gradient."""
        logs = mx.maximum(self.logits.astype(mx.float32) - self.total, LEAST)
        return (mx.exp(logs) * (logs + self.entropies[:, None])).astype(self.dtype)


def entropies_of(scaled: mx.array, total: mx.array) -> mx.array:
    """Return the entropies (…), nats, of float32 logits (…, V) with log-sum-exps (…, 1).

    Logits of -inf, with which some models mask tokens, contribute nothing: 0 log 0 is 0.
    """
    logs = mx.maximum(scaled - total, LEAST)
    return -(mx.exp(logs) * logs).sum(axis=-1)


def logit_metrics_of(logits: mx.array, scaled: mx.array, targets: mx.array) -> list[mx.array]:
    """Return `mean_logits` of the `scaled` (…, V) logits, and `top1` of the logits as they are."""
    top1 = mx.argmax(logits, axis=-1) == targets
    return [scaled.mean(axis=-1), top1.astype(mx.float32)]


_StatsOf = Callable[[mx.array, mx.array], _Stats]


def _chunk(
    hidden: mx.array, targets: mx.array, start: int, previous: list[mx.array]
) -> tuple[mx.array, mx.array]:
    """Return the chunk from `start` of both arrays, not evaluated before `previous`.

    The targets wait as well, because arrays of (n, V) are made from them too.
    """
    stop = start + _size()
    parts = [hidden[start:stop], targets[start:stop]]
    if previous:
        parts = [cast(mx.array, mx.depends(part, previous)) for part in parts]
    return parts[0], parts[1]


def _size() -> int:
    """Return the number of tokens per chunk on the default device."""
    # The CPU's queue holds about ten operations, so the arrays of several chunks exist at once.
    # CUDA needs larger products to be busy: on an H200 a step takes 8% longer with 128 than 256.
    if mx.default_device().type == mx.DeviceType.cpu:
        return CHUNK // 2
    return 2 * CHUNK if mx.cuda.is_available() else CHUNK


def _starts(array: mx.array) -> range:
    return range(0, array.shape[0], _size())


def _by_chunk(
    scores: Callable[[mx.array, mx.array], list[mx.array]], hidden: mx.array, targets: mx.array
) -> list[mx.array]:
    """Return the `scores` of each chunk of hidden states and targets, joined."""
    columns: list[list[mx.array]] = []
    for start in _starts(hidden):
        previous = columns[-1] if columns else []
        columns.append(scores(*_chunk(hidden, targets, start, previous)))
    return [mx.concatenate(list(column)) for column in zip(*columns, strict=True)]


def _built_forward(
    head: nn.Module,
    hidden: mx.array,
    targets: mx.array,
    stats: _StatsOf,
    factor: float,
    entropy_gradient: bool,
) -> list[mx.array]:
    """Frozen head: compute the gradient (N, D) along with the values; the vjp only scales it."""

    def scores(chunk: mx.array, chunk_targets: mx.array) -> list[mx.array]:
        result = stats(logits_of(head, chunk), chunk_targets)
        slopes = [_pull(head, chunk, result.logprobs_slope())]
        if entropy_gradient:
            slopes.append(_pull(head, chunk, result.entropies_slope()))
        return [result.logprobs, result.entropies, *slopes, *result.metrics]

    @mx.custom_function
    def both(hidden: mx.array, targets: mx.array) -> list[mx.array]:
        return _by_chunk(scores, hidden, targets)

    @both.vjp
    def scale(
        primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        slope = outputs[2] * (cotangents[0] * factor)[:, None]
        if entropy_gradient:
            slope = slope + outputs[3] * (cotangents[1] * factor)[:, None]
        return slope.astype(primals[0].dtype), mx.zeros_like(primals[1])

    logprobs, entropies, _, *rest = cast(list[mx.array], both(hidden, targets))
    return [logprobs, entropies, *rest[int(entropy_gradient) :]]


def _recomputed(
    head: nn.Module,
    owner: nn.Module,
    hidden: mx.array,
    targets: mx.array,
    stats: _StatsOf,
    factor: float,
    entropy_gradient: bool,
) -> list[mx.array]:
    """Trainable head: the backward pass recomputes the logits and sums gradients over chunks."""
    held = trainable(owner)

    def logits(hidden: mx.array, *parameters: mx.array) -> mx.array:
        owner.update(tree_unflatten(list(zip(held, parameters, strict=True))))
        out = logits_of(head, hidden)
        owner.update(tree_unflatten(list(held.items())))  # do not keep the arrays of a trace
        return out

    @mx.custom_function
    def values(hidden: mx.array, targets: mx.array, *parameters: mx.array) -> list[mx.array]:
        return _by_chunk(
            lambda chunk, of: stats(logits(chunk, *parameters), of).values(), hidden, targets
        )

    @values.vjp
    def again(
        primals: list[mx.array], cotangents: list[mx.array], _: list[mx.array]
    ) -> tuple[mx.array, ...]:
        hidden, targets, *parameters = primals
        slopes: list[mx.array] = []
        sums: list[mx.array] = [mx.zeros(p.shape, mx.float32) for p in parameters]

        for start in _starts(hidden):
            stop = start + _size()
            chunk, chunk_targets = _chunk(hidden, targets, start, sums + slopes[-1:])
            result = stats(logits(chunk, *parameters), chunk_targets)

            pull = result.logprobs_slope() * (cotangents[0][start:stop, None] * factor)
            if entropy_gradient:
                slope = result.entropies_slope()
                pull = pull + slope * (cotangents[1][start:stop, None] * factor)
            pull = pull.astype(result.dtype)

            _, grads = mx.vjp(logits, [chunk, *parameters], [pull])
            slopes.append(grads[0])
            sums = [total + grad for total, grad in zip(sums, grads[1:], strict=True)]

        to_parameters = [s.astype(p.dtype) for s, p in zip(sums, parameters, strict=True)]
        return (mx.concatenate(slopes), mx.zeros_like(targets), *to_parameters)

    return cast(list[mx.array], values(hidden, targets, *held.values()))


def _pull(head: nn.Module, hidden: mx.array, cotangent: mx.array) -> mx.array:
    """Return the vector-Jacobian product of the head at `hidden`: (n, V) to (n, D)."""
    _, (slope,) = mx.vjp(partial(logits_of, head), [hidden], [cotangent])
    return slope
