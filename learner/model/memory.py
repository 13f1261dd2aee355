"""Estimates how much of the machine's memory a step will take, before the first one.

A guide, not a bound: activations are counted from the shapes of a transformer layer. It is 0.9 to
1.1 of what tests/benchmarks/memory_estimate.py measures on a CPU, 0.8 to 1.4 on an H200.
"""

# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

import logging
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from learner.model.batches import bucketed
from learner.model.chunked import CHUNK
from learner.model.logprobs import Head
from protocol.model.device_memory import device_memory
from protocol.model.dimensions import LayerShape, compute_itemsize
from protocol.model.snapshots import named_arrays, trainable

log = logging.getLogger(__name__)

# Arrays per token that a layer keeps for its backward pass. In units of the hidden size: its input,
# two norms and the residual between them; of the queries' size: projected, normed, rotated; of the
# keys' size: the same, and values; of the MLP's size: gate, its sigmoid and product, up, and what
# goes down.
_HIDDEN_ARRAYS = 4
_QUERY_ARRAYS = 3
_KEY_ARRAYS = 4
_MLP_ARRAYS = 5
# Attention's probabilities, and its mask.
_SCORE_ARRAYS = 1.25
# In units of what one layer keeps: what else is alive while its gradients are computed. With
# gradient checkpointing this includes its second forward pass.
_BACKWARD = 1.0
_BACKWARD_CHECKPOINTED = 2.0
# Arrays of (chunk, V): logits, float32 logits, log-probs, probabilities, slope; and those of the
# next chunk that are already queued. With all logits at once, arrays are freed one after the other.
_HEAD_ARRAYS = 8
_FULL_HEAD_ARRAYS = 4


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a step takes, by purpose."""

    weights: int
    reference: int
    optimizer: int  # gradients, moments and float32 masters
    activations: int
    head: int
    update: int  # new weights, moments and masters next to the old
    machine: int  # what the device may use; 0: unknown

    @property
    def parts(self) -> dict[str, int]:
        """What exists at once at the peak, which is either in the gradients or in the update."""
        gradients = {"activations": self.activations, "head": self.head}
        update = {"update": self.update}
        held = {"weights": self.weights, "reference": self.reference, "optimizer": self.optimizer}
        return held | max(gradients, update, key=lambda parts: sum(parts.values()))

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    """The shape of a micro-batch; lengths are in tokens, padded."""

    sequences: int
    prompt: int  # tokens before the sequences that are computed once for all of them; 0: none
    length: int  # tokens of each sequence
    completion: int  # of these, tokens that go through the head


def estimate_memory(
    model: nn.Module,
    config: dict[str, Any],
    *,
    sequences: int,
    length: int,
    completion_length: int,
    head: Head,
    gradient_checkpointing: bool,
    reference: nn.Module | None = None,
    shared_prompt: bool = False,
    length_bucket: int = 1,
) -> MemoryEstimate:
    """Estimate a step over micro-batches of `sequences` sequences of `length` tokens in all.

    `config` is the model's config.json; `completion_length` of the tokens go through the head. With
    `shared_prompt`, the other tokens are the same in all sequences and computed once. Both lengths
    are before padding to multiples of `length_bucket`.
    """
    prompt = length - completion_length if shared_prompt else 0
    batch = _MicroBatch(
        sequences=sequences,
        prompt=prompt,
        length=bucketed(length - prompt, length_bucket),
        completion=bucketed(completion_length, length_bucket),
    )
    shape = LayerShape.of(config)

    arrays = named_arrays(model.parameters())
    trained = trainable(model)
    itemsize = compute_itemsize(model)
    numbers = sum(array.size for array in trained.values())
    lower = sum(array.size for array in trained.values() if array.dtype != mx.float32)

    # Bytes per trained number. Held: 4 each for gradient and two moments, and 4 for the master of a
    # 16-bit weight. New in an update: 4 each for moments and weight or master, 2 for the rounded.
    return MemoryEstimate(
        weights=sum(array.nbytes for array in arrays.values()),
        reference=_reference_bytes(arrays, trained, reference),
        optimizer=12 * numbers + 4 * lower,
        activations=_activation_bytes(shape, batch, itemsize, gradient_checkpointing),
        head=_head_bytes(shape, batch, itemsize, head),
        update=12 * numbers + 2 * lower,
        machine=device_memory(),
    )


def _activation_bytes(
    shape: LayerShape, batch: _MicroBatch, itemsize: int, checkpointing: bool
) -> int:
    """Count what all layers keep for the backward pass, and what one needs while it runs."""
    layer = _layer(shape, batch.sequences, batch.length, batch.prompt) * itemsize
    prompt_layer = _layer(shape, 1, batch.prompt) * itemsize
    if checkpointing:
        tokens = batch.prompt + batch.sequences * batch.length
        kept = shape.layers * tokens * shape.hidden * itemsize  # each layer's input
        return int(kept + _BACKWARD_CHECKPOINTED * max(layer, prompt_layer))

    # The last layer makes only keys and values of a shared prompt.
    return int((shape.layers + _BACKWARD) * layer + (shape.layers - 1) * prompt_layer)


def _head_bytes(shape: LayerShape, batch: _MicroBatch, itemsize: int, head: Head) -> int:
    """Count the (tokens, V) arrays that exist at once, and the hidden states of completions."""
    if head == "full":
        return batch.sequences * batch.length * shape.vocabulary * 4 * _FULL_HEAD_ARRAYS

    tokens = batch.sequences * batch.completion
    chunk = min(CHUNK, tokens) * shape.vocabulary * 4 * _HEAD_ARRAYS
    return chunk + tokens * shape.hidden * itemsize * 2


def _layer(shape: LayerShape, sequences: int, length: int, prompt: int = 0) -> float:
    """Count the numbers that one layer keeps for its backward pass.

    The sequences continue `prompt` tokens whose keys and values exist already.
    """
    token = _HIDDEN_ARRAYS * shape.hidden + _MLP_ARRAYS * shape.mlp
    token += (_QUERY_ARRAYS * shape.heads + _KEY_ARRAYS * shape.kv_heads) * shape.head_size
    sequence = length * (token + _SCORE_ARRAYS * shape.heads * (prompt + length))
    if prompt:  # keys and values, joined
        sequence += 2 * shape.kv_heads * shape.head_size * (prompt + length)
    return sequences * sequence


def warn_if_too_large(estimate: MemoryEstimate) -> bool:
    """Log the estimate; if it is too much, return True and log a warning with what to change."""
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in estimate.parts.items())
    if not estimate.machine or estimate.total <= estimate.machine:
        log.info("Estimated memory of a step: %.2f GiB (%s)", estimate.total / 2**30, parts)
        return False

    log.warning(
        "A step needs about %.1f GiB (%s), this machine has %.1f GiB for it. To reduce it: smaller "
        "train.micro_batch_size, sampling.max_completion_length or data.max_length; "
        "train.gradient_checkpointing = true; model.quantize_bits = 4; "
        'model.fine_tune_type = "lora".',
        estimate.total / 2**30,
        parts,
        estimate.machine / 2**30,
    )
    return True


def _reference_bytes(
    arrays: dict[str, mx.array], trained: dict[str, mx.array], reference: nn.Module | None
) -> int:
    """Count what only the reference holds once every trained tensor has been replaced."""
    if reference is None:
        return 0
    shared = {id(array) for name, array in arrays.items() if name not in trained}
    held = named_arrays(reference.parameters()).values()
    return sum(array.nbytes for array in held if id(array) not in shared)
