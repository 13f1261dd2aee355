"""Token batches: where every token goes."""

import numpy as np
import pytest

from learner.model.batches import aligned, bucketed, sequence_batch, token_batch


def test_layout_by_hand():
    batch = token_batch(
        [[5, 6], [7]], [[8, 9, 10], []], length_bucket=2, masks=[[1.0, 0.0, 1.0], []]
    )
    # Sequence 0 is 5 6 8 9 (10 is only predicted); its targets 8 9 10 follow positions 1 2 3.
    np.testing.assert_array_equal(batch.input_ids, [[5, 6, 8, 9], [7, 0, 0, 0]])
    np.testing.assert_array_equal(batch.targets, [[8, 9, 10, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[1, 2, 3, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.mask, [[1, 0, 1, 0], [0, 0, 0, 0]])
    assert (batch.input_ids.dtype, batch.mask.dtype) == (np.int32, np.float32)


def test_every_target_follows_its_position():
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, 99, n, dtype=np.int32) for n in (1, 8, 31)]
    completions = [rng.integers(1, 99, n, dtype=np.int32) for n in (33, 1, 2)]
    batch = token_batch(prompts, completions, length_bucket=32)
    assert batch.input_ids.shape == (3, 64)
    assert batch.targets.shape == (3, 64)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        whole = np.concatenate([prompt, completion])
        for token in range(len(completion)):
            position = batch.positions[i, token]
            np.testing.assert_array_equal(batch.input_ids[i, : position + 1], whole[: position + 1])
            assert batch.targets[i, token] == whole[position + 1]
        assert batch.mask[i].sum() == len(completion)


def test_sequences_train_on_everything_after_token_0():
    batch = sequence_batch([[4, 5, 6], [7, 8]], length_bucket=4, masks=[[1, 0, 1], [1, 1]])
    np.testing.assert_array_equal(batch.input_ids, [[4, 5, 0, 0], [7, 0, 0, 0]])
    np.testing.assert_array_equal(batch.targets, [[5, 6, 0, 0], [8, 0, 0, 0]])
    np.testing.assert_array_equal(batch.mask, [[0, 1, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(
        aligned([[0.5, 0.25], [0.125]], batch),
        [[0.5, 0.25, 0, 0], [0.125, 0, 0, 0]],
    )


def test_buckets():
    assert [bucketed(n, 32) for n in (0, 1, 32, 33, 64)] == [32, 32, 32, 64, 64]


def test_sequences_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="sequence 1 has an empty prompt"):
        token_batch([[1], []], [[2], [3]], length_bucket=8)
    with pytest.raises(ValueError, match="got 1, 2 and no masks"):
        token_batch([[1]], [[2], [3]], length_bucket=8)
