"""Held-out metrics over several batches: those of one batch, whatever each of them lacks."""

import math

import mlx.core as mx
import numpy as np
import pytest
from msgspec import structs

from learner.data.examples import PreferenceExample, SftExample, UnpairedExample
from learner.objectives.kto import KtoObjective
from learner.objectives.preference import PreferenceObjective
from learner.objectives.sft import SftObjective
from learner.offline.held_out import HeldOutEvaluator
from protocol.config.settings import PreferenceSettings, TrainSettings
from tests.tiny import tiny_model

TRAIN = TrainSettings(micro_batch_size=2, length_bucket=4)


def answers(labels):
    rng = np.random.default_rng(0)
    draw = lambda count: rng.integers(2, 64, count).tolist()  # noqa: E731
    return [
        UnpairedExample(row, draw(2), draw(2 + row % 4), label) for row, label in enumerate(labels)
    ]


def evaluate(objective, model, examples, batch_size):
    evaluator = HeldOutEvaluator(model, objective, examples, batch_size)
    evaluator.start(0)
    result = evaluator.poll()
    assert result is not None
    return result[1]


def kto(model, **settings):
    return KtoObjective(
        PreferenceSettings(method="kto", **settings), TRAIN, "full", model, tiny_model(1)
    )


def test_a_side_that_a_batch_lacks_is_averaged_over_the_answers_that_have_it():
    model = tiny_model(0)
    objective = kto(model, loss_type=["apo_zero_unpaired"])  # no KL term couples a batch's answers
    examples = answers([True] * 4 + [True, False, False])  # batches of 4 and 3
    whole = evaluate(objective, model, examples, 7)
    split = evaluate(objective, model, examples, 4)
    assert split == pytest.approx(whole, abs=1e-5)
    assert split["eval/rewards/margins"] == pytest.approx(
        split["eval/rewards/chosen"] - split["eval/rewards/rejected"], abs=1e-6
    )
    own = [evaluate(objective, model, [one], 1) for one in examples]
    bad = [one["eval/rewards/rejected"] for one in own if "eval/rewards/rejected" in one]
    assert len(bad) == 2
    assert split["eval/rewards/rejected"] == pytest.approx(sum(bad) / 2, abs=1e-5)
    assert split["eval/loss"] == pytest.approx(sum(one["eval/loss"] for one in own) / 7, abs=1e-5)


def test_one_kind_of_label_has_no_margin_and_no_nan():
    model = tiny_model(0)
    metrics = evaluate(kto(model), model, answers([False] * 5), 2)
    assert not any(math.isnan(value) for value in metrics.values())
    assert {name for name in metrics if name.startswith("eval/rewards/")} == {
        "eval/rewards/rejected"
    }


def test_the_kl_is_the_mean_of_the_batches_by_rows():
    model = tiny_model(0)
    objective = kto(model)
    examples = answers([True, False, True, False, True])
    parts = [evaluate(objective, model, examples[a:b], 5) for a, b in ((0, 3), (3, 5))]
    expected = (3 * parts[0]["eval/kl"] + 2 * parts[1]["eval/kl"]) / 5
    assert parts[0]["eval/kl"] != parts[1]["eval/kl"]
    assert evaluate(objective, model, examples, 3)["eval/kl"] == pytest.approx(expected, abs=1e-5)


def test_orpos_shares_are_weighted_by_rows_and_tokens_by_tokens():
    model = tiny_model(0)
    settings = PreferenceSettings(method="orpo", beta=0.1)
    objective = PreferenceObjective(settings, TRAIN, "full", model)
    pairs = [
        PreferenceExample(a.row, a.prompt_ids, a.completion_ids, a.prompt_ids, b.completion_ids)
        for a, b in zip(answers([True] * 5), reversed(answers([True] * 5)), strict=True)
    ]
    parts = [evaluate(objective, model, pairs[a:b], 5) for a, b in ((0, 3), (3, 5))]
    nll = (3 * parts[0]["eval/nll_loss"] + 2 * parts[1]["eval/nll_loss"]) / 5
    split, whole = (evaluate(objective, model, pairs, size) for size in (3, 5))
    assert split["eval/nll_loss"] == pytest.approx(nll, abs=1e-5)
    for name in ("entropy", "rewards/accuracies", "log_odds_ratio", "logps/chosen"):
        assert split[f"eval/{name}"] == pytest.approx(whole[f"eval/{name}"], abs=1e-5)


def test_a_model_that_is_no_number_says_so():
    model = tiny_model(0)
    model.load_weights([("model.norm.weight", mx.full((32,), math.nan))], strict=False)
    examples = [SftExample(0, [3, 4, 5], [1, 1, 1]), SftExample(1, [3, 4], [1, 1])]
    metrics = evaluate(SftObjective(structs.replace(TRAIN), "full"), model, examples, 1)
    assert math.isnan(metrics["eval/loss"])
    assert math.isnan(metrics["eval/entropy"])
