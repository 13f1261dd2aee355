"""The memory estimate: the parts that can be counted, counted by hand."""

import logging
from dataclasses import replace

import mlx.core as mx
import pytest

from learner.model.memory import MemoryEstimate, estimate_memory, warn_if_too_large
from learner.model.reference import view
from protocol.config.settings import LoraSettings, ModelSettings
from protocol.model.adapters import attach_adapters
from protocol.model.snapshots import trainable
from tests.benchmarks.memory_estimate import Case, measure
from tests.tiny import CONFIG, tiny_model


def estimate(model, **changes):
    call = {
        "sequences": 2,
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
    # Per layer: q 32>64, k and v 32>32, o 64>32, gate and up 32>64, down 64>32, each rank 4.
    adapters = 2 * 4 * ((32 + 64) + 2 * (32 + 32) + (64 + 32) + 2 * (32 + 64) + (64 + 32))
    result = estimate(model, reference=view(model, bypass_adapters=True))
    assert result.weights == stored + 4 * adapters
    assert result.optimizer == 12 * adapters  # gradient and two moments
    assert result.update == 12 * adapters  # new values and moments
    assert result.reference == 0  # a view of frozen arrays
    # 64 tokens at once, V = 64, 8 arrays of float32; and 64 hidden states and slopes of 32.
    assert result.head == 64 * 64 * 4 * 8 + 64 * 32 * 4 * 2
    assert estimate(model, head="full").head == 128 * 64 * 4 * 4
    # Per token and layer: 4 x 32 hidden, 3 x 64 queries, 4 x 32 keys and values, 5 x 64 of the MLP,
    # and probabilities over 64 tokens of 2 heads.
    layer = 2 * 64 * (128 + 192 + 128 + 320 + 160) * 4
    assert result.activations == (2 + 1) * layer
    kept = 2 * 2 * 64 * 32 * 4
    assert estimate(model, gradient_checkpointing=True).activations == kept + 2 * layer


def test_lengths_count_with_their_padding():
    model = tiny_model()
    padded = estimate(model, length=42, completion_length=16, length_bucket=32)
    assert padded == estimate(model, length=64, completion_length=32)
    # A shared prompt is not padded: 26 tokens, then 16 in 32 places.
    shared = {"shared_prompt": True, "length": 42, "completion_length": 16, "length_bucket": 32}
    whole = {"shared_prompt": True, "length": 58, "completion_length": 32}
    assert estimate(model, **shared) == estimate(model, **whole)


def test_full_fine_tuning_keeps_a_copy_for_the_reference_and_masters_below_float32():
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    attach_adapters(model, ModelSettings(fine_tune_type="full"))
    result = estimate(model, reference=view(model, bypass_adapters=False))
    assert result.reference == result.weights
    assert result.optimizer == result.weights // 2 * (12 + 4)
    assert result.update == result.weights // 2 * (12 + 2)


SMALL = Case(hidden=128, layers=2, vocab=1024, rows=4, length=128)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": "full"},
        {"checkpointing": True},
        {"prompt": 256},
        {"prompt": 256, "length": 32, "rows": 8},
        {"prompt": 256, "checkpointing": True},
        {"length": 512, "rows": 1},
        {"kind": "full"},
        {"kind": "full", "rows": 1, "length": 32, "dtype": "bfloat16", "reference": True},
    ],
    ids=str,
)
def test_estimates_are_near_measured_peaks(changes):
    peak, result = measure(replace(SMALL, **changes))
    assert 0.75 < result.total / peak < 1.3


@pytest.mark.parametrize(("machine", "warns"), [(149, True), (150, False), (0, False)])
@pytest.mark.parametrize("update", [90, 7])
def test_a_machine_that_is_too_small_is_named(caplog, machine, warns, update):
    head = 97 - update  # the larger of the two counts: 90
    parts = {"weights": 10, "reference": 20, "optimizer": 30, "activations": 0, "head": head}
    estimate = MemoryEstimate(**parts, update=update, machine=machine)
    assert estimate.total == 150
    with caplog.at_level(logging.INFO):
        assert warn_if_too_large(estimate) is warns
    assert ("train.micro_batch_size" in caplog.text) is warns
    assert ("update" in caplog.text) is (update == 90)
