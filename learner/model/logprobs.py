"""Log-probs, entropies and metrics of completion tokens, without the logits of the whole batch.

`head = "chunked"` (the default) runs the trunk, picks the hidden states that predict completion
tokens, and passes these through the head a chunk at a time (`learner/model/chunked.py`). `head =
"full"` is the plain way over all logits: the reference for tests, and the way for models that
cannot be split. Logits are computed in the model's dtype and from there on in float32, which is
what the sampler's logits processor sees too.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUntypedFunctionDecorator=false
# (mlx is only partly typed)

from collections.abc import Callable
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from learner.model.chunked import (
    TokenScores,
    chunked_logprobs,
    entropies_of,
    logit_metrics_of,
    token_scores,
)
from learner.model.head import split_head
from learner.model.shared_prompt import SharedPrompt, after_prompt

Head = Literal["chunked", "full"]


def completion_logprobs(
    model: nn.Module,
    input_ids: mx.array,
    positions: mx.array,
    targets: mx.array,
    *,
    prompt: SharedPrompt | None = None,
    temperature: float = 1.0,
    head: Head = "chunked",
    entropy: bool = False,
    entropy_gradient: bool = False,
    logit_metrics: bool = False,
    gradient: bool = True,
) -> TokenScores:
    """Return log-probs of `targets` under logits / `temperature`, and more about that distribution.

    `input_ids` (B, T) int32; `positions` and `targets` (B, C) int32, as in `TokenBatch`. With
    `prompt`, every sequence continues it: its own prompt is the last token alone. All scores are
    (B, C) float32. Entropies are zeros unless `entropy`, and carry a gradient only with
    `entropy_gradient`. `logit_metrics` adds what TRL's `logits/*` and `mean_token_accuracy`
    average. `gradient=False` saves work when no gradient will be taken.
    """

    def run(network: Callable[..., mx.array]) -> mx.array:
        if prompt is None:
            return network(input_ids)
        return after_prompt(network, len(cast(Any, model).layers), prompt, input_ids)

    if head == "full":
        logits = mx.take_along_axis(run(cast(Any, model)), positions[..., None], axis=1)
        return _plain(logits, targets, temperature, entropy, entropy_gradient, logit_metrics)

    split = split_head(model)
    hidden = states_at(run(split.states), positions)
    scores = chunked_logprobs(
        split,
        hidden.reshape(-1, hidden.shape[-1]),
        targets.reshape(-1),
        inverse_temperature=1 / temperature,
        entropy=entropy or entropy_gradient,
        entropy_gradient=entropy_gradient,
        logit_metrics=logit_metrics,
        gradient=gradient,
    )
    return TokenScores(*(values.reshape(targets.shape) for values in scores))


def states_at(states: mx.array, positions: mx.array) -> mx.array:
    """Return the hidden states (B, C, D) of `states` (B, T, D) at `positions` (B, C) int32.

    Completions are contiguous, so the gradient is a gather too, and exact: MLX's own would be a
    scatter with atomic additions. Padding (a position that does not continue the first) sends no
    gradient back.
    """

    @mx.custom_function
    def pick(states: mx.array, positions: mx.array) -> mx.array:
        return mx.take_along_axis(states, positions[..., None], axis=1)

    @pick.vjp
    def put(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        states, positions = primals

        # `token` (B, T): which completion token each state predicts, if it predicts one.
        index = mx.arange(states.shape[1])[None]
        token = index - positions[:, :1]
        inside = (token >= 0) & (token < positions.shape[1])
        token = mx.where(inside, token, 0)
        read = inside & (mx.take_along_axis(positions, token, axis=1) == index)

        slope = mx.take_along_axis(cotangent, token[..., None], axis=1)
        return mx.where(read[..., None], slope, 0), mx.zeros_like(positions)

    return cast(mx.array, pick(states, positions))


def _plain(
    logits: mx.array,
    targets: mx.array,
    temperature: float,
    entropy: bool,
    entropy_gradient: bool,
    logit_metrics: bool,
) -> TokenScores:
    """Return the scores of `targets` (B, C) from their logits (B, C, V) all at once."""
    scaled = logits.astype(mx.float32) * (1 / temperature)
    logprobs = -nn.losses.cross_entropy(scaled, targets)

    entropies = mx.zeros_like(logprobs)
    if entropy or entropy_gradient:
        entropies = entropies_of(scaled, mx.logsumexp(scaled, axis=-1, keepdims=True))

    metrics = logit_metrics_of(logits, scaled, targets) if logit_metrics else []
    return token_scores(logprobs, entropies, *metrics, entropy_gradient=entropy_gradient)
