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


def second_tree(
    model: nn.Module, *, bypass_adapters: bool = False, keep_wrapped: bool = False
) -> nn.Module:
    """Return another module tree over the arrays of `model`, with the same ones trainable.

    Its modules are its own, so that weights, modes and layers change in one tree alone. With
    `bypass_adapters`, each LoRA or DoRA layer is replaced by the layer it wraps. With
    `keep_wrapped`, the layers that adapters wrap are the same objects in both trees: where one tree
    moves a frozen weight into another array, such as a stack, the other does not keep the old one.
    """
    return cast(nn.Module, _Copier(bypass=bypass_adapters, keep=keep_wrapped).copied(model))


class _Copier:
    """Copies a tree of modules and containers; shared modules stay shared in the copy."""

    def __init__(self, *, bypass: bool, keep: bool) -> None:
        self._bypass = bypass
        self._keep = keep
        self._seen: dict[int, object] = {}

    def copied(self, value: object) -> object:
        if isinstance(value, nn.Module):
            if id(value) not in self._seen:
                self._seen[id(value)] = self._module(value)
            return self._seen[id(value)]
        if isinstance(value, dict):
            return {key: self.copied(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.copied(item) for item in value)
        return value

    def _module(self, module: nn.Module) -> nn.Module:
        wrapped = _wrapped(module) if "lora_a" in module else None
        if wrapped is not None and self._keep:
            self._seen.setdefault(id(wrapped), wrapped)
        if wrapped is not None and self._bypass:
            return cast(nn.Module, self.copied(wrapped))

        second = copy.copy(module)
        # Freezing changes this set in place, so the copy gets its own.
        object.__setattr__(second, "_no_grad", set(cast(Any, module)._no_grad))
        for key, item in module.items():
            dict.__setitem__(second, key, self.copied(item))
        return second


def _wrapped(adapter: nn.Module) -> nn.Module:
    for key in ("linear", "embedding"):
        if key in adapter:
            return adapter[key]
    raise ModelError(
        f"model.reference: {type(adapter).__module__}.{type(adapter).__name__} wraps no known "
        "layer, so its adapter cannot be bypassed. Set model.reference to a path."
    )
