"""The global random state: saved, restored, and replaced for a while."""

import mlx.core as mx

from protocol.model.random_state import random_state, seeded, set_random_state


def test_random_state_goes_back():
    mx.random.seed(123)
    mx.random.uniform(shape=(2,))
    state = random_state()
    first = mx.random.uniform(shape=(4,))
    set_random_state(state)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), first)


def test_a_seeded_block_draws_from_its_seed_and_restores_the_state():
    mx.random.seed(123)
    state = random_state()
    with seeded(5):
        inside = mx.random.uniform(shape=(4,))
    assert random_state() == state
    mx.random.seed(5)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), inside)
