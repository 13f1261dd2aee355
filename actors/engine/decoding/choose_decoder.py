"""Chooses how a model decodes: in slots, in mlx-lm's batches, or one completion at a time."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

import logging

import mlx.core as mx
import mlx.nn as nn

from actors.engine.decoding.batch_decoder import BatchDecoder
from actors.engine.decoding.decoder import Decoder
from actors.engine.decoding.shapes import shapes_for
from actors.engine.decoding.slot_decoder import SlotDecoder
from actors.engine.decoding.slots import cache_shapes
from actors.engine.decoding.trials import (
    Path,
    Trial,
    decoding_path,
    place_matters,
    stacked_adapters,
)
from protocol.errors import ModelError
from protocol.model.dimensions import has_short_floats

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

    Raises ModelError if `deterministic` is asked of what cannot hold it.
    """
    trial = Trial(model)
    path, reason = decoding_path(trial)
    if deterministic:
        _require_deterministic(model, path, reason)

    if path == "slots":
        device = mx.default_device()
        layers, shapes = cache_shapes(model), shapes_for(device, deterministic=deterministic)
        if deterministic and place_matters(model, layers, shapes, rows):
            raise ModelError(
                "run.deterministic: the matrix products on this machine give a completion other "
                "bits in another row of the batch. With OpenBLAS, set "
                "OPENBLAS_CORETYPE=Sandybridge in the actor's environment; otherwise set "
                "run.deterministic = false"
            )
        stacks = stacked_adapters(trial)
        return SlotDecoder(
            model,
            layers,
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


def _require_deterministic(model: nn.Module, path: Path, reason: str) -> None:
    """Raise ModelError where bits would depend on what else is sampled."""
    if has_short_floats(model):
        raise ModelError(
            "run.deterministic needs weights in float32, because the kernels of shorter types "
            'differ by shape; set model.dtype = "float32", or run.deterministic = false'
        )
    if path == "batched":
        raise ModelError(
            f"run.deterministic needs a model that decodes in slots, and {type(model).__module__} "
            f"does not: {reason}. Set run.deterministic = false"
        )
