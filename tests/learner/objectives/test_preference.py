"""The preference objective on a tiny model: splits, the first loss, KTO's KL, WPO and ORPO."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from learner.data.examples import PreferenceExample, UnpairedExample
from learner.losses.metrics import Metrics, finish_metrics, merge_metrics
from learner.model.logprobs import Head
from learner.model.reference import view
from learner.objectives.kto import KtoObjective
from learner.objectives.preference import PreferenceObjective
from learner.offline.held_out import HeldOutEvaluator
from learner.optim.step import Step
from protocol.config.settings import OptimizerSettings, PreferenceSettings, TrainSettings
from protocol.errors import ConfigError
from tests.tiny import VOCAB, tiny_model

METHODS = [
    PreferenceSettings(loss_type=["sigmoid", "sft"], ld_alpha=0.5),
    PreferenceSettings(loss_type=["ipo"], use_weighting=True),
    PreferenceSettings(loss_type=["aot"]),
    PreferenceSettings(method="orpo"),
    PreferenceSettings(method="simpo"),
    PreferenceSettings(method="cpo"),
    PreferenceSettings(method="kto"),
]


def pairs(count=8, seed=0, scored=True):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(2, VOCAB, rng.integers(low, high)).tolist()

    examples = []
    for row in range(count):
        prompt = ids(1, 9)
        score = 0.5 + row / 4 if scored and row % 2 else None
        examples.append(PreferenceExample(row, prompt, ids(1, 20), prompt, ids(1, 6), score))
    return examples


def answers(count=8):
    return [UnpairedExample(e.row, e.prompt_ids, e.chosen_ids, e.row % 3 > 0) for e in pairs(count)]


def objective_of(settings, model, micro=8, head: Head = "full"):
    train = TrainSettings(batch_size=8, micro_batch_size=micro, length_bucket=4)
    reference = view(tiny_model(seed=1), bypass_adapters=False)
    made: Any = KtoObjective if settings.method == "kto" else PreferenceObjective
    return made(settings, train, head, model, reference)


def gradients(settings, micro, head: Head = "full"):
    model = tiny_model()
    objective = objective_of(settings, model, micro, head)
    step = Step(model, OptimizerSettings(), total_steps=1, compiled=False)
    batch = answers() if settings.method == "kto" else pairs(scored="aot" not in settings.loss_type)
    merged, loss = Metrics(), 0.0
    for arrays in objective.prepare(batch).micro:
        value, metrics = step.accumulate(arrays, objective.loss)
        loss += float(np.array(value))
        merged = merge_metrics(merged, metrics)
    return loss, step.gradients(), finish_metrics(merged)


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: f"{s.method}-{s.loss_type[0]}")
@pytest.mark.parametrize("head", ["full", "chunked"])
def test_any_split_gives_the_same_step(settings, head):
    loss, whole, metrics = gradients(settings, 8, head)
    for micro in (4, 2, 1):
        value, split, merged = gradients(settings, micro, head)
        assert value == pytest.approx(loss, rel=1e-5)
        assert merged == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        worst = max(
            np.linalg.norm(np.array(split[n] - g)) / (np.linalg.norm(np.array(g)) + 1e-12)
            for n, g in whole.items()
        )
        assert worst <= 1e-5


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_scores_are_refused_where_sorting_parts_pairs_from_them(loss):
    objective = objective_of(PreferenceSettings(loss_type=["sigmoid", loss]), tiny_model())
    with pytest.raises(ConfigError, match=f"must be without {loss} where rows have a preference"):
        objective.prepare(pairs())


def test_dpo_begins_at_log_two_and_reports_ties_as_wrong():
    model = tiny_model(seed=1)
    objective = objective_of(PreferenceSettings(), model, 2)
    losses, merged = [], Metrics()
    for arrays in objective.prepare(pairs(scored=False)).micro:
        value, metrics = objective.loss(model, arrays)
        losses.append(float(np.array(value)))
        merged = merge_metrics(merged, metrics)
    assert sum(losses) == pytest.approx(0.693147, abs=1e-6)
    assert finish_metrics(merged)["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def direct(model, prompt, completion):
    """Return log-softmax rows (C, V) that predict a completion, by the whole logits."""
    logits = model(mx.array([prompt + completion]))[0].astype(mx.float32)
    rows = logits[len(prompt) - 1 : len(prompt) + len(completion) - 1]
    return np.array(rows - mx.logsumexp(rows, axis=-1, keepdims=True), np.float64)


def logits_of(model, prompt, completion):
    """Return the logits (C, V) that predict a completion."""
    logits = np.array(model(mx.array([prompt + completion]))[0], np.float64)
    return logits[len(prompt) - 1 : len(prompt) + len(completion) - 1]


@pytest.mark.parametrize("head", ["full", "chunked"])
@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo", "kto"])
def test_logits_and_accuracy_are_means_over_completion_tokens(method, head):
    model = tiny_model()
    objective = objective_of(PreferenceSettings(method=method), model, 3, head)
    if method == "kto":
        batch = answers()
        rows = [(e.label, e.prompt_ids, e.completion_ids) for e in batch]
    else:
        batch = pairs(scored=False)
        for pair in batch[::2]:  # the first token of every other chosen answer is the likeliest
            pair.chosen_ids[0] = int(logits_of(model, pair.prompt_ids, pair.chosen_ids)[0].argmax())
        rows = [(True, e.prompt_ids, e.chosen_ids) for e in batch]
        rows += [(False, e.rejected_prompt_ids, e.rejected_ids) for e in batch]
    means: dict[bool, list[float]] = {True: [], False: []}
    hits: list[bool] = []
    for good, prompt, ids in rows:
        logits = logits_of(model, prompt, ids)
        means[good] += logits.mean(axis=1).tolist()
        hits += (logits.argmax(axis=1) == ids).tolist() if good else []
    evaluator: HeldOutEvaluator[Any] = HeldOutEvaluator(model, objective, batch, batch_size=5)
    evaluator.start(1)
    result = evaluator.poll()
    assert result is not None
    merged = Metrics()
    for arrays in objective.prepare(batch).micro:
        merged = merge_metrics(merged, objective.loss(model, arrays)[1])
    for prefix, metrics in (("", finish_metrics(merged)), ("eval/", result[1])):
        for name, good in (("chosen", True), ("rejected", False)):
            wanted = np.mean(means[good])
            assert metrics[f"{prefix}logits/{name}"] == pytest.approx(wanted, rel=1e-5, abs=1e-7)
        if method == "kto":  # as in TRL
            assert f"{prefix}mean_token_accuracy" not in metrics
        else:
            assert metrics[f"{prefix}mean_token_accuracy"] == pytest.approx(np.mean(hits), rel=1e-6)
            assert np.mean(hits) >= 4 / len(hits)


def test_kto_kl_is_of_prompts_with_their_predecessors_answer():
    model = tiny_model()
    objective = objective_of(PreferenceSettings(method="kto"), model, 4)
    batch = answers()
    total = 0.0
    for row, example in enumerate(batch):
        other = batch[row - 1].completion_ids
        picked = np.arange(len(other)), np.array(other)
        gap = direct(model, example.prompt_ids, other) - direct(
            objective.reference, example.prompt_ids, other
        )
        total += gap[picked].sum()
    kl = max(total / len(batch), 0.0)
    assert kl > 0
    for arrays in objective.prepare(batch).micro:
        assert arrays["kl"].item() == pytest.approx(kl, rel=1e-5)


def test_weights_of_wpo_are_the_policys_sum_of_squares():
    model = tiny_model()
    settings = PreferenceSettings(use_weighting=True)
    batch = pairs(2)
    arrays = objective_of(settings, model).prepare(batch).micro[0]
    expected = np.log((np.exp(direct(model, batch[0].prompt_ids, batch[0].chosen_ids)) ** 2).sum(1))
    got = np.array(arrays["log_sum_sq_probs"][0])[: len(expected)]
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_orpo_counts_the_prompt_in_its_likelihood():
    model = tiny_model()
    batch = pairs(3, scored=False)
    objective = objective_of(PreferenceSettings(method="orpo"), model)
    _, metrics = objective.loss(model, objective.prepare(batch).micro[0])
    tokens, total, means = 0, 0.0, []
    for pair in batch:
        rest = pair.prompt_ids[1:] + pair.chosen_ids
        logprobs = direct(model, pair.prompt_ids[:1], rest)[np.arange(len(rest)), rest]
        tokens += len(rest)
        total -= logprobs.sum()
        means.append(logprobs[len(pair.prompt_ids) - 1 :].mean())
    finished = finish_metrics(metrics)
    assert finished["nll_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert finished["logps/chosen"] == pytest.approx(np.mean(means), rel=1e-5)


def test_a_batch_of_good_answers_only_has_no_margin():
    model = tiny_model()
    objective = objective_of(PreferenceSettings(method="kto"), model)
    good = [UnpairedExample(e.row, e.prompt_ids, e.completion_ids, True) for e in answers(2)]
    value, metrics = objective.loss(model, objective.prepare(good).micro[0])
    assert np.isfinite(value.item())
    assert not {"rewards/rejected", "rewards/margins"} & finish_metrics(metrics).keys()


def test_a_missing_reference_is_refused():
    with pytest.raises(ConfigError, match="reference_free"):
        PreferenceObjective(PreferenceSettings(), TrainSettings(), "full", tiny_model())
    with pytest.raises(ConfigError, match="method = 'kto' needs a reference policy"):
        KtoObjective(PreferenceSettings(method="kto"), TrainSettings(), "full", tiny_model())
    free = PreferenceSettings(reference_free=True)
    model = tiny_model()
    objective = PreferenceObjective(free, TrainSettings(), "full", model)
    value, _ = objective.loss(model, objective.prepare(pairs(1)).micro[0])
    assert np.isfinite(value.item())
