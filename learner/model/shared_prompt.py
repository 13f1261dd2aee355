"""Computes a group's prompt once for all its completions.

The first pass runs the prompt without its last token as a batch of one; the second runs sequences
of that last token and a completion. mlx-lm's layers ask their cache for the keys and values to
attend to, for a position and for a mask, so two cache objects can connect the passes: `Recorder`
keeps a layer's keys and values as nodes of the graph, `Prefix` puts them before each sequence's
own. Gradients pass through both, and prompt and completions see what they would see in one
sequence.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from learner.model.batches import Float32Array, TokenBatch, Tokens, bucketed, token_batch
from protocol.errors import ModelError

Mask = mx.array | Literal["causal"]


class SharedPrompt(NamedTuple):
    """A prompt without its last token, padded on the right, where no token looks."""

    prompt_ids: mx.array  # (1, K) int32
    prompt_length: mx.array  # () int32, at most K; an array, so that one trace serves all lengths


def shared_prompt(prompt: Tokens, length_bucket: int) -> SharedPrompt:
    """Return `prompt` without its last token; K is a multiple of `length_bucket`."""
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
    """Pad whole sequences like `token_batch`, or without their prompt if that makes fewer tokens.

    `one_prompt`: all sequences with a completion have the first one's prompt.
    """
    whole = token_batch(prompts, completions, length_bucket=length_bucket, masks=masks)
    if not one_prompt:
        return whole, None

    prompt = shared_prompt(prompts[0], length_bucket)
    last = [prompts[0][-1:]] * len(prompts)
    own = token_batch(last, completions, length_bucket=length_bucket, masks=masks)
    if prompt.prompt_ids.size + own.input_ids.size < whole.input_ids.size:
        return own, prompt
    return whole, None


def after_prompt(
    network: Callable[..., mx.array], layers: int, prompt: SharedPrompt, input_ids: mx.array
) -> mx.array:
    """Return the output of `network` for `input_ids` (B, T) int32 that continue `prompt`.

    `network` is a model or its trunk, with `layers` layers; the result is (B, T, ...).
    Raises ModelError if its layers do not use their caches the way plain attention does.
    """
    recorders = [Recorder() for _ in range(layers)]
    network(prompt.prompt_ids, cache=recorders)

    prefixes = [
        Prefix(keys, values, prompt.prompt_length)
        for keys, values in (recorder.recorded() for recorder in recorders)
    ]
    return network(input_ids, cache=prefixes)


class Recorder:
    """A layer's cache in the first pass: records its keys and values."""

    offset = 0

    def __init__(self) -> None:
        self._recorded: list[mx.array] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Record and return the layer's keys and values, (1, H, K, D) each."""
        self.record([keys, values])
        return keys, values

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> Mask:
        """Return the prompt's causal mask."""
        _refuse_windows(window_size)
        return _causal(length) if return_array else "causal"

    def record(self, arrays: Sequence[mx.array]) -> None:
        """Keep keys and values, replacing earlier ones."""
        self._recorded = list(arrays)

    def recorded(self) -> list[mx.array]:
        """Return keys and values. Raises ModelError if the layer gave none."""
        if not self._recorded:
            raise ModelError("A layer has written nothing to its cache")
        return self._recorded


class Prefix(NamedTuple):
    """A layer's cache in the second pass: puts the prompt's keys and values before its own.

    It is a tuple so that MLX's tree functions find the arrays in it.
    """

    keys: mx.array  # (1, H, K, D)
    values: mx.array  # (1, H, K, D')
    offset: mx.array  # () int32: the position of each sequence's first token

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the prompt's keys and values, each followed by the given ones (B, H, T, D)."""
        return _joined(self.keys, keys), _joined(self.values, values)

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Return (T, K + T) bool: a token sees the prompt's real tokens and its own up to itself.

        Always an array, even without `return_array`: "causal" would let tokens see the padding.
        """
        _refuse_windows(window_size)

        real = mx.arange(self.keys.shape[-2]) < self.offset
        real = mx.broadcast_to(real[None], (length, real.shape[0]))
        return mx.concatenate([real, _causal(length)], axis=1)


def _joined(prompt: mx.array, own: mx.array) -> mx.array:
    repeated = mx.broadcast_to(prompt, (own.shape[0], *prompt.shape[1:]))
    return mx.concatenate([repeated, own], axis=-2)


def _causal(length: int) -> mx.array:
    index = mx.arange(length)
    return index[:, None] >= index[None]


def _refuse_windows(size: int | None) -> None:
    if size is not None:
        raise ModelError(f"Its layers attend to a window of {size} tokens")
