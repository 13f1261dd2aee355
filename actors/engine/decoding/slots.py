"""Caches that speak mlx-lm's protocol: of prompts being read, and of slots that decode.

A slot is one row of a layer's arrays [rows, heads, capacity, dim]. A completion owns a slot from
its first token to its last: joining is a copy into it, leaving costs nothing, and no other row is
touched. Attention reads the first `columns` positions, those that the longest row needs; what lies
beyond a row's own position is masked, so it may hold anything.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from protocol.errors import ModelError

Mask = mx.array | str | None


@dataclass(frozen=True)
class CacheShape:
    """What one layer caches per position: shapes (heads, dim) of keys and values, and its window.

    `window`: a query sees this many of the last positions, itself included; None: all of them.
    """

    keys: tuple[int, int]
    values: tuple[int, int]
    dtype: mx.Dtype
    window: int | None


def layer_windows(model: nn.Module) -> list[int | None]:
    """Return each cached layer's window; raises ModelError if a cache is of another kind."""
    windows: list[int | None] = []
    for cache in make_prompt_cache(model):
        if type(cache) is KVCache:
            windows.append(None)
        elif type(cache) is RotatingKVCache and not cache.keep:
            windows.append(cache.max_size)
        else:
            raise ModelError(f"its layers keep caches of another kind ({type(cache).__name__})")
    return windows


def cache_shapes(model: nn.Module) -> list[CacheShape]:
    """Return what each layer caches, found by reading one token.

    Raises ModelError if a layer's cache cannot be a slot.
    """
    layers = [PromptLayer(window) for window in layer_windows(model)]
    mx.eval(model(mx.array([[0]]), cache=layers))

    shapes: list[CacheShape] = []
    for layer in layers:
        if layer.keys is None or layer.values is None:
            raise ModelError("a layer's cache is never written")
        _, heads, _, dim = layer.keys.shape
        _, value_heads, _, value_dim = layer.values.shape
        shapes.append(
            CacheShape((heads, dim), (value_heads, value_dim), layer.keys.dtype, layer.window)
        )
    return shapes


class PromptLayer:
    """One layer's keys and values [n, heads, position, dim] of n prompts that are being read.

    Unlike mlx-lm's rotating cache, it keeps all positions of a layer with a window, because prompts
    of different lengths, padded at the end, share the batch.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.offset = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append the keys and values of the next positions; return those of all."""
        if self.keys is not None and self.values is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        self.keys, self.values = keys, values
        self.offset = keys.shape[2]
        return keys, values

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> Mask:
        """Return which positions the next `N` may see."""
        window = window_size or self.window
        if return_array or (window is not None and self.offset + N > window):
            return create_causal_mask(N, self.offset, window_size=window)
        return "causal" if N > 1 else None


class SlotLayer:
    """One layer's slots, as a decode step of the first n rows sees them.

    `offset` (n,) int32 is each row's position, which its next token takes. `columns`: how many
    positions attention reads; all of `offset` lie below it.
    """

    def __init__(
        self,
        keys: mx.array,
        values: mx.array,
        offset: mx.array,
        *,
        columns: int,
        window: int | None,
    ) -> None:
        self.keys, self.values = keys, values
        self.offset = offset
        self.window = window
        self._columns = columns

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write one position per row (n, heads, 1, dim); return what attention reads."""
        self.keys = _written(self.keys, keys, self.offset)
        self.values = _written(self.values, values, self.offset)
        rows, columns = keys.shape[0], self._columns
        return self.keys[:rows, :, :columns], self.values[:rows, :, :columns]

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array:
        """Return which positions each row may see, (n, 1, 1, columns) bool; `N` is 1."""
        if N != 1:
            raise ModelError(f"slots decode one token at a time, got {N}")

        column = mx.arange(self._columns)[None]
        position = self.offset[:, None]
        mask = column <= position
        window = window_size or self.window
        if window is not None and window < self._columns:
            mask = mask & (column > position - window)
        return mask[:, None, None]


def _written(slots: mx.array, new: mx.array, offset: mx.array) -> mx.array:
    # Both write in place when nothing else holds `slots`. The first is the faster one.
    if new.shape[0] == slots.shape[0]:
        return mx.put_along_axis(slots, offset[:, None, None, None], new, axis=2)
    slots[mx.arange(new.shape[0]), :, offset] = new[:, :, 0]
    return slots


@dataclass(frozen=True)
class Prefix:
    """A prompt that was read: row `index` of a reading's keys and values, one array per layer."""

    keys: list[mx.array]
    values: list[mx.array]
    index: int


class PromptReader:
    """Reads prompts together, padded at the end to the longest, or to `shape` (rows, length)."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        windows: Sequence[int | None],
        *,
        shape: tuple[int, int] | None = None,
    ) -> None:
        self._model = model
        self._lengths = [len(prompt) for prompt in prompts]
        rows, length = shape or (len(prompts), max(self._lengths))
        padded = np.zeros((rows, length), np.int32)
        for row, prompt in zip(padded, prompts, strict=False):
            row[: len(prompt)] = prompt
        self._tokens = mx.array(padded)
        self._layers = [PromptLayer(window) for window in windows]

    @property
    def done(self) -> bool:
        """Whether all prompts have been read; chunks of padding alone are left out."""
        return self._layers[0].offset >= max(self._lengths)

    def read(self, chunk: int) -> int:
        """Read at most `chunk` more tokens, padding included; return the tokens of prompts read."""
        if self.done:
            return 0
        rows, length = self._tokens.shape
        start = self._layers[0].offset
        stop = min(length, start + max(1, chunk // rows))

        # The head is never computed, because nothing asks for the logits.
        self._model(self._tokens[:, start:stop], cache=self._layers)
        mx.async_eval([layer.keys for layer in self._layers])
        mx.async_eval([layer.values for layer in self._layers])
        return sum(max(0, min(length, stop) - start) for length in self._lengths)

    def prefixes(self) -> list[Prefix]:
        """Return what was read of each prompt."""
        keys = [layer.keys for layer in self._layers if layer.keys is not None]
        values = [layer.values for layer in self._layers if layer.values is not None]
        return [Prefix(keys, values, index) for index in range(len(self._lengths))]


class Slots:
    """The slots of all layers. Arrays are made when first needed and grow only in capacity."""

    def __init__(self, shapes: Sequence[CacheShape], rows: int) -> None:
        self._shapes = list(shapes)
        self.rows = rows
        self.capacity = 0
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions per row, keeping what the slots hold."""
        if capacity <= self.capacity:
            return

        old_keys, old_values, held = self.keys, self.values, self.capacity
        self.keys, self.values, self.capacity = [], [], capacity
        for i, shape in enumerate(self._shapes):
            keys = mx.zeros((self.rows, shape.keys[0], capacity, shape.keys[1]), shape.dtype)
            values = mx.zeros((self.rows, shape.values[0], capacity, shape.values[1]), shape.dtype)
            if held:
                keys[:, :, :held] = old_keys[i]
                values[:, :, :held] = old_values[i]
                # One layer at a time, so that old and new exist twice for one layer only.
                mx.eval(keys, values)
                old_keys[i] = old_values[i] = mx.zeros(0)
            self.keys.append(keys)
            self.values.append(values)

    def copy(self, rows: Sequence[int], prefixes: Sequence[Prefix]) -> None:
        """Copy `prefixes`, all of one reading, into `rows`."""
        if not prefixes[0].keys:
            return  # prompts of one token, which decoding reads
        source = mx.array([prefix.index for prefix in prefixes])
        first = rows[0]
        contiguous = list(rows) == list(range(first, first + len(rows)))
        index = slice(first, first + len(rows)) if contiguous else mx.array(list(rows))

        for i in range(len(self._shapes)):
            length = prefixes[0].keys[i].shape[2]
            self.keys[i][index, :, :length] = prefixes[0].keys[i][source]
            self.values[i][index, :, :length] = prefixes[0].values[i][source]

    def layers(self, offset: mx.array, columns: int) -> list[SlotLayer]:
        """Return the layers as a decode step of the first rows sees them."""
        return [
            SlotLayer(keys, values, offset, columns=columns, window=shape.window)
            for keys, values, shape in zip(self.keys, self.values, self._shapes, strict=True)
        ]
