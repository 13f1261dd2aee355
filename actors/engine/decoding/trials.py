"""Trials at the start: ragged batches against decoding alone, stacked adapters against plain."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# pyright: reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

import logging
from collections.abc import Callable, Sequence
from typing import Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from actors.engine.decoding.adapters import StackedAdapters, stack_adapters, unstack_adapters
from actors.engine.decoding.prefill import Prefiller, merge, mergeable
from actors.engine.decoding.shapes import Shapes
from actors.engine.decoding.slots import CacheShape, PromptReader, Slots, cache_shapes
from protocol.errors import ModelError
from protocol.model.dimensions import has_short_floats

log = logging.getLogger("pippin.actor")

Path = Literal["slots", "batched", "alone"]

# What rounding may make of a row's logits, relative to their spread. A wrong position, mask or row
# differs by far more. With short types it depends on the model, and is measured.
_TOLERANCE = 3e-4
_LOW_PRECISION_TOLERANCE = 0.05
_MOST = 0.3

# What mlx-lm's models raise when they cannot take a cache or a mask.
_FAILURES = (ModelError, TypeError, ValueError, AttributeError, LookupError, RuntimeError)

# Prompts of different lengths, and the tokens that follow each.
_PROMPTS = [[1, 2, 3, 4, 5], [6], [2, 1, 2]]
_FORCED = [[3, 1, 2], [1, 4, 5], [5, 2, 6]]


class Trial:
    """The logits of a few short completions, each decoded alone, which any other way must give.

    They are ragged: three completions, decoded for three tokens each with mlx-lm's own caches.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._expected = _alone(model)
        short = has_short_floats(model)
        self._allowed = _LOW_PRECISION_TOLERANCE if short else _TOLERANCE
        if short or mx.default_device().type == mx.DeviceType.gpu:
            noise = _relative(_at_once(model), self._expected)
            self._allowed = min(_MOST, max(self._allowed, 3 * noise))

    def difference(self, way: Callable[[nn.Module], mx.array]) -> str:
        """Return how the logits that `way` gives differ, or "" if they agree.

        The difference is that of the worst row, relative to the spread of its logits.
        """
        try:
            found = way(self.model)
            mx.eval(found)
        except _FAILURES as error:
            text = str(error).splitlines()[0] if str(error) else "raised"
            return f"{type(error).__name__}: {text}"

        if found.shape != self._expected.shape:
            return f"the logits have shape {found.shape}, not {self._expected.shape}"
        error = _relative(found, self._expected)
        if error <= self._allowed:
            return ""
        return (
            f"the logits differ by {error:.2g} of their spread, of which {self._allowed:.2g} is "
            "allowed"
        )


def decoding_path(trial: Trial) -> tuple[Path, str]:
    """Return how the trial's model decodes, and why not in a faster way ("" for slots)."""
    reason = trial.difference(_in_slots)
    if not reason:
        return "slots", ""
    if not mergeable(make_prompt_cache(trial.model)):
        return "alone", f"{reason}; mlx-lm cannot batch them"
    batched = trial.difference(_in_batch)
    if not batched:
        return "batched", reason
    return "alone", f"{reason}; in a batch of mlx-lm {batched}"


def stacked_adapters(trial: Trial) -> list[StackedAdapters]:
    """Stack the model's adapters unless that changes its logits; the log says if it does."""
    stacks = stack_adapters(trial.model, join=True)
    reason = trial.difference(_alone) if stacks else ""
    if not reason:
        return stacks
    unstack_adapters(trial.model)
    log.warning("Adapters are computed layer by layer: with several at once %s", reason)
    return []


def place_matters(
    model: nn.Module, layers: Sequence[CacheShape], shapes: Shapes, rows: int
) -> bool:
    """Whether a completion's bits depend on its row, or on that of its prompt in a reading.

    Products of fixed shapes are not enough: some kernels compute the last rows of a tile otherwise.
    """
    count, length = shapes.reading(len(_PROMPTS[0]))
    reader = PromptReader(
        model, [_PROMPTS[0]] * count, [each.window for each in layers], shape=(count, length)
    )
    reader.read(count * length)
    prefix = reader.prefixes()[0]

    rows, columns = shapes.block_rows(rows), shapes.capacity(length)
    slots = Slots(layers, rows)
    slots.grow(columns)
    position = mx.full((rows,), 0, dtype=mx.int32)
    cache = slots.layers(position, columns=columns)
    logits = model(mx.full((rows, 1), 1, dtype=mx.int32), cache=cache)[:, -1]
    return any(
        not mx.array_equal(array, mx.broadcast_to(array[:1], array.shape)).item()
        for array in (logits, *prefix.keys, *prefix.values)
    )


# ---- inside --------------------------------------------------------------------------------------


def _relative(found: mx.array, expected: mx.array) -> float:
    """Return the root mean square of the worst row's error over that row's standard deviation."""
    error = mx.sqrt(mx.square(found - expected).mean(axis=-1))
    return cast(float, (error / mx.std(expected, axis=-1)).max().item())


def _alone(model: nn.Module) -> mx.array:
    logits: list[mx.array] = []
    for prompt, forced in zip(_PROMPTS, _FORCED, strict=True):
        cache = make_prompt_cache(model)
        inputs = [prompt, *([token] for token in forced[:-1])]
        logits += [model(mx.array([tokens]), cache=cache)[0, -1] for tokens in inputs]
    result = mx.stack(logits).astype(mx.float32)
    mx.eval(result)
    return result


def _at_once(model: nn.Module) -> mx.array:
    """Return the logits of `_alone`, each completion in one pass."""
    rows = [
        model(mx.array([[*prompt, *forced[:-1]]]))[0, len(prompt) - 1 :]
        for prompt, forced in zip(_PROMPTS, _FORCED, strict=True)
    ]
    return mx.concatenate(rows).astype(mx.float32)


def _in_slots(model: nn.Module) -> mx.array:
    shapes = cache_shapes(model)
    reader = PromptReader(
        model, [prompt[:-1] for prompt in _PROMPTS], [shape.window for shape in shapes]
    )
    while not reader.done:
        reader.read(6)  # more than one chunk
    slots = Slots(shapes, rows=5)
    slots.grow(16)
    order = [2, 0, 3]  # not in order, with a free slot between
    slots.copy(order, reader.prefixes())

    def step(tokens: list[int], position: list[int]) -> mx.array:
        inputs, offsets = [0] * 4, [0] * 4
        for slot, token, at in zip(order, tokens, position, strict=True):
            inputs[slot], offsets[slot] = token, at
        layers = slots.layers(mx.array(offsets), columns=12)
        logits = model(mx.array(inputs)[:, None], cache=layers)[:, -1]
        slots.keys = [layer.keys for layer in layers]
        slots.values = [layer.values for layer in layers]
        return logits[mx.array(order)]

    return _forced(step)


def _in_batch(model: nn.Module) -> mx.array:
    caches = Prefiller(model, 6, alone=False).run([prompt[:-1] for prompt in _PROMPTS])
    cache = merge(caches)
    return _forced(lambda tokens, _: model(mx.array(tokens)[:, None], cache=cache)[:, -1])


def _forced(step: Callable[[list[int], list[int]], mx.array]) -> mx.array:
    """Feed each prompt's last token, then the forced ones; return the logits as `_alone` does."""
    inputs = [[prompt[-1], *forced[:-1]] for prompt, forced in zip(_PROMPTS, _FORCED, strict=True)]
    steps = [
        step([each[t] for each in inputs], [len(prompt) - 1 + t for prompt in _PROMPTS])
        for t in range(len(_FORCED[0]))
    ]
    logits = mx.stack(steps, axis=1).astype(mx.float32)
    return logits.reshape(-1, logits.shape[-1])
