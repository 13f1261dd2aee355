"""Chooses how a model decodes: in slots, in mlx-lm's batches, or one completion at a time."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

import logging

import mlx.core as mx
import mlx.nn as nn

from actors.engine.adapters import StackedAdapters
from actors.engine.batch_decoder import BatchDecoder
from actors.engine.decoder import Decoder
from actors.engine.shapes import shapes_for
from actors.engine.slot_decoder import SlotDecoder
from actors.engine.slots import layer_shapes
from actors.engine.trials import decoding_path, stacked_adapters
from protocol.errors import ModelError

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
    if path == "slots":
        stacks: list[StackedAdapters] = stacked_adapters(model)
        device = mx.default_device()
        return SlotDecoder(
            model,
            layer_shapes(model),
            rows=rows,
            vocab_size=vocab_size,
            max_tokens=max_tokens,
            shapes=shapes_for(device, deterministic=deterministic),
            stacks=stacks,
            compiled=device.type == mx.DeviceType.gpu,
        )

    if deterministic and path == "batched":
        raise ModelError(
            f"run.deterministic needs a model that decodes in slots, and {type(model).__module__} "
            f"does not: {reason}. Set run.deterministic = false"
        )
    log.info(
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
