"""The prompt of a group once for all its completions.

The first pass runs the prompt without its last token as a batch of one; the second runs rows of
that last token and a completion. mlx-lm's layers ask their cache for the keys and values to attend
to, for a position and for a mask, so that two cache objects connect the passes: `Recorder` keeps a
layer's keys and values as nodes of the graph, `Prefix` puts them before each row's own. Gradients
pass through both, and prompt and completions see what they would see in one sequence.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from learner.model.batches import Float32Array, TokenBatch, Tokens, bucketed, token_batch
from protocol.errors import ModelError

Mask = mx.array | Literal["causal"]


class SharedPrompt(NamedTuple):
    """A prompt without its last token, padded on the right: no token looks at what follows it."""

    prompt_ids: mx.array  # (1, K) int32
    prompt_length: mx.array  # () int32, at most K; an array, so that a trace serves all lengths


def shared_prompt(prompt: Tokens, length_bucket: int) -> SharedPrompt:
    """Return all but the last token of `prompt`; K is a multiple of `length_bucket`."""
    length = len(prompt) - 1
    input_ids = np.zeros((1, bucketed(length, length_bucket)), np.int32)
    input_ids[0, :length] = prompt[:-1]
    return SharedPrompt(mx.array(input_ids), mx.array(length, mx.int32))


def group_batch(
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    *,
    masks: Sequence[Float32Array],
    length_bucket: int,
    one_prompt: bool,
) -> tuple[TokenBatch, SharedPrompt | None]:
    """Pad rows as `token_batch` does, or apart from the prompt where that makes fewer tokens.

    `one_prompt`: the first prompt is that of all rows, except of those whose completion is empty.
    """
    whole = token_batch(prompts, completions, length_bucket=length_bucket, masks=masks)
    if not one_prompt:
        return whole, None
    prompt, last = shared_prompt(prompts[0], length_bucket), [prompts[0][-1:]] * len(prompts)
    own = token_batch(last, completions, length_bucket=length_bucket, masks=masks)
    if prompt.prompt_ids.size + own.input_ids.size < whole.input_ids.size:
        return own, prompt
    return whole, None


def after_prompt(
    network: Callable[..., mx.array], layers: int, prompt: SharedPrompt, input_ids: mx.array
) -> mx.array:
    """Return what `network` gives for rows `input_ids` (B, T) int32 that go on from `prompt`.

    `network` is a model or its trunk, with `layers` layers; the result is (B, T, ...).
    Raises ModelError where its layers do not attend to their caches as plain attention does.
    """
    recorders = [Recorder() for _ in range(layers)]
    network(prompt.prompt_ids, cache=recorders)
    prefixes: list[Prefix] = []
    for recorder in recorders:
        keys, values = recorder.recorded()
        prefixes.append(Prefix(keys, values, prompt.prompt_length))
    return network(input_ids, cache=prefixes)


class Recorder:
    """The cache of a layer in the first pass."""

    offset = 0

    def __init__(self) -> None:
        self._recorded: list[mx.array] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep the layer's keys and values, (1, H, K, D) each; returns them."""
        self.record([keys, values])
        return keys, values

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> Mask:
        """Return the causal mask of the prompt."""
        _refuse_windows(window_size)
        return _causal(length) if return_array else "causal"

    def record(self, arrays: Sequence[mx.array]) -> None:
        """Keep keys and values."""
        self._recorded = list(arrays)

    def recorded(self) -> list[mx.array]:
        """Return keys and values."""
        if not self._recorded:
            raise ModelError("A layer has written nothing to its cache")
        return self._recorded


class Prefix(NamedTuple):
    """The cache of a layer in the second pass; a tuple, so that keys and values are seen in it."""

    keys: mx.array  # (1, H, K, D)
    values: mx.array  # (1, H, K, D')
    offset: mx.array  # () int32: the position of a row's first token

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the prompt's keys and values before the rows' own (B, H, T, D)."""
        return _joined(self.keys, keys), _joined(self.values, values)

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Return (T, K + T) bool: a token sees the prompt's real tokens and its row up to itself.

        An array whether `return_array` or not, for "causal" would let it see the padding.
        """
        _refuse_windows(window_size)
        real = mx.arange(self.keys.shape[-2]) < self.offset
        real = mx.broadcast_to(real[None], (length, real.shape[0]))
        return mx.concatenate([real, _causal(length)], axis=1)


def _joined(prompt: mx.array, own: mx.array) -> mx.array:
    repeated = mx.broadcast_to(prompt, (own.shape[0], *prompt.shape[1:]))
    return mx.concatenate([repeated, own], axis=-2)


def _causal(length: int) -> mx.array:
    here = mx.arange(length)
    return here[:, None] >= here[None]


def _refuse_windows(size: int | None) -> None:
    if size is not None:
        raise ModelError(f"Its layers attend to a window of {size} tokens")
