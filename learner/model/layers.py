"""Runs layers one by one in the backward pass: less memory, and gradient checkpointing.

MLX evaluates breadth-first: left alone, it computes the gradients of all parameters last and keeps
every layer's activations and their gradients until then. Dependencies between the layers give each
layer's parameter gradients before the gradient moves on to the layer below.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# pyright: reportMissingTypeStubs=false, reportUntypedFunctionDecorator=false
# (mlx is only partly typed)

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from learner.model.shared_prompt import Recorder
from protocol.errors import ModelError
from protocol.model.snapshots import named_arrays


@contextmanager
def layer_by_layer(model: nn.Module, *, recompute: bool = False) -> Generator[None]:
    """Order the backward pass of steps taken inside by layers, so that each frees its activations.

    With `recompute`, a layer's activations are not even kept from the forward pass (gradient
    checkpointing, Chen et al., 2016). Only the layer objects change their class, and on leaving
    they change it back. Raises ModelError for `recompute` with dropout in adapters, which would
    draw another mask the second time.
    """
    if recompute and drops(model):
        raise ModelError(
            "train.gradient_checkpointing needs model.lora.dropout = 0: the second forward pass "
            "would drop other values. Turn one of the two off."
        )
    layers = [x for x in getattr(model, "layers", ()) if isinstance(x, nn.Module)]
    if recompute and not layers:
        raise ModelError(
            f"train.gradient_checkpointing: {type(model).__module__} has no list of layers that "
            "could be recomputed one by one. Turn it off."
        )

    # Python looks `__call__` up on the class, so an ordered call needs another class.
    kinds = [type(layer) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        object.__setattr__(layer, "__class__", _ordered_kind(kind, recompute))
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            object.__setattr__(layer, "__class__", kind)


def drops(model: nn.Module) -> bool:
    """Return whether any module of `model` has dropout above 0."""
    return any(
        isinstance(module, nn.Dropout) and getattr(module, "_p_1", 1.0) < 1.0
        for module in model.modules()
    )


_KINDS: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def _ordered_kind(kind: type[nn.Module], recompute: bool) -> type[nn.Module]:
    """Return a subclass of a layer's class with an ordered call; the class itself is untouched."""
    if (kind, recompute) in _KINDS:
        return _KINDS[kind, recompute]

    def call(layer: nn.Module, *args: object, **kwargs: object) -> object:
        held = layer.trainable_parameters()
        tensors = named_arrays(held)

        # Floating-point arrays are inputs, because they may need a gradient; all else is closed
        # over.
        given: list[mx.array] = []
        tree_map(lambda value: given.append(value) if _is_real(value) else None, (args, kwargs))

        # What a cache records is an output: inside a custom function it would get no gradient.
        recorders = [x for x in (*args, *kwargs.values()) if isinstance(x, Recorder)]

        def inner(
            inputs: list[mx.array], parameters: list[mx.array]
        ) -> tuple[object, list[list[mx.array]]]:
            rest = iter(inputs)
            new_args, new_kwargs = tree_map(
                lambda value: next(rest) if _is_real(value) else value, (args, kwargs)
            )
            layer.update(tree_unflatten(list(zip(tensors, parameters, strict=True))))
            out = kind.__call__(cast(Any, layer), *new_args, **new_kwargs)
            layer.update(held)
            return out, [recorder.recorded() for recorder in recorders]

        if recompute:
            out, recorded = _recomputed(inner)(given, list(tensors.values()))
        else:
            out, recorded = inner(*cast(Any, _tied(given, list(tensors.values()))))

        for recorder, arrays in zip(recorders, recorded, strict=True):
            recorder.record(arrays)
        return out

    _KINDS[kind, recompute] = type(kind.__name__, (kind,), {"__call__": call})
    return _KINDS[kind, recompute]


@mx.custom_function
def _tied(
    inputs: list[mx.array], parameters: list[mx.array]
) -> tuple[list[mx.array], list[mx.array]]:
    """Return both as they are; gradients of `parameters` are ready before those of `inputs`."""
    return inputs, parameters


@_tied.vjp
def _parameters_first(
    _: object, cotangents: tuple[list[mx.array], list[mx.array]], __: object
) -> tuple[list[mx.array], list[mx.array]]:
    return _after(*cotangents), cotangents[1]


def _recomputed(function: Callable[[list[mx.array], list[mx.array]], Any]) -> Callable[..., Any]:
    """Return `function(inputs, parameters)`, to be computed again for its gradient.

    Like `mx.checkpoint`, but the second pass waits until the gradient of the output has arrived.
    Otherwise the second passes of all layers would run at once and take the memory after all.
    """

    @mx.custom_function
    def run(inputs: list[mx.array], parameters: list[mx.array]) -> object:
        return function(inputs, parameters)

    @run.vjp
    def again(
        primals: tuple[list[mx.array], list[mx.array]], cotangents: object, _: object
    ) -> tuple[list[mx.array], list[mx.array]]:
        inputs, parameters = primals
        slopes = list(named_arrays(cotangents).values())

        def outputs(*arrays: mx.array) -> list[mx.array]:
            split = len(inputs)
            found = function(list(arrays[:split]), list(arrays[split:]))
            return list(named_arrays(found).values())

        _, gradients = mx.vjp(outputs, [*_after(inputs, slopes), *parameters], slopes)
        to_inputs, to_parameters = gradients[: len(inputs)], gradients[len(inputs) :]
        return _after(to_inputs, to_parameters), to_parameters

    return cast(Any, run)


def _after(arrays: list[mx.array], others: list[mx.array]) -> list[mx.array]:
    """Return `arrays`, not evaluated before `others`."""
    if not (arrays and others):
        return arrays
    return cast(list[mx.array], mx.depends(arrays, others))


def _is_real(value: object) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
