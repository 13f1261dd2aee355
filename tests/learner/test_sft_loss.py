"""The SFT loss by hand, and over micro-batches."""

import mlx.core as mx
import pytest

from learner.objectives.sft import sft_loss


def test_token_mean_over_the_whole_batch():
    logps, mask = mx.array([[-1.0, -2.0], [-4.0, -9.0]]), mx.array([[1.0, 1.0], [1.0, 0.0]])
    tokens = mx.array(3.0)
    assert sft_loss(logps, mask=mask, tokens=tokens).item() == pytest.approx(7 / 3)
    parts = [sft_loss(logps[i : i + 1], mask=mask[i : i + 1], tokens=tokens) for i in (0, 1)]
    assert sum(part.item() for part in parts) == pytest.approx(7 / 3)
