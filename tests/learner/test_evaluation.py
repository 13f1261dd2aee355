"""Rewards of groups side by side: which column is whose, also where a server was not heard of."""

import numpy as np
import pytest

from learner.advantages import advantages
from learner.evaluation import reward_matrix
from learner.experience import TrainedGroup
from learner.sources.prompts import Prompt
from protocol import messages as m


def trained(names, rewards):
    """Make a group of two completions with these rewards (2, F)."""
    one = m.Completion(
        token_ids=m.ids_bytes([1]),
        behaviour_logprobs=m.floats_bytes([0.0]),
        policy_spans=[m.PolicySpan(start=0, version=0, digest="")],
        finish_reason="stop",
    )
    table = np.array(rewards, np.float32).reshape(-1)
    group = m.Group(
        task=m.TaskId(run="r", incarnation="i", number=0),
        attempt=0,
        actor_id="a",
        actor_incarnation="i",
        learner_incarnation="i",
        completions=[one, one],
        reward=m.RewardResult(names=names, rewards=m.floats_bytes(table)),
        started_at=0.0,
        finished_at=0.0,
        generation_s=0.0,
        reward_s=0.0,
    )
    return TrainedGroup(Prompt(0, [1], {}), group)


def groups(*given):
    """Make a group of each pair of names and rewards."""
    return [trained(names, rewards) for names, rewards in given]


def test_groups_without_names_count_as_none():
    names, table = reward_matrix(groups(([], []), (["f", "g"], [[1, 2], [3, np.nan]])))
    assert names == ["f", "g"]
    nan = np.nan
    np.testing.assert_array_equal(table, [[nan, nan], [nan, nan], [1, 2], [3, nan]])


def test_other_functions_come_after_the_rest():
    names, table = reward_matrix(groups((["h"], [[5], [6]]), (["f", "g"], [[1, 2], [3, 4]])))
    assert names == ["f", "g", "h"]
    nan = np.nan
    np.testing.assert_array_equal(table, [[nan, nan, 5], [nan, nan, 6], [1, 2, nan], [3, 4, nan]])


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_batch_without_any_names_has_no_advantages(aggregation):
    names, table = reward_matrix(groups(([], [])))
    assert (names, table.shape) == ([], (2, 0))
    result = advantages(table, groups=np.zeros(2, int), names=names, aggregation=aggregation)
    np.testing.assert_array_equal(result.advantages, [0, 0])
