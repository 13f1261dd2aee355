"""What a step will take of the machine's memory, estimated before the first one.

A guide, not a bound: activations are counted from the shapes of a transformer layer. It is 0.9 to
1.1 of what tests/benchmarks/memory_estimate.py measures on a CPU, 0.8 to 1.4 on an H200.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from learner.model.batches import bucketed
from learner.model.chunked import CHUNK
from learner.model.logprobs import Head
from protocol.model.snapshots import trainable

log = logging.getLogger(__name__)

# Arrays of a token that a layer keeps for its backward pass. In units of the hidden size: its
# input, two norms and the residual between; of the queries': projected, normed, rotated; of the
# keys': the same, and values; of the MLP's: gate, its sigmoid and product, up, and what goes down.
_HIDDEN_ARRAYS = 4
_QUERY_ARRAYS = 3
_KEY_ARRAYS = 4
_MLP_ARRAYS = 5
# Attention's probabilities, and its mask.
_SCORE_ARRAYS = 1.25
# In units of what one layer keeps, what is alive beside it while its gradients are made; with
# gradient checkpointing, its second forward pass too.
_BACKWARD = 1.0
_BACKWARD_CHECKPOINTED = 2.0
# Of (chunk, V): logits, float32 logits, log-probs, probabilities, slope; and those of the next
# chunk that are queued already. All logits at once are let go one after the other.
_HEAD_ARRAYS = 8
_FULL_HEAD_ARRAYS = 4


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes."""

    weights: int
    reference: int
    optimizer: int  # gradients, moments and float32 masters
    activations: int
    head: int
    update: int  # new weights, moments and masters beside the old
    machine: int  # what the device may use; 0: unknown

    @property
    def parts(self) -> dict[str, int]:
        """What exists at once at the peak: that of the gradients, or that of the update."""
        gradients = {"activations": self.activations, "head": self.head}
        update = {"update": self.update}
        held = {"weights": self.weights, "reference": self.reference, "optimizer": self.optimizer}
        return held | max(gradients, update, key=lambda parts: sum(parts.values()))

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts.values())


def estimate_memory(
    model: nn.Module,
    config: dict[str, Any],
    *,
    rows: int,
    length: int,
    completion_length: int,
    head: Head,
    gradient_checkpointing: bool,
    reference: nn.Module | None = None,
    shared_prompt: bool = False,
    length_bucket: int = 1,
) -> MemoryEstimate:
    """Estimate a step over micro-batches of `rows` rows of `length` tokens in all.

    `config` is the model's config.json; `completion_length` of the tokens go through the head. With
    `shared_prompt`, the others are the same in all rows and computed once. Both lengths are before
    their padding to multiples of `length_bucket`.
    """
    prompt = length - completion_length if shared_prompt else 0
    length = bucketed(length - prompt, length_bucket)
    completion_length = bucketed(completion_length, length_bucket)
    text = {**config, **(config.get("text_config") or {})}
    arrays = _arrays(model)
    trained = trainable(model)
    compute = _compute_itemsize(arrays)
    numbers = sum(array.size for array in trained.values())
    lower = sum(array.size for array in trained.values() if array.dtype != mx.float32)
    hidden = int(text.get("hidden_size", 0))
    layers = int(text.get("num_hidden_layers", 0))
    layer = _layer(text, rows, length, prompt) * compute
    # The last layer makes nothing of a shared prompt but keys and values.
    prompt_layer = _layer(text, 1, prompt) * compute
    activations = (layers + _BACKWARD) * layer + (layers - 1) * prompt_layer
    if gradient_checkpointing:
        kept = layers * (prompt + rows * length) * hidden * compute
        activations = kept + _BACKWARD_CHECKPOINTED * max(layer, prompt_layer)
    vocabulary = int(text.get("vocab_size", 0))
    if head == "full":
        head_bytes = rows * length * vocabulary * 4 * _FULL_HEAD_ARRAYS
    else:
        tokens = rows * completion_length
        head_bytes = min(CHUNK, tokens) * vocabulary * 4 * _HEAD_ARRAYS
        head_bytes += tokens * hidden * compute * 2
    return MemoryEstimate(
        weights=sum(array.nbytes for array in arrays.values()),
        reference=_reference_bytes(arrays, trained, reference),
        optimizer=12 * numbers + 4 * lower,
        activations=int(activations),
        head=head_bytes,
        update=12 * numbers + 2 * lower,
        machine=machine_memory(),
    )


def _layer(config: dict[str, Any], rows: int, length: int, prompt: int = 0) -> float:
    """Count the numbers that one layer keeps for its backward pass.

    The rows go on from `prompt` tokens whose keys and values are at hand.
    """
    hidden = int(config.get("hidden_size", 0))
    heads = int(config.get("num_attention_heads") or 1)
    size = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    mlp = int(config.get("intermediate_size") or 4 * hidden)
    if config.get("moe_intermediate_size"):
        experts = int(config.get("num_experts_per_tok") or 1)
        mlp = int(config["moe_intermediate_size"]) * experts
    token = _HIDDEN_ARRAYS * hidden + _MLP_ARRAYS * mlp
    token += (_QUERY_ARRAYS * heads + _KEY_ARRAYS * kv_heads) * size
    row = length * (token + _SCORE_ARRAYS * heads * (prompt + length))
    row += 2 * kv_heads * size * (prompt + length if prompt else 0)  # keys and values, joined
    return rows * row


def warn_if_too_large(estimate: MemoryEstimate) -> bool:
    """Log the estimate; return True, with a warning and what to change, where it is too much."""
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in estimate.parts.items())
    if not estimate.machine or estimate.total <= estimate.machine:
        log.info("Estimated memory of a step: %.2f GiB (%s)", estimate.total / 2**30, parts)
        return False
    log.warning(
        "A step needs about %.1f GiB (%s), this machine has %.1f GiB for it. Smaller: "
        "train.micro_batch_size, sampling.max_completion_length or data.max_length; "
        "train.gradient_checkpointing = true; model.quantize_bits = 4; "
        'model.fine_tune_type = "lora".',
        estimate.total / 2**30,
        parts,
        estimate.machine / 2**30,
    )
    return True


def machine_memory() -> int:
    """Bytes that the default device may use: a GPU's working set, else the physical memory."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "memory_size", "total_memory"):
            if info.get(key):
                return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _arrays(model: nn.Module) -> dict[str, mx.array]:
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))


def _compute_itemsize(arrays: dict[str, mx.array]) -> int:
    sizes: dict[int, int] = {}
    for name, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and "lora_" not in name:
            sizes[array.itemsize] = sizes.get(array.itemsize, 0) + array.size
    return max(sizes, key=lambda size: sizes[size]) if sizes else 4


def _reference_bytes(
    arrays: dict[str, mx.array], trained: dict[str, mx.array], reference: nn.Module | None
) -> int:
    """Count what the reference holds alone once every trained tensor was replaced."""
    if reference is None:
        return 0
    shared = {id(array) for name, array in arrays.items() if name not in trained}
    return sum(array.nbytes for array in _arrays(reference).values() if id(array) not in shared)
