"""Log-probs, entropies and metrics of completion tokens, without the logits of the whole batch.

`head = "chunked"` (the default) runs the trunk, picks the hidden states that predict completion
tokens, and takes these through the head a chunk at a time (`learner/model/chunked.py`). `head =
"full"` is the plain way over all logits: the yardstick, and the way for models that cannot be
split. Logits are computed in the model's dtype and from there on in float32, which is what the
sampler's logits processor sees too.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from learner.model.chunked import (
    TokenScores,
    chunked_logprobs,
    entropies_of,
    logit_metrics_of,
    token_scores,
)
from learner.model.head import split_head
from learner.model.shared_prompt import Recorder, SharedPrompt, after_prompt
from protocol.errors import ModelError
from protocol.model.snapshots import trainable

log = logging.getLogger(__name__)

Head = Literal["chunked", "full"]


def completion_logprobs(
    model: nn.Module,
    input_ids: mx.array,
    positions: mx.array,
    targets: mx.array,
    *,
    prompt: SharedPrompt | None = None,
    temperature: float = 1.0,
    head: Head = "chunked",
    entropy: bool = False,
    entropy_gradient: bool = False,
    logit_metrics: bool = False,
    gradient: bool = True,
) -> TokenScores:
    """Log-probs of `targets` under logits / `temperature`, the entropies of that distribution, and
    with `logit_metrics` what TRL's `logits/*` and `mean_token_accuracy` average.

    `input_ids` (B, T) int32; `positions` and `targets` (B, C) int32, as `TokenBatch` has them.
    With `prompt`, all rows go on from it: their own prompts are its last token alone.
    Returns (B, C) float32 arrays; entropies are zeros unless `entropy`, and carry a gradient only
    with `entropy_gradient`. `gradient=False` saves work where none will be taken.
    """

    def run(network: Callable[..., mx.array]) -> mx.array:
        if prompt is None:
            return network(input_ids)
        return after_prompt(network, len(cast(Any, model).layers), prompt, input_ids)

    if head == "full":
        logits = mx.take_along_axis(run(cast(Any, model)), positions[..., None], axis=1)
        return _plain(logits, targets, temperature, entropy, entropy_gradient, logit_metrics)
    split = split_head(model)
    hidden = states_at(run(split.states), positions)
    scores = chunked_logprobs(
        split,
        hidden.reshape(-1, hidden.shape[-1]),
        targets.reshape(-1),
        inverse_temperature=1 / temperature,
        entropy=entropy or entropy_gradient,
        entropy_gradient=entropy_gradient,
        logit_metrics=logit_metrics,
        gradient=gradient,
    )
    return TokenScores(*(values.reshape(targets.shape) for values in scores))


def states_at(states: mx.array, positions: mx.array) -> mx.array:
    """Return the hidden states (B, C, D) of `states` (B, T, D) at `positions` (B, C) int32.

    Completions are contiguous, so the gradient is a gather too, and exact: MLX would scatter it
    with atomic additions. Padding (a position that does not go on from the first) sends none back.
    """

    @mx.custom_function
    def pick(states: mx.array, positions: mx.array) -> mx.array:
        return mx.take_along_axis(states, positions[..., None], axis=1)

    @pick.vjp
    def put(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        states, positions = primals
        here = mx.arange(states.shape[1])[None]
        token = here - positions[:, :1]
        inside = (token >= 0) & (token < positions.shape[1])
        token = mx.where(inside, token, 0)
        read = inside & (mx.take_along_axis(positions, token, axis=1) == here)
        slope = mx.take_along_axis(cotangent, token[..., None], axis=1)
        return mx.where(read[..., None], slope, 0), mx.zeros_like(positions)

    return cast(mx.array, pick(states, positions))


def choose_head(model: nn.Module, wanted: Head) -> Head:
    """Return "chunked" where this model's trunk and head give just what the model gives.

    A trial of a few tokens decides; where it fails, a line is logged and "full" is returned.
    """
    if wanted == "full":
        return "full"
    try:
        split = split_head(model)
    except ModelError as error:
        log.warning("The memory-bounded head is off: %s", error)
        return "full"
    tokens = mx.array([[1, 2, 3, 4]])
    was_training = model.training
    model.eval()
    try:
        hidden = split.states(tokens)
        whole, parts = model(tokens), split.head(hidden)
        same = whole.shape == parts.shape and mx.array_equal(whole, parts).item()
        owner = split.owner(hidden[0])
    except (TypeError, ValueError, AttributeError) as error:
        log.warning("Trial of the memory-bounded head: %s", error)
        same, owner = False, nn.Module()
    finally:
        model.train(was_training)
    if trainable(owner) and drops(owner):
        log.warning(
            "The memory-bounded head is off: it cannot repeat the dropout of adapters on it"
        )
        return "full"
    if same:
        return "chunked"
    log.warning(
        "The memory-bounded head is off: in %s, head(trunk(x)) is not model(x). "
        "Steps take the memory of all logits.",
        type(model).__module__,
    )
    return "full"


@contextmanager
def layer_by_layer(model: nn.Module, *, recompute: bool = False) -> Iterator[None]:
    """Order the backward pass of steps taken inside by layers, so that each frees its activations.

    MLX evaluates breadth-first: left to itself it computes the gradients of all parameters last,
    and keeps every layer's activations and their gradients till then. With `recompute`, a layer's
    activations are not even kept from the forward pass (gradient checkpointing, Chen et al., 2016).
    Only these layer objects change, and they change back. Raises ModelError where activations are
    to be recomputed and adapters have dropout, which would draw another mask the second time.
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
    kinds = [type(layer) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        object.__setattr__(layer, "__class__", _ordered_kind(kind, recompute))
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            object.__setattr__(layer, "__class__", kind)


def _plain(
    logits: mx.array,
    targets: mx.array,
    temperature: float,
    entropy: bool,
    entropy_gradient: bool,
    logit_metrics: bool,
) -> TokenScores:
    scaled = logits.astype(mx.float32) * (1 / temperature)
    logprobs = -nn.losses.cross_entropy(scaled, targets)
    entropies = mx.zeros_like(logprobs)
    if entropy or entropy_gradient:
        entropies = entropies_of(scaled, mx.logsumexp(scaled, axis=-1, keepdims=True))
    metrics = logit_metrics_of(logits, scaled, targets) if logit_metrics else []
    return token_scores(logprobs, entropies, *metrics, entropy_gradient=entropy_gradient)


def drops(model: nn.Module) -> bool:
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
        names, tensors = _flat(held)
        # Real arrays are inputs, for they may need a gradient; all else is closed over.
        given: list[mx.array] = []
        tree_map(lambda value: given.append(value) if _is_real(value) else None, (args, kwargs))
        # What a cache records is an output: inside of a custom function it has no gradient.
        recorders = [x for x in (*args, *kwargs.values()) if isinstance(x, Recorder)]

        def inner(
            inputs: list[mx.array], parameters: list[mx.array]
        ) -> tuple[object, list[list[mx.array]]]:
            rest = iter(inputs)
            new_args, new_kwargs = tree_map(
                lambda value: next(rest) if _is_real(value) else value, (args, kwargs)
            )
            layer.update(tree_unflatten(list(zip(names, parameters, strict=True))))
            out = kind.__call__(cast(Any, layer), *new_args, **new_kwargs)
            layer.update(held)
            return out, [recorder.recorded() for recorder in recorders]

        if recompute:
            out, recorded = _recomputed(inner)(given, tensors)
        else:
            out, recorded = inner(*cast(Any, _tied(given, tensors)))
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
    """Return `function(inputs, parameters)` with its inside computed again for the gradient.

    As `mx.checkpoint`, but the second pass waits for the gradient of the output to arrive: else
    that of every layer would run at once, and the memory saved be taken after all.
    """

    @mx.custom_function
    def run(inputs: list[mx.array], parameters: list[mx.array]) -> object:
        return function(inputs, parameters)

    @run.vjp
    def again(
        primals: tuple[list[mx.array], list[mx.array]], cotangents: object, _: object
    ) -> tuple[list[mx.array], list[mx.array]]:
        inputs, parameters = primals
        _, slopes = _flat(cotangents)

        def outputs(*arrays: mx.array) -> list[mx.array]:
            split = len(inputs)
            return _flat(function(list(arrays[:split]), list(arrays[split:])))[1]

        _, gradients = mx.vjp(outputs, [*_after(inputs, slopes), *parameters], slopes)
        to_inputs, to_parameters = gradients[: len(inputs)], gradients[len(inputs) :]
        return _after(to_inputs, to_parameters), to_parameters

    return cast(Any, run)


def _after(arrays: list[mx.array], others: list[mx.array]) -> list[mx.array]:
    if not (arrays and others):
        return arrays
    return cast(list[mx.array], mx.depends(arrays, others))


def _is_real(value: object) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)


def _flat(tree: object) -> tuple[list[str], list[mx.array]]:
    pairs = cast(list[tuple[str, mx.array]], tree_flatten(tree))
    return [name for name, _ in pairs], [array for _, array in pairs]
