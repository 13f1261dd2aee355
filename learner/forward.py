"""Log-probs and entropies of completion tokens, without the logits of the whole batch.

`head = "chunked"` (the default) runs the trunk, picks the hidden states that predict completion
tokens, and takes these through the head a chunk at a time (`learner/head.py`). `head = "full"` is
the plain way over all logits: the yardstick, and the way for models that cannot be split.
Logits are computed in the model's dtype and from there on in float32, which is what the sampler's
logits processor sees too.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from learner.head import chunked_logprobs, split_head
from protocol.errors import ModelError

log = logging.getLogger(__name__)

Head = Literal["chunked", "full"]


def completion_logprobs(
    model: nn.Module,
    input_ids: mx.array,
    positions: mx.array,
    targets: mx.array,
    *,
    temperature: float = 1.0,
    head: Head = "chunked",
    entropy: bool = False,
    entropy_gradient: bool = False,
    gradient: bool = True,
) -> tuple[mx.array, mx.array]:
    """Log-probs of `targets` under logits / `temperature`, and the entropies of that distribution.

    `input_ids` (B, T) int32; `positions` and `targets` (B, C) int32, as `TokenBatch` has them.
    Returns two (B, C) float32 arrays in nats; entropies are zeros unless `entropy`, and carry a
    gradient only with `entropy_gradient`. `gradient=False` saves work where none will be taken.
    """
    if head == "full":
        return _plain(model, input_ids, positions, targets, temperature, entropy, entropy_gradient)
    split = split_head(model)
    hidden = split.trunk(input_ids)
    hidden = mx.take_along_axis(hidden, positions[..., None], axis=1)
    logps, entropies = chunked_logprobs(
        split,
        hidden.reshape(-1, hidden.shape[-1]),
        targets.reshape(-1),
        inverse_temperature=1 / temperature,
        entropy=entropy or entropy_gradient,
        entropy_gradient=entropy_gradient,
        gradient=gradient,
    )
    return logps.reshape(targets.shape), entropies.reshape(targets.shape)


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
    if split.parameters and _drops(split.owner):
        log.warning(
            "The memory-bounded head is off: it cannot repeat the dropout of adapters on it"
        )
        return "full"
    tokens = mx.array([[1, 2, 3, 4]])
    was_training = model.training
    model.eval()
    try:
        whole, parts = model(tokens), split.head(split.trunk(tokens))
        same = whole.shape == parts.shape and mx.array_equal(whole, parts).item()
    except (TypeError, ValueError, AttributeError) as error:
        log.warning("Trial of the memory-bounded head: %s", error)
        same = False
    finally:
        model.train(was_training)
    if same:
        return "chunked"
    log.warning(
        "The memory-bounded head is off: in %s, head(trunk(x)) is not model(x). "
        "Steps take the memory of all logits.",
        type(model).__module__,
    )
    return "full"


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Compute each layer's activations again in the backward pass, for steps taken inside.

    Only these layer objects change, and they change back. Raises ModelError where adapters have
    dropout, which would draw another mask the second time.
    """
    if _drops(model):
        raise ModelError(
            "train.gradient_checkpointing needs model.lora.dropout = 0: the second forward pass "
            "would drop other values. Turn one of the two off."
        )
    layers = [layer for layer in cast(Any, model).layers if isinstance(layer, nn.Module)]
    kinds = [type(layer) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        object.__setattr__(layer, "__class__", _checkpointed_kind(kind))
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            object.__setattr__(layer, "__class__", kind)


def _plain(
    model: nn.Module,
    input_ids: mx.array,
    positions: mx.array,
    targets: mx.array,
    temperature: float,
    entropy: bool,
    entropy_gradient: bool,
) -> tuple[mx.array, mx.array]:
    logits = mx.take_along_axis(model(input_ids), positions[..., None], axis=1)
    logits = logits.astype(mx.float32) * (1 / temperature)
    logps = -nn.losses.cross_entropy(logits, targets)
    if not (entropy or entropy_gradient):
        return logps, mx.zeros_like(logps)
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    entropies = -(mx.exp(logs) * logs).sum(axis=-1)
    return logps, entropies if entropy_gradient else mx.stop_gradient(entropies)


def _drops(model: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Dropout) and getattr(module, "_p_1", 1.0) < 1.0
        for module in model.modules()
    )


_KINDS: dict[type[nn.Module], type[nn.Module]] = {}


def _checkpointed_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a layer's class whose call is checkpointed; the class is untouched."""
    if kind in _KINDS:
        return _KINDS[kind]

    def call(layer: nn.Module, *args: object, **kwargs: object) -> object:
        outer = layer.trainable_parameters()
        # mx.checkpoint sends no gradient to what it does not take as an input, and takes no
        # integers: real arrays go in, all else (masks, caches that are None) is closed over.
        real = [
            index
            for index, value in enumerate(args)
            if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
        ]

        def inner(parameters: dict[str, Any], values: list[mx.array]) -> object:
            full = list(args)
            for index, value in zip(real, values, strict=True):
                full[index] = value
            layer.update(parameters)
            return kind.__call__(cast(Any, layer), *full, **kwargs)

        out = mx.checkpoint(inner)(outer, cast(list[mx.array], [args[index] for index in real]))
        layer.update(outer)
        return out

    _KINDS[kind] = type(kind.__name__, (kind,), {"__call__": call})
    return _KINDS[kind]
