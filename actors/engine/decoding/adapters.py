"""Fewer products per layer: adapters computed together where layers read the same array.

    y = x [W1; W2; A1ᵀ; A2ᵀ]ᵀ        one product for the weights and the A of all of them
    [y1 | y2] + scale [h1 | h2] B      one `addmm`, or on CUDA a kernel; B is block-diagonal

Layers are found by structure: those with LoRA that a forward pass calls on one array. The modules
stay where they are, with the same parameters, so that snapshots apply as ever; only their call is
replaced. Each layer's own weight becomes a slice of the stack, so the weights exist once.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from actors.engine.decoding.cuda_kernels import add_adapters, can_add_adapters


class StackedAdapters:
    """Layers that are called on one array, computed together at the first of their calls.

    With `join`, the A matrices are stacked under the weights, which are then copied at every
    `refresh`; without, they are a product of their own. Quantised weights cannot take them in.
    """

    def __init__(self, layers: Sequence[LoRALinear], *, join: bool) -> None:
        self._layers = list(layers)
        self._quantized = isinstance(layers[0].linear, nn.QuantizedLinear)
        same_type = layers[0].lora_a.dtype == cast(Any, layers[0].linear).weight.dtype
        self._join = join and same_type  # quantised weights are of another type
        self._outputs = [layer.lora_b.shape[1] for layer in layers]
        self._ranks = [layer.lora_b.shape[0] for layer in layers]
        self._ends = list(accumulate(self._outputs))[:-1]
        biased = "bias" in cast(Any, layers[0].linear)
        self._in_one_kernel = self._join and not biased and can_add_adapters(self._ranks)

        self.state: dict[str, mx.array] = {}
        self._input: mx.array | None = None
        self._parts: list[mx.array] = []
        self._taken: set[int] = set()

        self._stack_weights()
        self.refresh()

    def refresh(self) -> None:
        """Take in the layers' adapters, after they were changed."""
        layers = self._layers
        a = mx.concatenate([layer.lora_a for layer in layers], axis=1)
        self.state["b"] = _block_diagonal([layer.lora_b for layer in layers])
        if self._join:
            count = sum(self._outputs)
            self._set("weight", mx.concatenate([self.state["weight"][:count], a.T]))
        else:
            self.state["a"] = a
        mx.eval(self.state)

    def part(self, index: int, x: mx.array) -> mx.array:
        """Return the output of layer `index` for `x` (..., in)."""
        if self._input is not x:
            self._input, self._parts, self._taken = x, self._compute(x), set()

        self._taken.add(index)
        part = self._parts[index]
        if len(self._taken) == len(self._layers):
            self._input, self._parts, self._taken = None, [], set()
        return part

    # ---- inside --------------------------------------------------------------------------

    def _compute(self, x: mx.array) -> list[mx.array]:
        count = sum(self._outputs)
        y = self._product(x)
        if self._in_one_kernel:
            return add_adapters(
                y,
                self.state["b"],
                outputs=self._outputs,
                ranks=self._ranks,
                scale=self._layers[0].scale,
            )
        if self._join:
            y, h = y[..., :count], y[..., count:]
        else:
            h = x @ self.state["a"]

        bias = self.state.get("bias")
        if bias is not None:
            y = y + bias
        y = mx.addmm(y, h, self.state["b"], alpha=self._layers[0].scale)
        return cast(list[mx.array], mx.split(y, self._ends, axis=-1))

    def _product(self, x: mx.array) -> mx.array:
        weight = self.state["weight"]
        if not self._quantized:
            return x @ weight.T
        linear = cast(Any, self._layers[0].linear)
        return mx.quantized_matmul(
            x,
            weight,
            scales=self.state["scales"],
            biases=self.state.get("biases"),
            transpose=True,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )

    def _stack_weights(self) -> None:
        linears = [cast(Any, layer.linear) for layer in self._layers]
        if "bias" in linears[0]:
            self.state["bias"] = mx.concatenate([linear.bias for linear in linears])
        for name in ("scales", "biases"):
            if linears[0].get(name) is not None:
                self._set(name, mx.concatenate([linear[name] for linear in linears]))
        self._set("weight", mx.concatenate([linear.weight for linear in linears]))

    def _set(self, name: str, stack: mx.array) -> None:
        """Keep a stack, and give each layer its slice, which shares the stack's memory."""
        mx.eval(stack)
        self.state[name] = stack
        start = 0
        for layer, count in zip(self._layers, self._outputs, strict=True):
            linear = cast(Any, layer.linear)
            linear[name] = stack[start : start + count]
            mx.eval(linear[name])
            start += count


def _block_diagonal(blocks: Sequence[mx.array]) -> mx.array:
    columns = sum(block.shape[1] for block in blocks)
    rows: list[mx.array] = []
    start = 0
    for block in blocks:
        rank, width = block.shape
        left = mx.zeros((rank, start), block.dtype)
        right = mx.zeros((rank, columns - start - width), block.dtype)
        rows.append(mx.concatenate([left, block, right], axis=1))
        start += width
    return mx.concatenate(rows)


class _StackedLoRA(LoRALinear):
    """A LoRALinear that takes its output from the stack that it belongs to."""

    def __call__(self, x: mx.array) -> mx.array:
        stack, index = cast(Any, self)._stack
        return stack.part(index, x)


def stack_adapters(model: nn.Module, *, join: bool) -> list[StackedAdapters]:
    """Stack the LoRA layers of `model` that are called on one array; return the stacks."""
    stacks: list[StackedAdapters] = []
    for layers in _shared_inputs(model):
        stack = StackedAdapters(layers, join=join)
        for index, layer in enumerate(layers):
            object.__setattr__(layer, "_stack", (stack, index))
            layer.__class__ = _StackedLoRA
        stacks.append(stack)
    return stacks


def unstack_adapters(model: nn.Module) -> None:
    """Give the layers their own calls back."""
    for module in model.modules():
        if isinstance(module, _StackedLoRA):
            cast(Any, module).__class__ = LoRALinear
            object.__delattr__(module, "_stack")


class _RecordedLoRA(LoRALinear):
    """A LoRALinear that notes what it is called on, in the list that stands in for its stack."""

    def __call__(self, x: mx.array) -> mx.array:
        cast(Any, self)._calls.append((self, x))
        return super().__call__(x)


def _shared_inputs(model: nn.Module) -> list[list[LoRALinear]]:
    """Return the plain LoRA layers by the array that they are called on in a forward pass."""
    calls: list[tuple[LoRALinear, mx.array]] = []
    layers = [module for module in model.modules() if type(module) is LoRALinear]
    try:
        for layer in layers:
            object.__setattr__(layer, "_calls", calls)
            layer.__class__ = _RecordedLoRA
        model(mx.array([[0]]))
    finally:
        for layer in layers:
            layer.__class__ = LoRALinear
            object.__delattr__(layer, "_calls")

    # A layer that is called more than once, such as one shared by several blocks, stays as it is.
    times = Counter(id(layer) for layer, _ in calls)
    groups: dict[tuple[int, object], list[LoRALinear]] = {}
    for layer, x in calls:
        if times[id(layer)] == 1:
            groups.setdefault((id(x), _kind(layer)), []).append(layer)
    return list(groups.values())


def _kind(layer: LoRALinear) -> object:
    """Return what layers must have in common to be one product."""
    linear = cast(Any, layer.linear)
    packing = ()
    if isinstance(linear, nn.QuantizedLinear):
        packing = (linear.group_size, linear.bits, linear.mode)
    return (
        type(linear),
        packing,
        "bias" in linear,
        layer.scale,
        linear.weight.dtype,
        layer.lora_a.dtype,
    )
