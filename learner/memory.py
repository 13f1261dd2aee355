"""What a step will take of the machine's memory, estimated before the first one.

A guide, not a bound: activations are counted from the shapes of a transformer layer.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from learner.forward import Head
from learner.head import CHUNK
from protocol.snapshots import trainable

log = logging.getLogger(__name__)

# Arrays of a token that a layer keeps for its backward pass: norms, projections, residuals in
# units of the hidden size; gate, up, their product and its activation in units of the MLP's.
_HIDDEN_ARRAYS = 10
_MLP_ARRAYS = 4
# Of (chunk, V): logits, float32 logits, log-probs, probabilities, slope; and those of the next
# chunk that are queued already.
_HEAD_ARRAYS = 8


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes."""

    weights: int
    reference: int
    optimizer: int  # gradients, moments and float32 masters
    activations: int
    head: int
    machine: int  # what the device may use; 0: unknown

    @property
    def total(self) -> int:
        """Everything at once."""
        return self.weights + self.reference + self.optimizer + self.activations + self.head


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
) -> MemoryEstimate:
    """Estimate a step over micro-batches of `rows` rows of `length` tokens in all.

    `config` is the model's config.json; `completion_length` of the tokens go through the head.
    """
    text = {**config, **(config.get("text_config") or {})}
    arrays = _arrays(model)
    trained = trainable(model)
    compute = _compute_itemsize(arrays)
    # Gradient, its clipped copy, two moments, and a master of what is below float32.
    optimizer = sum(
        array.size * (16 + (4 if array.dtype != mx.float32 else 0)) for array in trained.values()
    )
    hidden = int(text.get("hidden_size", 0))
    mlp = int(text.get("intermediate_size") or 4 * hidden)
    layers = int(text.get("num_hidden_layers", 0))
    heads = int(text.get("num_attention_heads") or 1)
    tokens = rows * length
    layer = tokens * (_HIDDEN_ARRAYS * hidden + _MLP_ARRAYS * mlp) * compute
    # Attention's backward pass holds scores and probabilities.
    layer += 2 * rows * heads * length * length * compute
    kept = tokens * hidden * compute
    activations = layer + layers * kept if gradient_checkpointing else layers * layer
    vocabulary = int(text.get("vocab_size", 0))
    at_once = tokens if head == "full" else min(CHUNK, rows * completion_length)
    head_bytes = at_once * vocabulary * 4 * _HEAD_ARRAYS
    if head == "chunked":
        head_bytes += rows * completion_length * hidden * compute * 2
    return MemoryEstimate(
        weights=sum(array.nbytes for array in arrays.values()),
        reference=_reference_bytes(arrays, trained, reference),
        optimizer=optimizer,
        activations=activations,
        head=head_bytes,
        machine=machine_memory(),
    )


def warn_if_too_large(estimate: MemoryEstimate) -> bool:
    """Log the estimate; return True, with a warning and what to change, where it is too much."""
    parts = ", ".join(
        f"{name} {getattr(estimate, name) / 2**30:.2f}"
        for name in ("weights", "reference", "optimizer", "activations", "head")
    )
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
        size = info.get("max_recommended_working_set_size") or info.get("memory_size") or 0
        if int(size):
            return int(size)
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
