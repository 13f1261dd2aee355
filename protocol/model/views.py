"""Second module trees over the same arrays: another use of a model's weights without a copy.

Arrays in MLX are immutable: an update puts new arrays into one tree and leaves those of the other
as they were. So nothing has to be switched back and forth or restored, and nothing leaks. A tree
without adapters, or with its own, costs nothing; one of everything costs a copy of the weights from
the first update of the other on.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

import copy
from typing import Any, cast

import mlx.nn as nn

from protocol.errors import ModelError


def second_tree(model: nn.Module, *, bypass_adapters: bool = False) -> nn.Module:
    """Return another module tree over the arrays of `model`, with the same ones trainable.

    Its modules are its own, so that weights, modes and layers change in one tree alone. With
    `bypass_adapters`, each LoRA or DoRA layer is replaced by the layer it wraps.
    """
    return cast(nn.Module, _copied(model, bypass_adapters, {}))


def _copied(value: object, bypass: bool, seen: dict[int, object]) -> object:
    """Copy the tree of modules and containers; `seen` keeps shared modules shared."""
    if isinstance(value, nn.Module):
        if bypass and "lora_a" in value:
            return _copied(_wrapped(value), bypass, seen)
        if id(value) in seen:
            return seen[id(value)]

        second = copy.copy(value)
        seen[id(value)] = second
        # Freezing changes this set in place, so the copy gets its own.
        object.__setattr__(second, "_no_grad", set(cast(Any, value)._no_grad))
        for key, item in value.items():
            dict.__setitem__(second, key, _copied(item, bypass, seen))
        return second
    if isinstance(value, dict):
        return {key: _copied(item, bypass, seen) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item, bypass, seen) for item in value)
    return value


def _wrapped(adapter: nn.Module) -> nn.Module:
    for key in ("linear", "embedding"):
        if key in adapter:
            return adapter[key]
    raise ModelError(
        f"model.reference: {type(adapter).__module__}.{type(adapter).__name__} wraps no known "
        "layer, so its adapter cannot be bypassed. Set model.reference to a path."
    )
