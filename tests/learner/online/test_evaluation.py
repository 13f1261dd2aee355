"""Rewards of groups side by side: which column is whose, also where a server was not heard of."""

from typing import cast

import numpy as np
import pytest

from learner.data.prompts import Prompt
from learner.objectives.advantages import advantages
from learner.online.evaluation import OnlineEvaluator
from learner.online.experience import EvalResult, PromptGroup, reward_matrix
from learner.online.source import OnlineSource
from tests.protocol.builders import a_completion, a_group, a_reward


def trained(names, rewards):
    """Make a group of two completions with these rewards (2, F)."""
    flat = [value for row in rewards for value in row]
    group = a_group([a_completion([1])] * 2, reward=a_reward(flat, names))
    return PromptGroup(Prompt(0, [1], {"prompt": "1+2=", "answer": 3}), group)


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


class Finished:
    """A source whose evaluation is finished."""

    def evaluate(self, version):
        self.version = version

    def next_eval(self):
        return EvalResult(self.version, groups((["f"], [[1], [0]])), 0)


def test_lines_hold_the_rest_of_the_row_so_that_answers_can_be_scored_again():
    source = cast(OnlineSource, Finished())
    evaluator = OnlineEvaluator(source, None, lambda _, version: {"trained_at": version})
    evaluator.start(4)
    found = evaluator.poll()
    assert found is not None
    version, metrics, lines = found
    assert (version, metrics["eval/reward"]) == (4, 0.5)
    assert lines == [{"trained_at": 4, "kind": "eval", "columns": {"answer": 3}}]
