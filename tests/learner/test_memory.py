"""The memory estimate: the parts that can be counted, counted by hand."""

import logging

import mlx.core as mx
import pytest

from learner.memory import MemoryEstimate, estimate_memory, warn_if_too_large
from learner.reference import view
from protocol.adapters import attach_adapters
from protocol.settings import LoraSettings, ModelSettings
from protocol.snapshots import trainable
from tests.tiny import CONFIG, tiny_model


def estimate(model, **changes):
    call = {
        "rows": 2,
        "length": 64,
        "completion_length": 32,
        "head": "chunked",
        "gradient_checkpointing": False,
    }
    return estimate_memory(model, CONFIG, **(call | changes))


def test_counts_by_hand():
    model = tiny_model()
    stored = sum(array.nbytes for array in trainable(model).values())
    attach_adapters(model, ModelSettings(lora=LoraSettings(rank=4)))
    # A layer: q 32>64, k and v 32>32, o 64>32, gate and up 32>64, down 64>32, each rank 4.
    adapters = 2 * 4 * ((32 + 64) + 2 * (32 + 32) + (64 + 32) + 2 * (32 + 64) + (64 + 32))
    result = estimate(model, reference=view(model, bypass_adapters=True))
    assert result.weights == stored + 4 * adapters
    assert result.optimizer == 16 * adapters  # gradient, clipped gradient, two moments
    assert result.reference == 0  # a view of frozen arrays
    # 64 tokens at once, V = 64, 8 arrays of float32; and 64 hidden states and slopes of 32.
    assert result.head == 64 * 64 * 4 * 8 + 64 * 32 * 4 * 2
    assert estimate(model, head="full").head == 128 * 64 * 4 * 8
    assert estimate(model, gradient_checkpointing=True).activations < result.activations


def test_full_fine_tuning_keeps_a_copy_for_the_reference_and_masters_below_float32():
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    attach_adapters(model, ModelSettings(fine_tune_type="full"))
    result = estimate(model, reference=view(model, bypass_adapters=False))
    assert result.reference == result.weights
    assert result.optimizer == result.weights // 2 * 20


@pytest.mark.parametrize(("machine", "warns"), [(149, True), (150, False), (0, False)])
def test_a_machine_that_is_too_small_is_named(caplog, machine, warns):
    parts = {"weights": 10, "reference": 20, "optimizer": 30, "activations": 40, "head": 50}
    with caplog.at_level(logging.INFO):
        assert warn_if_too_large(MemoryEstimate(**parts, machine=machine)) is warns
    assert ("train.micro_batch_size" in caplog.text) is warns
