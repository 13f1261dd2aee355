"""Bytes of keys and values per position, worked out by hand."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from actors.engine.sizes import bytes_per_position
from tests.actors.engine.engines import tiny_llama
from tests.actors.engine.test_caches import quantised_cache, sliding_window, state_space


@pytest.mark.parametrize(("dtype", "itemsize"), [(mx.float32, 4), (mx.bfloat16, 2)])
def test_two_layers_of_two_heads_of_eight_numbers_each_for_keys_and_values(dtype, itemsize):
    model = tiny_llama()
    model.set_dtype(dtype)
    assert bytes_per_position(model) == 2 * 2 * (2 * 8) * itemsize


def test_sliding_windows_count_at_every_position_and_states_at_none():
    assert bytes_per_position(sliding_window()) == 3 * 2 * (2 * 8) * 4
    assert bytes_per_position(state_space()) == 0


def test_a_quantised_cache_counts_its_scales():
    # Per layer: keys and values of one head of 32 numbers of 8 bits, one scale and bias of float32.
    assert bytes_per_position(quantised_cache()) == 2 * 2 * (32 + 2 * 4)


def test_it_is_what_a_cache_of_many_positions_takes():
    model = tiny_llama()
    caches = make_prompt_cache(model)
    model(mx.zeros((1, 256), dtype=mx.int32), cache=caches)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches)
    assert held == 256 * bytes_per_position(model)
