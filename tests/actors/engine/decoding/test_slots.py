"""Slots by themselves: shapes, reading in chunks, copies into rows, growth, what a step sees."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from actors.engine.decoding.shapes import Shapes, bucketed_length, within_tokens
from actors.engine.decoding.slots import PromptReader, SlotLayer, Slots, cache_shapes
from protocol.errors import ModelError
from tests.actors.engine.engines import engine_of, request, tiny_llama
from tests.actors.engine.test_caches import quantised_cache, sliding_window, state_space


def test_lengths_grow_in_two_steps_per_doubling():
    found = [bucketed_length(n, 32) for n in (1, 32, 33, 65, 96, 97, 129, 193, 257, 385)]
    assert found == [32, 32, 64, 96, 96, 128, 192, 256, 384, 512]


def test_rows_and_positions_of_a_step():
    shapes = Shapes(row_step=4, column_base=32)
    assert [shapes.rows(n, 10) for n in (1, 4, 5, 9)] == [4, 4, 8, 10]
    assert [shapes.columns(n, 192) for n in (20, 33, 150)] == [32, 64, 192]
    fixed = Shapes(row_step=4, column_base=32, fixed=True)
    assert (fixed.rows(1, 10), fixed.columns(20, 192)) == (10, 192)
    # Short prompts of the same padded length are read together, in one shape.
    assert fixed.together([20, 40, 31, 5]) == [0, 2, 3]
    assert (fixed.reading(20), fixed.reading(40), fixed.reading(500)) == (
        (6, 32),
        (3, 64),
        (1, 512),
    )


def test_prompts_are_read_together_up_to_a_number_of_padded_tokens():
    assert within_tokens([10, 10, 10], 25) == [0, 1]
    assert within_tokens([10, 3, 12], 24) == [0, 1]
    assert within_tokens([100], 24) == [0]


def test_what_the_layers_cache_and_which_cannot_be_slots():
    (first, *_), windows = cache_shapes(tiny_llama()), cache_shapes(sliding_window())
    assert (first.keys, first.values, first.window) == ((2, 8), (2, 8), None)
    assert [shape.window for shape in windows] == [4, 4, None]
    for model, kind in ((quantised_cache(), "QuantizedKVCache"), (state_space(), "ArraysCache")):
        with pytest.raises(ModelError, match=kind):
            cache_shapes(model)


def test_chunks_copies_and_growth_keep_the_keys_of_each_prompt():
    model = tiny_llama()
    prompts = [[3, 9, 14, 2, 31], [5, 6], [7, 7, 1]]
    reader = PromptReader(model, prompts, [None, None])
    read = []
    while not reader.done:
        read.append(reader.read(6))  # two positions of three prompts
    assert read == [6, 3, 1]

    slots = Slots(cache_shapes(model), rows=6)
    slots.grow(8)
    slots.copy([4, 1, 2], reader.prefixes())
    slots.copy([5], [reader.prefixes()[0]])
    slots.grow(32)
    for rows, prompt in (([4, 5], prompts[0]), ([1], prompts[1]), ([2], prompts[2])):
        cache = make_prompt_cache(model)
        model(mx.array([prompt]), cache=cache)
        for layer, keys, values in zip(cache, slots.keys, slots.values, strict=True):
            expected, _ = layer.keys_and_values()
            for row in rows:
                found = keys[row, :, : len(prompt)]
                np.testing.assert_allclose(found, expected[0][:, : len(prompt)], atol=1e-5)
            assert values.shape == (6, 2, 32, 8)


def test_a_step_writes_each_row_at_its_position_and_masks_the_rest():
    for rows in (3, 2):  # all rows, and the first of them
        keys = mx.zeros((3, 1, 8, 2))
        layer = SlotLayer(keys, keys + 0, mx.array([0, 4, 6])[:rows], columns=7, window=3)
        new = mx.arange(1, rows + 1).reshape(rows, 1, 1, 1) * mx.ones((rows, 1, 1, 2))
        found, _ = layer.update_and_fetch(new, new)
        assert found.shape == (rows, 1, 7, 2)
        expected = np.zeros((rows, 7))
        expected[range(rows), [0, 4, 6][:rows]] = range(1, rows + 1)
        np.testing.assert_array_equal(found[:, 0, :, 0], expected)
        mask = np.array(layer.make_mask(1))[:, 0, 0]
        seen = [[0], [2, 3, 4], [4, 5, 6]][:rows]
        assert [np.flatnonzero(row).tolist() for row in mask] == seen


def test_long_prompts_are_read_between_decode_steps():
    engine = engine_of(tiny_llama(), stop_token_ids=[], prefill_step_size=10)
    engine.add(request("short", num_generations=1, max_completion_length=40))
    engine.step()
    engine.add(request("long", [1, 2, 3, 4] * 10, num_generations=1, max_completion_length=3))
    steps = [engine.step() for _ in range(6)]
    # 39 tokens in chunks of at most 10, the prompt's last one with the chunk that ends it.
    assert [step.prefilled for step in steps] == [10, 10, 10, 10, 0, 0]
    assert [step.tokens for step in steps] == [1, 1, 1, 1, 2, 2]


def test_padding_after_the_longest_prompt_is_no_work_of_its_own():
    # In fixed shapes 9 tokens are padded to 32; read by 4, the last 20 are padding alone.
    reader = PromptReader(tiny_llama(), [[1] * 9, [2] * 3], [None, None], shape=(2, 32))
    read = []
    while not reader.done:
        read.append(reader.read(8))
    assert read == [7, 4, 1]
