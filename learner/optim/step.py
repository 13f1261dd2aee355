"""The optimiser step: gradients of micro-batches added up, clipped, applied.

Losses bring whole-batch normalisers with them, so micro-batch losses and gradients simply add up,
and any split of a batch gives the same step up to rounding.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from learner.model.logprobs import layer_by_layer
from learner.optim.adamw import MasterAdamW, Tensors
from learner.optim.schedule import learning_rate
from protocol.config.settings import OptimizerSettings
from protocol.errors import TrainingError
from protocol.model.snapshots import trainable

log = logging.getLogger(__name__)

Arrays = Any  # a tree of dicts, lists and tuples of mx.array
Metrics = Any  # such a tree too
MAX_SKIPS = 10  # updates in a row without a finite gradient that end the run
LossFn = Callable[[nn.Module, Arrays], tuple[mx.array, Metrics]]


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an optimiser step did. `grad_norm` is before clipping."""

    grad_norm: float
    learning_rate: float
    applied: bool  # False: the gradient was not finite, or `skip` was asked for


class Step:
    """Accumulates gradients of `loss_fn(model, arrays)` and updates the model's trainable tensors.

    `total_steps` ends the learning-rate schedule. `compiled` compiles the micro-batch step, a trace
    a shape, and the update. `reads` are further modules whose arrays a loss reads (a reference).
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
        self._micro: dict[LossFn, Callable[..., tuple[mx.array, Metrics, Tensors]]] = {}
        self._gradients: Tensors = {}
        self._running: list[mx.array] = []
        self._scheduled = 0
        self.skipped_updates = 0  # because the gradient was not finite
        self._skipped_in_a_row = 0

    def accumulate(self, arrays: Arrays, loss_fn: LossFn) -> tuple[mx.array, Metrics]:
        """Add the gradient of one micro-batch, in float32; returns its loss and metrics.

        They are being evaluated: the host prepares the next micro-batch meanwhile, but only the
        one, so that activations of two never exist at once. Pass the same `loss_fn` object every
        time: it is compiled once.
        """
        micro = self._micro.get(loss_fn)
        if micro is None:
            micro = self._micro[loss_fn] = self._make_micro(loss_fn)
        with layer_by_layer(self._model, recompute=self._checkpointing):
            loss, metrics, self._gradients = micro(trainable(self._model), arrays, self._gradients)
            mx.eval(self._running)
            self._running = []  # nobody holds the old sums: the new ones may take their place
            mx.async_eval(loss, metrics, self._gradients)
        self._running = list(self._gradients.values())
        return loss, metrics

    def apply(self) -> Update:
        """Clip what was accumulated and update the model; a gradient that is not finite is dropped.

        Raises TrainingError after `MAX_SKIPS` of those in a row, ValueError if nothing was
        accumulated.
        """
        if not self._gradients:
            raise ValueError("Step.apply needs at least one accumulate since the last update")
        rate = self._next_rate()
        new, norm = self._optimizer.step(self._gradients, trainable(self._model), rate)
        # Nobody holds gradients, old weights and moments now: the new ones may take their place.
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
                "no longer learns. Go on from the last checkpoint with a smaller "
                "optimizer.learning_rate, or start anew in float32 (model.dtype)."
            )
        log.warning(
            "The gradient is not finite (norm %s): update skipped, %d so far. A smaller "
            "optimizer.learning_rate or float32 (model.dtype) helps if this goes on.",
            grad_norm,
            self.skipped_updates,
        )

    def skip(self) -> Update:
        """Drop what was accumulated; the schedule moves on, weights and moments do not."""
        self._gradients, self._running = {}, []
        return Update(grad_norm=0.0, learning_rate=self._next_rate(), applied=False)

    def gradients(self) -> Tensors:
        """Return what is accumulated, float32, by name."""
        return dict(self._gradients)

    def state(self) -> Tensors:
        """Everything but the trainable tensors that a bit-exact resume needs."""
        counts = mx.array([self._scheduled, self.skipped_updates], mx.int64)
        return {**self._optimizer.state(), "schedule": counts}

    def load_state(self, arrays: Tensors) -> None:
        """Go on from what `state` returned. Raises CheckpointError where it does not fit."""
        arrays = dict(arrays)
        counts = arrays.pop("schedule", mx.array([0, 0], mx.int64))
        self._optimizer.load_state(arrays)
        self._scheduled, self.skipped_updates = (int(count) for count in np.array(counts))
        self._gradients = {}

    def _next_rate(self) -> float:
        rate = learning_rate(self._settings, self._scheduled, self._total_steps)
        self._scheduled += 1
        return rate

    def _make_micro(self, loss_fn: LossFn) -> Callable[..., tuple[mx.array, Metrics, Tensors]]:
        model = self._model

        def micro(
            parameters: Tensors, arrays: Arrays, sums: Tensors
        ) -> tuple[mx.array, Metrics, Tensors]:
            outer = trainable(model)

            def loss(parameters: Tensors) -> tuple[mx.array, Metrics]:
                model.update(tree_unflatten(list(parameters.items())))
                return loss_fn(model, arrays)

            (value, metrics), gradients = mx.value_and_grad(loss)(parameters)
            # The module must not keep the arrays of a trace.
            model.update(tree_unflatten(list(outer.items())))
            # mx.compile merges equal expressions and then loses those that are outputs ("_Map_base
            # ::at"); behind a dependency an output is never equal to anything.
            value = _apart(value, value)
            metrics = tree_map(lambda metric: _apart(metric, value), metrics)
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
    """Return whether to compile: "auto" means on a GPU, for on CPU it costs and gains nothing."""
    if setting == "auto":
        return mx.default_device().type == mx.DeviceType.gpu
    return setting == "on"


def random_state() -> int:
    """Return the global random state of MLX on this thread as a number."""
    high, low = np.array(cast(Any, mx.random.state)[0]).tolist()
    return (high << 32) | low


def set_random_state(state: int) -> None:
    """Put the random state back to what `random_state` returned."""
    mx.random.seed(state)
