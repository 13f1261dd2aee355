"""Trials at startup that choose the head, and whether a group's prompt is computed only once."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

import logging
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from learner.model.batches import to_device, token_batch
from learner.model.head import split_head
from learner.model.layers import drops, layer_by_layer
from learner.model.logprobs import Head, completion_logprobs
from learner.model.shared_prompt import SharedPrompt, shared_prompt
from protocol.errors import ModelError
from protocol.model.dimensions import has_short_floats
from protocol.model.snapshots import named_arrays, trainable

log = logging.getLogger(__name__)

# The largest difference that rounding may make, relative to the norm. A prompt that is read at
# another position, with its padding, or without a gradient differs by far more.
_TOLERANCE = 1e-2
_LOW_PRECISION_TOLERANCE = 0.1

_PROMPT = [1, 2, 3, 4, 5]
_COMPLETIONS = [[6, 7, 2, 3, 1, 4], [3], [5, 5, 1]]
_BUCKET = 8  # so that the prompt is padded


def choose_head(model: nn.Module, wanted: Head) -> Head:
    """Return "chunked" if this model's trunk and head together give exactly what the model gives.

    A trial on a few tokens decides; if it fails, a warning is logged and "full" is returned.
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
        log.warning("The memory-bounded head failed its trial: %s", error)
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


def choose_shared_prompt(
    models: list[nn.Module],
    wanted: Literal["auto", "on", "off"],
    *,
    head: Head,
    gradient_checkpointing: bool,
    compiled: bool,
) -> bool:
    """Return whether to compute a group's prompt only once; if not, the log says why.

    `models` are the policy and, if the loss reads one, the reference. A trial on a ragged group
    compares log-probs and gradients with those of whole sequences, computed as the step will do.
    "auto" is "on" except on CUDA, where the additional kernels take longer than the saved tokens.
    (H200, Qwen3-0.6B's shape, 8 completions: 0.5 to 0.8 of the speed in 0.4 to 0.9 of the memory;
    it gains at 16 x 512 after 512.)
    """
    if wanted == "off" or (wanted == "auto" and _on_cuda()):
        return False

    for model in models:
        reason = _obstacle(model, head, gradient_checkpointing, compiled)
        if reason:
            log.log(
                logging.WARNING if wanted == "on" else logging.INFO,
                "The prompt is computed again for each completion of a group, which takes time "
                "and memory: %s: %s",
                type(model).__module__,
                reason,
            )
            return False
    return True


def _on_cuda() -> bool:
    return mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu


def _obstacle(model: nn.Module, head: Head, recompute: bool, compiled: bool) -> str:
    """Return why a group's sequences cannot share their prompt in this model, or "" if they can."""
    if drops(model):
        return "adapters with dropout drop other values of the prompt for each completion"

    layers = getattr(model, "layers", [])
    kinds = [type(cache) for cache in make_prompt_cache(model)] if layers else []
    others = sorted({kind.__name__ for kind in kinds if kind is not KVCache})
    if others or not kinds or len(kinds) != len(layers):
        return f"its layers keep other caches than keys and values ({', '.join(others) or 'none'})"

    was_training = model.training
    model.eval()
    try:
        plain = _trial(model, None, head, recompute, compiled)
        try:
            shared = _trial(model, shared_prompt(_PROMPT, _BUCKET), head, recompute, compiled)
        except (ModelError, TypeError, ValueError, AttributeError, LookupError) as error:
            return f"{type(error).__name__}: {error}"
    finally:
        model.train(was_training)

    tolerance = _LOW_PRECISION_TOLERANCE if has_short_floats(model) else _TOLERANCE

    for name, left, right in zip(("log-probs", "gradients"), shared, plain, strict=True):
        norm = mx.linalg.norm(right) + 1e-6  # the norm may be zero
        gap = float(cast(float, (mx.linalg.norm(left - right) / norm).item()))
        if not gap <= tolerance:
            return f"in a trial the {name} differ by {gap:.1g} of their norm"
    return ""


def _trial(
    model: nn.Module, prompt: SharedPrompt | None, head: Head, recompute: bool, compiled: bool
) -> tuple[mx.array, mx.array]:
    """Return the log-probs and gradients of a small group, both flat and float32.

    Gradients are of the first layer with something to train: they pass through all later ones.
    """
    start = _PROMPT if prompt is None else _PROMPT[-1:]
    tokens = token_batch([start] * len(_COMPLETIONS), _COMPLETIONS, length_bucket=_BUCKET)
    arrays = to_device(tokens)
    positions, targets, mask = arrays["positions"], arrays["targets"], arrays["mask"]
    weights = mx.cos(mx.arange(mask.size)).reshape(mask.shape) * mask  # no two tokens count alike

    owner = _first_trained(model)
    held = owner.trainable_parameters()

    def loss(parameters: dict[str, Any], ids: mx.array) -> tuple[mx.array, mx.array]:
        owner.update(parameters)
        logprobs, *_ = completion_logprobs(model, ids, positions, targets, prompt=prompt, head=head)
        return (logprobs * weights).sum(), logprobs * mask

    def run(parameters: dict[str, Any], ids: mx.array) -> tuple[mx.array, dict[str, Any]]:
        if not named_arrays(parameters):
            return loss(parameters, ids)[1], {}
        (_, logprobs), gradients = mx.value_and_grad(loss)(parameters, ids)
        return logprobs, gradients

    with layer_by_layer(model, recompute=recompute):
        try:
            logprobs, gradients = (mx.compile(run) if compiled else run)(held, arrays["input_ids"])
        finally:
            owner.update(held)  # tracing may have failed half-way
        flat = [array.astype(mx.float32).flatten() for array in named_arrays(gradients).values()]
        result = logprobs.flatten(), mx.concatenate(flat) if flat else mx.zeros(1)
        mx.eval(result)
    return result


def _first_trained(model: nn.Module) -> nn.Module:
    """Return the first layer with something to train, or the model if no layer has."""
    layers = cast(list[nn.Module], cast(Any, model).layers)
    return next((layer for layer in layers if named_arrays(layer.trainable_parameters())), model)
