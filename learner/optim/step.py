"""The optimiser step: gradients of micro-batches are summed, clipped and applied.

Losses carry their whole-batch normalisers, so the losses and gradients of micro-batches simply add
up, and any split of a batch gives the same step up to rounding.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from learner.model.layers import layer_by_layer
from learner.optim.adamw import MasterAdamW, Tensors
from learner.optim.schedule import learning_rate
from protocol.config.settings import OptimizerSettings
from protocol.errors import TrainingError
from protocol.model.snapshots import trainable

log = logging.getLogger(__name__)

SMALL_BYTES = 1 << 30  # trainable tensors below this are updated in a rehearsal too
MAX_SKIPS = 10  # updates in a row without a finite gradient that end the run

# A micro-batch and its metrics are trees (dicts, TypedDicts, lists, tuples) of mx.array.
ArraysT = TypeVar("ArraysT")
MetricsT = TypeVar("MetricsT")
LossFn = Callable[[nn.Module, ArraysT], tuple[mx.array, MetricsT]]


@dataclass(frozen=True, kw_only=True)
class Update:
    """The outcome of an optimiser step. `grad_norm` is before clipping."""

    grad_norm: float
    learning_rate: float
    applied: bool  # False: the gradient was not finite, or the step was skipped on request


class Step:
    """Accumulates gradients of `loss_fn(model, arrays)` and updates the model's trainable tensors.

    `total_steps` is the length of the learning-rate schedule. `compiled` compiles the update and
    the micro-batch step, which is traced once per shape. `reads` lists other modules whose arrays
    a loss reads, such as a reference.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        *,
        total_steps: int,
        compiled: bool,
        gradient_checkpointing: bool = False,
        reads: Sequence[nn.Module] = (),
    ) -> None:
        self._model = model
        self._settings = settings
        self._total_steps = total_steps
        self._compiled = compiled
        self._checkpointing = gradient_checkpointing
        self._reads = [module.state for module in reads]
        self._optimizer = MasterAdamW(settings, trainable(model), compiled=compiled)

        self._micro: dict[Callable[..., Any], Callable[..., Any]] = {}  # by loss function
        self._gradients: Tensors = {}
        self._running: list[mx.array] = []  # sums that the device is still computing
        self._scheduled = 0
        self.skipped_updates = 0  # because the gradient was not finite
        self._skipped_in_a_row = 0

    def accumulate(
        self, arrays: ArraysT, loss_fn: LossFn[ArraysT, MetricsT]
    ) -> tuple[mx.array, MetricsT]:
        """Add the gradient of one micro-batch, in float32; returns its loss and metrics.

        Both are still being computed on return, so that the host can prepare the next micro-batch
        meanwhile, but only that one: the activations of two micro-batches never exist at once. Pass
        the same `loss_fn` object every time, because it is compiled once.
        """
        micro = self._micro.get(loss_fn)
        if micro is None:
            micro = self._micro[loss_fn] = self._make_micro(loss_fn)

        with layer_by_layer(self._model, recompute=self._checkpointing):
            loss, metrics, self._gradients = micro(trainable(self._model), arrays, self._gradients)
            mx.eval(self._running)
            self._running = []  # without a reference to the old sums, MLX reuses their memory
            mx.async_eval(loss, metrics, self._gradients)

        self._running = list(self._gradients.values())
        return loss, metrics

    def apply(self) -> Update:
        """Clip the accumulated gradient and update the model; drop a gradient that is not finite.

        Raises TrainingError after `MAX_SKIPS` of those in a row, ValueError if nothing was
        accumulated.
        """
        if not self._gradients:
            raise ValueError("Step.apply needs at least one accumulate since the last update")

        rate = self._next_rate()
        new, norm = self._optimizer.step(self._gradients, trainable(self._model), rate)

        # Drop the references to gradients and old weights, so that MLX can reuse their memory.
        self._gradients, self._running = {}, []
        self._model.update(tree_unflatten(list(new.items())))
        mx.async_eval(norm, new, *self._optimizer.arrays())

        grad_norm = float(cast(float, norm.item()))
        finite = math.isfinite(grad_norm)
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if not finite:
            self._report_skip(grad_norm)
        return Update(grad_norm=grad_norm, learning_rate=rate, applied=finite)

    def _report_skip(self, grad_norm: float) -> None:
        self.skipped_updates += 1
        if self._skipped_in_a_row >= MAX_SKIPS:
            raise TrainingError(
                f"{MAX_SKIPS} gradients in a row were not finite (norm {grad_norm}), so the policy "
                "no longer learns. Continue from the last checkpoint with a smaller "
                "optimizer.learning_rate, or start again in float32 (model.dtype)."
            )

        log.warning(
            "The gradient is not finite (norm %s): update skipped, %d so far. If this continues, "
            "use a smaller optimizer.learning_rate or float32 (model.dtype).",
            grad_norm,
            self.skipped_updates,
        )

    def skip(self) -> Update:
        """Drop the accumulated gradient; only the schedule moves on, not weights or moments."""
        self._gradients, self._running = {}, []
        return Update(grad_norm=0.0, learning_rate=self._next_rate(), applied=False)

    def rehearse(self, micro: Sequence[ArraysT], loss_fn: LossFn[ArraysT, MetricsT]) -> None:
        """Build the kernels of an update over such micro-batches, and drop its results.

        Weights, moments and schedule stay as they are; dropout draws from MLX's random state.
        """
        for arrays in micro:
            self.accumulate(arrays, loss_fn)
        mx.eval(self._running)

        # A second set of weights and moments is held meanwhile: adapters are small enough for it.
        parameters = trainable(self._model)
        if self._gradients and sum(array.nbytes for array in parameters.values()) < SMALL_BYTES:
            self._optimizer.rehearse(self._gradients, parameters)
        self._gradients, self._running = {}, []

    def gradients(self) -> Tensors:
        """Return the accumulated gradients by name, float32."""
        return dict(self._gradients)

    def state(self) -> Tensors:
        """Return everything that a bit-exact resume needs besides the trainable tensors."""
        counts = mx.array([self._scheduled, self.skipped_updates], mx.int64)
        return {**self._optimizer.state(), "schedule": counts}

    def load_state(self, arrays: Tensors) -> None:
        """Continue from what `state` returned. Raises CheckpointError if it does not fit."""
        arrays = dict(arrays)
        counts = arrays.pop("schedule", mx.array([0, 0], mx.int64))
        self._optimizer.load_state(arrays)
        self._scheduled, self.skipped_updates = (int(count) for count in np.array(counts))
        self._gradients = {}

    def _next_rate(self) -> float:
        rate = learning_rate(self._settings, self._scheduled, self._total_steps)
        self._scheduled += 1
        return rate

    def _make_micro(
        self, loss_fn: LossFn[ArraysT, MetricsT]
    ) -> Callable[[Tensors, ArraysT, Tensors], tuple[mx.array, MetricsT, Tensors]]:
        """Return `(parameters, arrays, sums) -> (loss, metrics, sums plus gradients)`."""
        model = self._model

        def micro(
            parameters: Tensors, arrays: ArraysT, sums: Tensors
        ) -> tuple[mx.array, MetricsT, Tensors]:
            outer = trainable(model)

            def loss(parameters: Tensors) -> tuple[mx.array, MetricsT]:
                model.update(tree_unflatten(list(parameters.items())))
                return loss_fn(model, arrays)

            (value, metrics), gradients = cast(Any, mx.value_and_grad(loss)(parameters))
            # The module must not keep the arrays of a trace.
            model.update(tree_unflatten(list(outer.items())))

            # mx.compile merges equal expressions and then fails to find those that are outputs
            # ("_Map_base::at"); behind a dependency an output never equals anything else.
            value = _apart(value, value)
            metrics = tree_map(partial(_apart, after=value), metrics)

            gradients = {name: array.astype(mx.float32) for name, array in gradients.items()}
            if sums:
                gradients = {name: sums[name] + array for name, array in gradients.items()}
            return value, metrics, gradients

        if not self._compiled:
            return micro
        state = [model.state, *self._reads, mx.random.state]
        return mx.compile(micro, inputs=state, outputs=[mx.random.state])


def _apart(array: mx.array, after: mx.array) -> mx.array:
    return cast(mx.array, mx.depends(array, after))


def should_compile(setting: Literal["auto", "on", "off"]) -> bool:
    """Return whether to compile; "auto" means on a GPU, because on CPU it saves nothing."""
    if setting == "auto":
        return mx.default_device().type == mx.DeviceType.gpu
    return setting == "on"
