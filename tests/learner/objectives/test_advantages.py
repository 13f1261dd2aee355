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
