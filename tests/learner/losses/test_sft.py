"""The SFT loss and its metrics by hand, and over micro-batches."""

import mlx.core as mx
import numpy as np
import pytest

from learner.data.examples import SftExample
from learner.losses.metrics import Metrics, finish_metrics, merge_metrics
from learner.losses.sft import sft_loss
from learner.model.logprobs import Head
from learner.objectives.sft import SftObjective
from learner.offline.held_out import HeldOutEvaluator
from protocol.config.settings import TrainSettings
from tests.tiny import VOCAB, tiny_model


def test_token_mean_over_the_whole_batch():
    logprobs, mask = mx.array([[-1.0, -2.0], [-4.0, -9.0]]), mx.array([[1.0, 1.0], [1.0, 0.0]])
    tokens = mx.array(3.0)
    assert sft_loss(logprobs, mask=mask, tokens=tokens).item() == pytest.approx(7 / 3)
    parts = [sft_loss(logprobs[i : i + 1], mask=mask[i : i + 1], tokens=tokens) for i in (0, 1)]
    assert sum(part.item() for part in parts) == pytest.approx(7 / 3)


@pytest.mark.parametrize("head", ["full", "chunked"])
def test_accuracy_is_of_the_tokens_that_count(head: Head):
    model = tiny_model()
    rng = np.random.default_rng(0)
    batch, hits, counted = [], 0, 0
    for row in range(5):
        ids = rng.integers(2, VOCAB, 3 + 4 * row).tolist()
        logits = np.array(model(mx.array([ids]))[0])
        ids[-1] = int(logits[-2].argmax())  # the last token is the likeliest
        mask = [0] * (1 + row) + [1] * (len(ids) - 1 - row)
        right = logits[:-1].argmax(axis=1) == ids[1:]
        hits += int(right[np.array(mask[1:]) > 0].sum())
        counted += sum(mask[1:])
        batch.append(SftExample(row, ids, mask))
    assert hits >= 5
    objective = SftObjective(TrainSettings(batch_size=5, micro_batch_size=2), head)
    merged = Metrics()
    for arrays in objective.prepare(batch).micro:
        merged = merge_metrics(merged, objective.loss(model, arrays)[1])
    accuracy = finish_metrics(merged)["mean_token_accuracy"]
    assert accuracy == pytest.approx(hits / counted, rel=1e-6)
    evaluator = HeldOutEvaluator(model, objective, batch, batch_size=3)
    evaluator.start(1)
    result = evaluator.poll()
    assert result is not None
    assert result[1]["eval/mean_token_accuracy"] == pytest.approx(hits / counted, rel=1e-6)
