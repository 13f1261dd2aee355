"""The same full fine-tuning in float32, in bfloat16, and in bfloat16 without float32 masters.

Three models start with the same weights, which bfloat16 holds exactly, and take the same batches
of SFT: "float32" and "bfloat16" use the learner's step, which moves float32 masters of bfloat16
weights, and "naive" uses MLX's AdamW on the bfloat16 weights themselves.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from learner.data.examples import SftExample, sequences
from learner.losses.metrics import number
from learner.objectives.sft import SftArrays, SftObjective
from learner.offline.source import open_offline
from learner.optim.adamw import Tensors
from learner.optim.step import Step, should_compile
from protocol.config.settings import ExampleData, ModelSettings, OptimizerSettings, TrainSettings
from protocol.model.policy import load_policy
from protocol.model.snapshots import trainable

WayName = Literal["float32", "bfloat16", "naive"]
WAYS: tuple[WayName, ...] = ("float32", "bfloat16", "naive")


@dataclass(frozen=True)
class Plan:
    """What every way does: `steps` batches of `rows` rows, padded to `length` tokens."""

    model: Path
    data: str
    steps: int = 200
    rows: int = 16
    length: int = 32
    rate: float = 1e-6
    every: int = 20  # steps between rows of the comparison


@dataclass(frozen=True)
class Movement:
    """A way's |w_t - w_0| beside float32's; `moved` is the share of its weights unlike w_0."""

    norm: float
    ratio: float
    cosine: float
    moved: float


@dataclass(frozen=True)
class Row:
    """The ways after `step` steps.

    `gains`: by how much the loss of held-out rows fell, in float32 arithmetic, with each way's
    weights, and with bfloat16's "masters".
    """

    step: int
    gains: dict[str, float]
    movements: dict[str, Movement]


class Way:
    """A model in training and its losses, one a step."""

    def __init__(self, name: WayName, plan: Plan, objective: SftObjective) -> None:
        dtype = "float32" if name == "float32" else "bfloat16"
        settings = ModelSettings(path=str(plan.model), fine_tune_type="full", dtype=dtype)
        self.model = load_policy(settings, seed=0).model
        exact = {
            key: array.astype(mx.bfloat16).astype(array.dtype)
            for key, array in trainable(self.model).items()
        }
        self.model.update(tree_unflatten(list(exact.items())))
        mx.eval(self.model.parameters())
        self.start = {key: array.astype(mx.float32) for key, array in exact.items()}
        self.losses: list[float] = []
        build = _naive if name == "naive" else _learner
        self._take, self._masters = build(self.model, plan, objective)

    def take(self, arrays: SftArrays) -> None:
        """Take a step and note its loss."""
        self.losses.append(number(self._take(arrays)))

    def weights(self) -> Tensors:
        """Return what the forward pass uses, by name."""
        return trainable(self.model)

    def masters(self) -> Tensors:
        """Return what the optimiser moves: float32, but for the naive way."""
        return {**self.weights(), **self._masters()}


_Built = tuple[Callable[[SftArrays], mx.array], Callable[[], Tensors]]


def _learner(model: nn.Module, plan: Plan, objective: SftObjective) -> _Built:
    """Return the learner's step, and what gives its masters."""
    settings = OptimizerSettings(learning_rate=plan.rate, lr_scheduler_type="constant")
    step = Step(model, settings, total_steps=plan.steps, compiled=should_compile("auto"))

    def take(arrays: SftArrays) -> mx.array:
        loss, _ = step.accumulate(arrays, objective.loss)
        step.apply()
        return loss

    def masters() -> Tensors:
        prefix = "master."
        state = step.state()
        return {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}

    return take, masters


def _naive(model: nn.Module, plan: Plan, objective: SftObjective) -> _Built:
    """Return what one would write with MLX alone: AdamW on the weights as they are."""
    adam = optim.AdamW(learning_rate=plan.rate, weight_decay=0.0, bias_correction=True)
    adam.init(model.trainable_parameters())
    state = [model.state, adam.state]

    def step(arrays: SftArrays) -> mx.array:
        (loss, _), gradients = nn.value_and_grad(model, objective.loss)(model, arrays)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        adam.update(model, gradients)
        return loss

    run = mx.compile(step, inputs=state, outputs=state) if should_compile("auto") else step

    def take(arrays: SftArrays) -> mx.array:
        loss = run(arrays)
        mx.eval(loss, state)
        return loss

    return take, dict


class Judge:
    """The loss of held-out rows under given weights, in float32 arithmetic."""

    def __init__(self, plan: Plan, objective: SftObjective, rows: list[SftExample]) -> None:
        self._model = Way("float32", plan, objective).model
        self._objective = objective
        self._micro = objective.prepare(rows).micro

    def loss(self, weights: Tensors) -> float:
        """Return the mean over the tokens that count, nats."""
        exact = [(name, array.astype(mx.float32)) for name, array in weights.items()]
        self._model.update(tree_unflatten(exact))
        parts = [self._objective.loss(self._model, arrays)[0] for arrays in self._micro]
        return sum(map(number, parts))


def compare(plan: Plan, watch: Callable[[dict[str, Way]], None]) -> Iterator[Row]:
    """Train the three ways side by side; yield a row every `plan.every` steps and at the end.

    `watch` sees the ways after each step.
    """
    train = TrainSettings(
        batch_size=plan.rows, micro_batch_size=plan.rows, length_bucket=plan.length
    )
    objective = SftObjective(train, "chunked")
    held_out, batches = _batches(plan)
    ways = {name: Way(name, plan, objective) for name in WAYS}
    judge = Judge(plan, objective, held_out)
    before = judge.loss(ways["float32"].start)
    for step, batch in enumerate(batches, start=1):
        (arrays,) = objective.prepare(batch).micro
        for way in ways.values():
            way.take(arrays)
        watch(ways)
        if step % plan.every == 0 or step == plan.steps:
            weights = {
                "masters": ways["bfloat16"].masters(),
                **{name: way.weights() for name, way in ways.items()},
            }
            gains = {name: before - judge.loss(arrays) for name, arrays in weights.items()}
            moves = {name: _movement(way, ways["float32"]) for name, way in ways.items()}
            yield Row(step, gains, moves)


def _batches(plan: Plan) -> tuple[list[SftExample], Iterator[list[SftExample]]]:
    """Return held-out rows, and `plan.steps` full batches of the others, epoch after epoch."""
    tokenizer = load_policy(ModelSettings(path=str(plan.model)), seed=0).tokenizer
    settings = ExampleData(path=plan.data, max_length=plan.length, eval_rows=4 * plan.rows)
    build = sequences(settings, tokenizer)
    source = open_offline(settings, build, seed=0, batch_size=plan.rows, max_steps=1 << 40)

    def full() -> Iterator[list[SftExample]]:
        done = 0
        while done < plan.steps:
            batch = source.next_batch() or []
            if len(batch) == plan.rows:  # another shape would be compiled again
                done += 1
                yield batch
            elif not done:
                raise ValueError(
                    f"{plan.data} has fewer than {5 * plan.rows} rows of at most {plan.length} "
                    "tokens: give smaller batches, longer rows or more data"
                )

    return source.evaluation, full()


def _movement(way: Way, exact: Way) -> Movement:
    """Compare a way's movement with float32's."""
    masters, theirs, weights = way.masters(), exact.masters(), way.weights()
    parts: list[mx.array] = []
    for name, start in way.start.items():
        ours = masters[name].astype(mx.float32) - start
        right = theirs[name] - start
        moved = weights[name].astype(mx.float32) != start
        sums = [ours.square().sum(), right.square().sum(), (ours * right).sum(), moved.sum()]
        parts.append(mx.stack([value.astype(mx.float32) for value in sums]))
    squared, reference, product, moved = (number(value) for value in mx.stack(parts).sum(axis=0))
    return Movement(
        norm=math.sqrt(squared),
        ratio=math.sqrt(squared / reference),
        cosine=product / max(math.sqrt(squared * reference), 1e-30),
        moved=moved / sum(start.size for start in way.start.values()),
    )
