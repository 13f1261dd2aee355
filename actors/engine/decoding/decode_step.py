"""One decode step over slots: the forward pass and the draw, compiled on a GPU."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from actors.engine.decoding.adapters import StackedAdapters
from actors.engine.decoding.cuda_kernels import attend, can_attend
from actors.engine.decoding.sampling import Draw, SamplingParameters, draw
from actors.engine.decoding.slots import CacheShape, SlotLayer, Slots

Arrays = list[mx.array]
_Step = Callable[..., tuple[mx.array, mx.array, mx.array | None, Arrays, Arrays]]


class DecodeStep:
    """Runs the model for one token per row and draws the next ones.

    A compiled step is traced once per number of rows, number of columns and set of sampling
    parameters. The model's weights are among its inputs, so a swap traces nothing anew.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[CacheShape],
        stacks: Sequence[StackedAdapters],
        *,
        compiled: bool,
    ) -> None:
        self._model = model
        self._windows = [layer.window for layer in layers]
        self._state: list[Any] = [model.state, *(stack.state for stack in stacks)]
        self._compiled = compiled
        self._traced: dict[tuple[object, ...], _Step] = {}

    def __call__(
        self,
        tokens: mx.array,
        position: mx.array,
        uniforms: mx.array,
        parameters: SamplingParameters,
        slots: Slots,
        columns: int,
    ) -> Draw:
        """Return the draw for `tokens` (n,) at `position` (n,), and start to compute it.

        Keys and values are written into `slots`, of which attention reads the first `columns`
        positions. `uniforms`: (n, 2).
        """
        arrays = _arrays(parameters)
        step = self._function(columns, parameters, tuple(arrays))
        drawn, logprobs, kept, slots.keys, slots.values = step(
            tokens, position, uniforms, arrays, slots.keys, slots.values
        )

        result = Draw(drawn, logprobs, kept)
        result.start()
        return result

    def _function(
        self, columns: int, parameters: SamplingParameters, names: tuple[str, ...]
    ) -> _Step:
        key = (columns, parameters.all_greedy, names)
        if key not in self._traced:
            step = self._step_of(columns, parameters.all_greedy)
            self._traced[key] = mx.compile(step, inputs=self._state) if self._compiled else step
        return self._traced[key]

    def _step_of(self, columns: int, all_greedy: bool) -> _Step:
        def step(
            tokens: mx.array,
            position: mx.array,
            uniforms: mx.array,
            arrays: dict[str, mx.array],
            keys: Arrays,
            values: Arrays,
        ) -> tuple[mx.array, mx.array, mx.array | None, Arrays, Arrays]:
            layers = [
                SlotLayer(k, v, position, columns=columns, window=window)
                for k, v, window in zip(keys, values, self._windows, strict=True)
            ]
            with _masked_attention_replaced():
                logits = self._model(tokens[:, None], cache=layers)
            result = draw(
                logits[:, -1].astype(mx.float32), uniforms, _parameters(arrays, all_greedy)
            )
            return (
                result.tokens,
                result.logprobs,
                result.kept_logmass,
                [layer.keys for layer in layers],
                [layer.values for layer in layers],
            )

        return step


def _arrays(parameters: SamplingParameters) -> dict[str, mx.array]:
    values = {each.name: getattr(parameters, each.name) for each in fields(parameters)}
    return {name: value for name, value in values.items() if isinstance(value, mx.array)}


def _parameters(arrays: dict[str, mx.array], all_greedy: bool) -> SamplingParameters:
    names = [each.name for each in fields(SamplingParameters) if each.name != "all_greedy"]
    columns: dict[str, Any] = {name: arrays.get(name) for name in names}
    return SamplingParameters(all_greedy=all_greedy, **columns)


@contextmanager
def _masked_attention_replaced() -> Generator[None]:
    """On CUDA, have attention with a mask computed otherwise while a step is traced.

    MLX's fused kernel takes 2.5 times as long there when it is given a mask. Ours takes its place,
    or else plain products do.
    """
    if not mx.cuda.is_available():
        yield
        return

    fused = mx.fast.scaled_dot_product_attention

    def attention(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if not isinstance(mask, mx.array) or mask.dtype != mx.bool_ or sinks is not None:
            return fused(q, k, v, scale=scale, mask=mask, sinks=sinks)
        if can_attend(q, k, v, mask):
            return attend(q, k, v, scale=scale, mask=mask)

        rows, heads, length, dim = q.shape
        shared = k.shape[1]
        grouped = (q * scale).reshape(rows, shared, heads // shared * length, dim)
        scores = mx.where(mask, grouped @ k.swapaxes(-1, -2), -mx.inf)
        out = mx.softmax(scores, axis=-1, precise=True) @ v
        return out.reshape(rows, heads, length, v.shape[-1])

    mx.fast.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = fused
