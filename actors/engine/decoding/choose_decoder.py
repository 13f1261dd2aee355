"""Chooses how a model decodes: in slots, in mlx-lm's batches, or one completion at a time."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

import logging

import mlx.core as mx
import mlx.nn as nn

from actors.engine.decoding.batch_decoder import BatchDecoder
from actors.engine.decoding.decoder import Decoder
from actors.engine.decoding.shapes import Shapes, shapes_for
from actors.engine.decoding.slot_decoder import SlotDecoder
from actors.engine.decoding.slots import layer_shapes
from actors.engine.decoding.trials import Path, decoding_path, place_matters, stacked_adapters
from protocol.errors import ModelError
from protocol.model.snapshots import named_arrays

log = logging.getLogger("pippin.actor")


def choose_decoder(
    model: nn.Module,
    *,
    rows: int,
    vocab_size: int,
    prefill_step_size: int,
    max_tokens: int,
    deterministic: bool,
) -> Decoder:
    """Return the fastest decoder whose trial gives what decoding alone gives; the log says which.

    Raises ModelError if `deterministic` is asked of a model that cannot decode in slots.
    """
    path, reason = decoding_path(model)
    device = mx.default_device()
    shapes = shapes_for(device, deterministic=deterministic)
    if deterministic:
        _require_deterministic(model, path, reason, shapes, rows)

    if path == "slots":
        stacks = stacked_adapters(model)
        return SlotDecoder(
            model,
            layer_shapes(model),
            rows=rows,
            vocab_size=vocab_size,
            max_tokens=max_tokens,
            shapes=shapes,
            stacks=stacks,
            compiled=device.type == mx.DeviceType.gpu,
        )

    log.log(
        logging.WARNING if path == "alone" else logging.INFO,
        "%s decodes %s, which takes more time and memory than slots: %s",
        type(model).__module__,
        "in mlx-lm's batches" if path == "batched" else "one completion at a time",
        reason,
    )
    return BatchDecoder(
        model,
        rows=rows,
        vocab_size=vocab_size,
        prefill_step_size=prefill_step_size,
        alone=path == "alone",
    )


def _require_deterministic(
    model: nn.Module, path: Path, reason: str, shapes: Shapes, rows: int
) -> None:
    """Raise ModelError where bits would depend on what else is sampled."""
    types = {array.dtype for array in named_arrays(model.parameters()).values()}
    if types & {mx.bfloat16, mx.float16}:
        raise ModelError(
            "run.deterministic needs weights in float32, because the kernels of shorter types "
            'differ by shape; set model.dtype = "float32", or run.deterministic = false'
        )
    if path == "batched":
        raise ModelError(
            f"run.deterministic needs a model that decodes in slots, and {type(model).__module__} "
            f"does not: {reason}. Set run.deterministic = false"
        )
    if path == "slots" and place_matters(model, shapes, rows):
        raise ModelError(
            "run.deterministic: the matrix products on this machine give a completion other bits "
            "in another row of the batch. With OpenBLAS, set OPENBLAS_CORETYPE=Sandybridge in the "
            "actor's environment; otherwise set run.deterministic = false"
        )
