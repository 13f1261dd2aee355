"""Groups to arrays: which rows are left out, when no step is taken, None rewards, evaluation."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from msgspec import structs

from learner.data.prompts import Prompt
from learner.losses.metrics import Metrics, finish_metrics, merge_metrics
from learner.objectives.grpo import GrpoObjective
from learner.online.evaluation import eval_metrics
from learner.online.experience import EvalResult, PromptGroup, TrainBatch, reward_matrix
from learner.online.rollout_lines import rollout_line
from protocol.config.settings import (
    GrpoRewards,
    GrpoSettings,
    GrpoTrain,
    SamplingSettings,
)
from protocol.errors import RewardError
from protocol.messages.arrays import floats_bytes
from protocol.messages.rewards import RewardFault
from tests.protocol.builders import a_completion, a_group, a_reward, task_id
from tests.tiny import tensors, tiny_model

NONE = float("nan")


def group(
    number: int, rewards: list[list[float]], lengths: list[int], *, version: int = 3,
    cut: tuple[int, ...] = (), names: tuple[str, ...] = ("f",), faults: tuple[RewardFault, ...] = ()
) -> PromptGroup:  # fmt: skip
    completions = [
        a_completion(
            [5] * length,
            version,
            sampling_logprobs=floats_bytes([-1.0] * length),
            finish_reason="length" if index in cut else "stop",
        )
        for index, length in enumerate(lengths)
    ]
    flat = [value for row in rewards for value in row]
    reward = a_reward(flat, names, faults=list(faults))
    made = a_group(completions, task_id(number), reward=reward)
    return PromptGroup(Prompt(row_key=number, prompt_ids=[2, 3, 4], row={"prompt": "p"}), made)


def objective(weights: list[float] | None = None, **settings: object) -> GrpoObjective:
    return GrpoObjective(
        GrpoSettings(**settings),  # type: ignore[arg-type]
        GrpoTrain(micro_batch_size=1, length_bucket=4),
        SamplingSettings(temperature=1.0, max_completion_length=8),
        GrpoRewards(reward_weights=weights),
        tiny_model(), "full", lambda item, at: {"at": at},
    )  # fmt: skip


def test_rows_without_advantage_are_left_out_but_counted_in_the_normalisers():
    batch = TrainBatch(
        [group(0, [[1.0], [1.0]], [2, 3]), group(1, [[0.0], [2.0]], [1, 4], version=2)], 3
    )
    prepared = objective().prepare(batch)
    assert prepared.step
    (micro,) = prepared.micro
    assert micro["mask"].sum().item() == 5  # group 1 alone goes through the model
    deviation = np.sqrt(2.0)  # ddof 1
    np.testing.assert_allclose(
        np.array(micro["advantages"]), np.array([-1, 1]) / (deviation + 1e-4), rtol=1e-6
    )
    assert micro["normalisers"]["generation_tokens"].item() == 10  # all four completions
    assert micro["normalisers"]["sequences"].item() == 4
    assert prepared.metrics["frac_reward_zero_std"] == 0.5
    assert prepared.metrics["completions/mean_length"] == 2.5
    assert (prepared.metrics["staleness/mean"], prepared.metrics["staleness/max"]) == (0.5, 1.0)
    assert prepared.metrics["batch_tokens"] == 10 + 4 * 3
    assert prepared.rollouts == [{"at": 3}, {"at": 3}]


def clip_ratios(made: GrpoObjective, batch: TrainBatch) -> tuple[dict[str, float], int]:
    """Return what is logged of clipping, and the rows that went through the model."""
    merged, rows = Metrics(), 0
    prepared = made.prepare(batch)
    for arrays in prepared.micro:
        place = mx.arange(arrays["mask"].shape[1])
        likely = mx.where(place % 2 == 0, -1.0, -9.0)  # the policy's log-probs are in between
        arrays["sampling_logprobs"] = mx.broadcast_to(likely, arrays["mask"].shape)
        merged = merge_metrics(merged, made.loss(made.model, arrays)[1])
        rows += int(np.array(arrays["sequence_mask"]).sum())
    metrics = {**prepared.metrics, **finish_metrics(merged)}
    return {name: metrics[name] for name in metrics if "clip_ratio" in name}, rows


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "luspo", "cispo"])
def test_rows_that_are_left_out_count_in_the_clip_ratios(loss_type, level, truncated):
    groups = [
        group(0, [[0.0], [2.0], [2.0]], [1, 4, 5], cut=(1,)),
        group(1, [[1.0], [1.0], [1.0]], [2, 3, 6], cut=(0,)),
        group(2, [[0.0], [1.0], [2.0]], [3, 6, 2]),
    ]
    settings = {
        "loss_type": loss_type, "importance_sampling_level": level, "epsilon_high": 1.5,
        "mask_truncated_completions": truncated,
    }  # fmt: skip
    batch = TrainBatch(groups, 3)
    found, rows = clip_ratios(objective(**settings), batch)
    wanted, all_rows = clip_ratios(objective(**settings, zero_advantage_step=True), batch)
    assert (rows, all_rows) == (4 if truncated else 5, 9)
    assert found == pytest.approx(wanted, rel=1e-6)
    means = [value for name, value in found.items() if name.endswith(("mean", "cispo_clip_ratio"))]
    assert any(0 < value < 1 for value in means)


def test_without_a_step_nothing_was_clipped():
    batch = TrainBatch([group(0, [[1.0], [1.0]], [2, 3])], 0)
    names = ("low_mean", "low_min", "high_mean", "high_max", "region_mean")
    found, rows = clip_ratios(objective(), batch)
    assert (found, rows) == ({f"clip_ratio/{name}": 0.0 for name in names}, 0)
    assert found == clip_ratios(objective(zero_advantage_step=True), batch)[0]


@pytest.mark.parametrize(("setting", "steps"), [(False, False), (True, True)])
def test_a_batch_without_advantages_steps_only_when_asked(setting, steps):
    batch = TrainBatch([group(0, [[1.0], [1.0]], [2, 3])], 0)
    prepared = objective(zero_advantage_step=setting).prepare(batch)
    assert (prepared.step, len(prepared.micro)) == (steps, int(steps))


def test_truncated_completions_are_masked_out():
    both = group(0, [[0.0], [2.0]], [2, 3], cut=(1,))
    prepared = objective(mask_truncated_completions=True).prepare(TrainBatch([both], 3))
    (micro,) = prepared.micro
    np.testing.assert_array_equal(np.array(micro["mask"]).sum(axis=1), [2.0])
    assert micro["normalisers"]["generation_tokens"].item() == 2
    assert prepared.metrics["completions/clipped_ratio"] == 0.5
    assert prepared.metrics["completions/mean_terminated_length"] == 2
    all_cut = group(0, [[0.0], [2.0]], [2, 3], cut=(0, 1))
    nothing = objective(mask_truncated_completions=True).prepare(TrainBatch([all_cut], 3))
    assert not nothing.step  # advantages, but no token that counts: momentum must not move


def test_any_split_into_micro_batches_has_the_same_loss():
    batch = TrainBatch([group(i, [[0.0], [1.0 + i]], [2 + i, 3]) for i in range(3)], 3)
    made = objective()
    whole = objective()
    whole.train = GrpoTrain(micro_batch_size=3, length_bucket=4)
    parts = [made.loss(made.model, arrays)[0] for arrays in made.prepare(batch).micro]
    (one,) = [whole.loss(made.model, arrays)[0] for arrays in whole.prepare(batch).micro]
    assert len(parts) == 3
    assert mx.stack(parts).sum().item() == pytest.approx(one.item(), abs=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_rows_that_fill_a_batch_are_in_no_metric(loss_type):
    """Nine rows are padded to ten; each of the nine has its own ratio, which clips or weighs it."""
    batch = TrainBatch([group(0, [[float(i * i)] for i in range(9)], [3] * 9)], 3)
    made = objective(
        loss_type=loss_type, importance_sampling_level="sequence", old_logprobs="recompute",
        importance_sampling_correction=True, importance_sampling_mode="sequence_truncate",
    )  # fmt: skip
    arrays: Any = made.prepare(batch).micro[0]
    assert len(arrays["mask"]) == 10
    old = np.array(arrays["old_logprobs"], np.float64)[:9, :3]
    ratios = np.minimum(np.exp((old + 1.0).sum(axis=1)), 3.0)  # the sampler's log-probs are -1
    arrays["old_logprobs"] = arrays["old_logprobs"] + 1.0  # policy over old is 1 / e a token
    metrics = finish_metrics(made.loss(made.model, arrays)[1])
    name = "sampling/importance_sampling_ratio"
    for part, value in (("min", ratios.min()), ("mean", ratios.mean()), ("max", ratios.max())):
        assert metrics[f"{name}/{part}"] == pytest.approx(value, rel=1e-5)
    if loss_type == "dapo":
        assert metrics["clip_ratio/low_mean"] == pytest.approx(5 / 9)  # five advantages below 0
    else:
        omega = np.maximum(np.log(ratios) - 3.0, np.log(1e-8))
        k, scale = np.repeat([3.0, 2.0], [5, 4]), np.repeat([2.0, 3.0], [5, 4])
        phi = np.exp(scale + k * omega - scale * np.exp(omega))
        assert metrics["vespo/phi_seq_mean"] == pytest.approx(phi.mean(), rel=1e-4)


def test_every_pass_takes_the_entropy_quantile_of_the_policy_as_it_is():
    batch = TrainBatch([group(i, [[0.0], [1.0]], [3, 4]) for i in range(2)], 3)
    made = objective(top_entropy_quantile=0.5, num_iterations=2)
    prepared = made.prepare(batch)
    before = [arrays["normalisers"]["entropy_threshold"].item() for arrays in prepared.micro]
    made.model.load_weights(list(tensors(tiny_model(seed=5)).items()))
    assert prepared.refresh is not None
    prepared.refresh()
    again = made.prepare(batch).micro
    assert len(again) == len(before) == 2
    for arrays, wanted, old in zip(prepared.micro, again, before, strict=True):
        threshold = arrays["normalisers"]["entropy_threshold"].item()
        assert threshold == wanted["normalisers"]["entropy_threshold"].item() != old


def test_the_third_batch_in_a_row_without_a_reward_ends_the_run_with_the_reason():
    fault = RewardFault(function="f", kind="exception", message="Traceback\nKeyError: 'answer'")
    empty = TrainBatch([group(0, [[NONE], [NONE]], [2, 3], faults=(fault,))], 0)
    full = TrainBatch([group(0, [[0.0], [1.0]], [2, 3])], 0)
    made = objective()
    for batch in (empty, empty, full, empty, empty):
        made.prepare(batch)
    with pytest.raises(RewardError, match=r"3 batches in a row was None.*f: exception: KeyError"):
        made.prepare(empty)


def test_a_batch_that_no_server_scored_is_skipped_whatever_the_weights():
    nobody = group(0, [[], []], [2, 3], names=())
    prepared = objective([1.0, 2.0]).prepare(TrainBatch([nobody], 0))
    assert not prepared.step


def test_weights_that_do_not_fit_the_functions_are_refused():
    with pytest.raises(RewardError, match="reward_weights has 2 numbers, but 1 reward functions"):
        objective([1.0, 2.0]).prepare(TrainBatch([group(0, [[0.0], [1.0]], [2, 3])], 0))


def test_a_group_that_was_not_scored_has_no_rewards_beside_one_that_was():
    scored = group(0, [[1.0, 2.0], [3.0, NONE]], [1, 1], names=("f", "g"))
    names, rewards = reward_matrix([group(1, [[], []], [1, 1], names=()), scored])
    assert names == ["f", "g"]
    np.testing.assert_array_equal(rewards, [[NONE, NONE], [NONE, NONE], [1, 2], [3, NONE]])


def test_evaluation_averages_weighted_rewards_over_scored_rows():
    groups = [
        group(0, [[1.0, 0.0]], [2], names=("f", "g")),
        group(1, [[0.0, NONE]], [4], names=("f", "g"), cut=(0,)),
        group(2, [[NONE, NONE]], [3], names=("f", "g")),
    ]
    assert eval_metrics(EvalResult(5, groups, 1), [1.0, 0.5]) == {
        "eval/rows": 3.0,
        "eval/dropped": 1.0,
        "eval/reward": 0.5,
        "eval/rewards/f/mean": 0.5,
        "eval/rewards/g/mean": 0.0,
        "eval/completions/mean_length": 3.0,
        "eval/completions/clipped_ratio": pytest.approx(1 / 3),
    }
    assert eval_metrics(EvalResult(5, [], 2), None) == {"eval/rows": 0.0, "eval/dropped": 2.0}


class Words:
    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(f"w{token}" for token in token_ids)


def test_a_rollout_line_has_identity_spans_times_and_the_asked_texts():
    line = rollout_line(group(4, [[1.0], [NONE]], [1, 2], cut=(1,)), 6, Words(), 1)
    assert (line["task"], line["trained_at"], line["incarnation"]) == (4, 6, "L1")
    assert line["policy_spans"] == [[{"start": 0, "version": 3, "digest": "d3"}]] * 2
    assert line["rewards"] == [[1.0], [None]]
    assert line["completions"] == ["w5"]
    assert (line["lengths"], line["finish_reasons"]) == ([1, 2], ["stop", "length"])


def test_what_functions_log_cannot_overwrite_the_runs_own_metrics():
    """Each name's mean is over the groups that have it."""
    names = ("step", "time_s", "batch_tokens", "eval/loss", "reward", "rewards/f/mean", "f/share")
    logged = [dict.fromkeys(names, 99.0), {"f/share": 1.0}]
    found: list[dict[str, float]] = []
    for logs in ([{}, {}], logged):
        groups: list[PromptGroup] = []
        for number, each in enumerate(logs):
            item = group(number, [[0.0], [1.0]], [2, 3])
            reward = structs.replace(item.group.reward, log_metric=each)
            made = structs.replace(item.group, reward=reward)
            groups.append(PromptGroup(item.prompt, made))
        found.append(objective().prepare(TrainBatch(groups=groups, trained_at=3)).metrics)
    ours = {f"log_metric/{name}": 99.0 for name in names} | {"log_metric/f/share": 50.0}
    assert found[1] == found[0] | ours
