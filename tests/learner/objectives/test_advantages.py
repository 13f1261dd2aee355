"""Advantages by hand, after TRL 1.16.0's `_generate_and_score_completions`."""

import numpy as np
import pytest

from learner.objectives.advantages import advantages

NAN = float("nan")
GROUPS = np.array([0, 0, 1, 1])


def test_group_batch_and_none():
    rewards = np.array([[1.0], [3.0], [5.0], [5.0]])
    group = advantages(rewards, groups=GROUPS, names=["f"])
    # deviations sqrt(2) and 0
    expected = 1 / (2**0.5 + 1e-4)
    assert group.advantages == pytest.approx([-expected, expected, 0.0, 0.0])
    assert group.metrics["frac_reward_zero_std"] == 0.5
    assert group.metrics["reward"] == 3.5
    deviation = (11 / 3) ** 0.5  # of 1, 3, 5, 5 with ddof 1
    assert group.metrics["reward_std"] == pytest.approx(deviation)
    batch = advantages(rewards, groups=GROUPS, names=["f"], scale_rewards="batch")
    expected = 1 / (deviation + 1e-4)
    assert batch.advantages == pytest.approx([-expected, expected, 0.0, 0.0])
    assert batch.metrics["frac_reward_zero_std"] == 0.0
    none = advantages(rewards, groups=GROUPS, names=["f"], scale_rewards="none")
    assert none.advantages == pytest.approx([-1.0, 1.0, 0.0, 0.0])


def test_rows_without_rewards_and_groups_with_one():
    rewards = np.array([[1.0, NAN], [NAN, NAN], [0.0, 1.0], [4.0, NAN]])
    result = advantages(rewards, groups=GROUPS, names=["f", "g"], weights=[1.0, 2.0])
    # totals 1, NaN, 2, 4: group 0 has one valid row, group 1 has deviation sqrt(2)
    expected = 1 / (2**0.5 + 1e-4)
    assert result.advantages == pytest.approx([0.0, 0.0, -expected, expected])
    assert result.metrics["reward"] == pytest.approx(7 / 3)  # of rows, not of groups
    assert result.metrics["rewards/g/mean"] == 1.0


def test_normalize_then_sum_counts_a_lone_reward_as_zero():
    """TRL: the only scored row of a group sums to 0; one without any reward is left out."""
    rewards = np.array([[5.0], [NAN], [0.0], [2.0], [4.0]])
    groups = np.array([0, 0, 1, 1, 1])
    result = advantages(rewards, groups=groups, names=["f"], aggregation="normalize_then_sum")
    z = 2 / (2.0 + 1e-4)  # rewards 0, 2, 4: mean 2, deviation 2
    summed = np.array([0.0, -z, 0.0, z])
    expected = summed / (summed.std(ddof=1) + 1e-4)
    assert result.advantages == pytest.approx([expected[0], 0.0, *expected[1:]])
    assert result.advantages[4] == pytest.approx(1.2245948640)  # what TRL gives
    assert result.metrics["frac_reward_zero_std"] == 0.0


def test_normalize_then_sum():
    rewards = np.array([[0.0, 10.0], [2.0, 10.0], [1.0, 0.0], [1.0, 4.0]])
    result = advantages(rewards, groups=GROUPS, names=["f", "g"], aggregation="normalize_then_sum")
    z, y = 1 / (2**0.5 + 1e-4), 2 / (8**0.5 + 1e-4)
    summed = np.array([-z, z, -y, y])
    expected = summed / (summed.std(ddof=1) + 1e-4)
    assert result.advantages == pytest.approx(expected)


# Weighted rewards (reward, weight, size of the group) whose float64 mean differs from each of them.
BITING = [(8.1, 0.9, 3), (4.2, 1.4, 3), (1.4, 2.6, 3), (5.3, 1.3, 3), (7.8, 0.7, 3), (7.1, 2.2, 3)]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize(("reward", "weight", "size"), [*BITING, (0.1, 1.0, 8)])
def test_equal_rewards_have_advantage_zero_whatever_rounding_says(
    aggregation, scale_rewards, reward, weight, size
):
    """Beside a group of other rewards, whose own advantages are not zero."""
    column = np.array([reward] * size + [0.1, 0.7, 0.9], np.float32)
    groups = np.array([0] * size + [1, 1, 1])
    result = advantages(
        column[:, None],
        groups=groups,
        names=["f"],
        weights=[weight],
        scale_rewards=scale_rewards,
        aggregation=aggregation,
    )
    assert result.advantages[:size].tolist() == [0.0] * size
    assert np.abs(result.advantages[size:]).min() > 0.01


def test_the_values_above_are_such_that_rounding_bites():
    for reward, weight, size in BITING:
        values = np.full(size, np.float64(np.float32(reward)) * weight)
        assert values.mean() != values[0]


def test_sums_of_rounded_rewards_are_equal_and_what_float32_tells_apart_is_not():
    rewards = np.array([[0.1, 0.2], [0.3, 0.0], [0.2, 0.1]], np.float32)
    groups = np.zeros(3, int)
    result = advantages(rewards, groups=groups, names=["f", "g"], scale_rewards="none")
    assert len(set(rewards.astype(np.float64).sum(axis=1))) == 2  # by 7e-9
    assert result.advantages.tolist() == [0.0, 0.0, 0.0]
    ulp = np.spacing(np.float32(0.3))
    apart = np.array([[0.3], [np.float32(0.3) + ulp]], np.float32)
    result = advantages(apart, groups=groups[:2], names=["f"], scale_rewards="none")
    assert result.advantages == pytest.approx([-ulp / 2, ulp / 2])
    rewards[0, 0] += 1e-6
    result = advantages(rewards, groups=groups, names=["f", "g"], scale_rewards="none")
    assert result.advantages[0] == pytest.approx(2e-6 / 3, rel=0.05)
