"""AdamW as TRL configures it, on float32 masters of every lower-precision tensor.

At a learning rate of 1e-6 a bfloat16 weight near 1 never moves, because the next number up is 0.008
away; so the optimiser updates a float32 copy, and the model gets it rounded.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

import math
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from protocol.config.settings import OptimizerSettings
from protocol.errors import CheckpointError

Tensors = dict[str, mx.array]


class ExactAdamW(optim.AdamW):
    """MLX's AdamW with torch's bias corrections.

    MLX computes 1 - beta**t in float32, where 1 - 0.999 is off by 1.3e-5: its first updates are
    6e-6 too short, which moves a training curve more than all rounding does.
    """

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Tensors) -> mx.array:
        """Take one step of one tensor; `state` holds its moments `m` and `v`."""
        rate = cast(mx.array, self.learning_rate).astype(gradient.dtype)
        step = cast(mx.array, self.step)
        b1, b2 = self.betas

        m = b1 * state["m"] + (1 - b1) * gradient
        v = b2 * state["v"] + (1 - b2) * mx.square(gradient)
        state["m"], state["v"] = m, v

        c1 = (rate / _one_minus_power(b1, step)).astype(gradient.dtype)
        c2 = mx.rsqrt(_one_minus_power(b2, step)).astype(gradient.dtype)
        decayed = parameter * (1 - rate * self.weight_decay)
        return decayed - c1 * m / (mx.sqrt(v) * c2 + self.eps)


def _one_minus_power(beta: float, step: mx.array) -> mx.array:
    """Return 1 - beta**step in float32, accurate to its last bits."""
    if beta == 0:
        return mx.array(1.0)
    return -mx.expm1(step * math.log(beta))


class MasterAdamW:
    """AdamW with bias correction over named tensors; global-norm clipping; resumable state."""

    def __init__(self, settings: OptimizerSettings, parameters: Tensors, *, compiled: bool) -> None:
        self._max_norm = settings.max_grad_norm
        self._dtypes = {name: array.dtype for name, array in parameters.items()}
        self._masters = {
            name: array.astype(mx.float32)
            for name, array in parameters.items()
            if array.dtype != mx.float32
        }

        self._adam = ExactAdamW(
            learning_rate=settings.learning_rate,
            betas=[settings.adam_beta1, settings.adam_beta2],
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
        )
        self._adam.init({**parameters, **self._masters})
        # "step" and "learning_rate", and per tensor its moments {"m", "v"}
        self._state: dict[str, Any] = self._adam.state
        self._apply = mx.compile(self._stepped) if compiled else self._stepped

    def step(
        self, gradients: Tensors, parameters: Tensors, rate: float
    ) -> tuple[Tensors, mx.array]:
        """Clip `gradients` to `max_grad_norm` (0: no clipping) and take one step.

        Returns the new parameters in the dtypes of the old, and the norm before clipping. If the
        norm is not finite, everything stays as it was. Nothing is evaluated yet: drop your
        references to the old arrays first, then `mx.eval` the new ones and `arrays()`.
        """
        self._state["learning_rate"] = mx.array(rate, mx.float32)
        full = {**parameters, **self._masters}
        new, rounded, self._state, norm = self._apply(gradients, full, self._state)
        self._masters = {name: new[name] for name in self._masters}
        return rounded, norm

    def rehearse(self, gradients: Tensors, parameters: Tensors) -> None:
        """Build the kernels of `step` and drop its results: nothing changes.

        New weights and moments are held beside the old ones meanwhile.
        """
        state = {**self._state, "learning_rate": mx.array(0.0, mx.float32)}
        mx.eval(self._apply(gradients, {**parameters, **self._masters}, state))

    def arrays(self) -> list[Any]:
        """Return what a step changes in the optimiser: moments, masters and the step count."""
        return [self._masters, self._state]

    def state(self) -> Tensors:
        """Return everything that a bit-exact resume needs, by name."""
        arrays: Tensors = {"step": self._state["step"]}
        for name in self._dtypes:
            arrays[f"m.{name}"] = self._state[name]["m"]
            arrays[f"v.{name}"] = self._state[name]["v"]
        return arrays | {f"master.{name}": array for name, array in self._masters.items()}

    def load_state(self, arrays: Tensors) -> None:
        """Continue from what `state` returned. Raises CheckpointError if it does not fit."""
        own = self.state()
        wrong = sorted(own.keys() ^ arrays.keys()) or [
            name for name, array in own.items() if array.shape != arrays[name].shape
        ]
        if wrong:
            raise CheckpointError(
                f"The optimiser state of the checkpoint does not fit this run: {len(wrong)} of "
                f"{len(own)} tensors differ, first {wrong[0]}. Resume with the recipe that "
                "the checkpoint was made with."
            )

        self._state["step"] = arrays["step"]
        for name in self._dtypes:
            self._state[name] = {"m": arrays[f"m.{name}"], "v": arrays[f"v.{name}"]}
        self._masters = {name: arrays[f"master.{name}"] for name in self._masters}

    def _stepped(
        self, gradients: Tensors, parameters: Tensors, state: dict[str, Any]
    ) -> tuple[Tensors, Tensors, dict[str, Any], mx.array]:
        """Return new parameters, the same rounded, the new state, and the norm before clipping."""
        gradients, norm = self._clipped(gradients)
        finite = mx.isfinite(norm)  # decided on the device, so that the host need not wait for it

        def if_finite(new: mx.array, old: mx.array) -> mx.array:
            return mx.where(finite, new, old)

        # MLX's optimiser writes into its state, and the old one is still needed: pass a copy.
        self._adam.state = {
            name: dict(cast(Tensors, value)) if isinstance(value, dict) else value
            for name, value in state.items()
        }
        stepped = self._adam.apply_gradients(gradients, parameters)
        new: Tensors = tree_map(if_finite, stepped, parameters)
        rounded = {name: array.astype(self._dtypes[name]) for name, array in new.items()}
        kept: dict[str, Any] = tree_map(if_finite, self._adam.state, state)
        self._adam.state = {}  # or the moments from before the choice would stay alive too
        return new, rounded, kept, norm

    def _clipped(self, gradients: Tensors) -> tuple[Tensors, mx.array]:
        if self._max_norm > 0:
            return optim.clip_grad_norm(gradients, self._max_norm)
        squares = [gradient.square().sum() for gradient in gradients.values()]
        return gradients, mx.sqrt(sum(squares, mx.array(0.0)))
