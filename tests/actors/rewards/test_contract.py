"""The contract with one reward function: loading, calling, checking what it returns."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from actors.rewards.contract import RewardCall, check_rewards
from actors.rewards.loader import load_rewards
from protocol.errors import RewardError
from protocol.messages.rewards import ScoreRequest

HERE = Path(__file__).parent
TRL = HERE / "trl_like.py"


def chat(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def outcome(spec, **fields):
    """Load a function and call it for one group."""
    (function,) = load_rewards([spec])
    count = len(fields["completions"])
    fields = {"prompts": ["p"] * count, "completion_ids": [[1]] * count} | fields
    call = RewardCall(0, function, ScoreRequest(id="x", **fields))
    return asyncio.run(call.run_async()) if function.is_async else call.run()


@pytest.mark.parametrize(
    ("returned", "rewards"),
    [
        ([1, 2.5], [1.0, 2.5]),
        ((None, True), [None, 1.0]),
        ([float("nan"), -0.5], [None, -0.5]),
        (np.array([1.0, 2.0], np.float32), [1.0, 2.0]),
        ([np.float64(3.0), np.int64(4)], [3.0, 4.0]),
        ((x for x in (1.0, 2.0)), [1.0, 2.0]),
    ],
)
def test_numbers_and_none_are_rewards(returned, rewards):
    assert check_rewards("f", returned, 2) == rewards


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], "returned 1 rewards, but 2 were required"),
        ([1.0] * 3, "returned more than 2 rewards"),
        (1.0, "required a list of 2 floats or None, got float"),
        (None, "got NoneType"),
        ("ab", "got str"),
        ({0: 1.0, 1: 2.0}, "got dict"),
        (["1", 2.0], "reward 0 must be a float or None, got str"),
        ([1.0, [2.0]], "reward 1 must be a float or None, got list"),
        ([1.0, float("inf")], "reward 1 must be finite in float32"),
        ([1e39, 0.0], "reward 0 must be finite in float32, got 1e\\+39"),
        (np.ones((2, 1)), "reward 0 must be a float"),
    ],
)
def test_anything_else_is_an_error_that_names_the_function(returned, words):
    with pytest.raises(RewardError, match=f"'f'.*{words}"):
        check_rewards("f", returned, 2)


def test_functions_with_the_signatures_of_trl():
    think = outcome(f"{TRL}:think_format_reward", completions=chat("<think>a</think>b", "b"))
    assert think.rewards == [1.0, 0.0]
    judged = outcome(
        f"{TRL}:accuracy_reward",
        completions=chat("it is 4", "it is 5", "6"),
        columns={"solution": ["4", "4", ""]},
    )
    assert judged.rewards == [1.0, 0.0, None]
    # 10 of 12 allowed are free of charge, then 1/2 and 2/2 of the cache, then -1 beyond.
    punished = outcome(
        f"{TRL}:get_soft_overlong_punishment(12, soft_punish_cache=2)",
        completions=["x"] * 4,
        completion_ids=[[0] * n for n in (10, 11, 12, 13)],
    )
    assert punished.rewards == [0.0, -0.5, -1.0, -1.0]


def test_names_are_those_of_the_functions_and_unique():
    specs = [f"{TRL}:accuracy_reward", f"{TRL}:get_soft_overlong_punishment(2, 1)"]
    names = [f.name for f in load_rewards(specs + specs[:1])]
    assert names == ["accuracy_reward", "soft_overlong_punishment_reward", "accuracy_reward_2"]
    assert load_rewards(["tests.actors.rewards.trl_like:accuracy_reward"])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.at.all:f", "nowhere.at.all cannot be imported"),
        ("missing.py:f", "there is no file"),
        ("f", "required package.module:function"),
        (f"{TRL}:nothing", "it defines accuracy_reward"),
        (f"{TRL}:re", "required a function, got module"),
        (f"{TRL}:get_soft_overlong_punishment", r"add \*\*kwargs"),
        (f"{TRL}:get_soft_overlong_punishment(open)", "must be literals"),
    ],
)
def test_what_cannot_be_loaded_is_named(spec, words):
    with pytest.raises(RewardError, match=words):
        load_rewards([spec])


def test_a_missing_column_is_a_fault_of_the_contract():
    refused = outcome(f"{TRL}:accuracy_reward", completions=chat("a"))
    assert refused.fault is not None
    assert refused.fault.kind == "contract"
    assert "solution" in refused.fault.message
    assert refused.rewards is None


def test_metrics_that_are_not_finite_are_left_out():
    logged = outcome(f"{HERE / 'sample_rewards.py'}:logs", completions=["a", "b"])
    assert logged.log_metric == {"accuracy": [1.0]}
    assert logged.log_extra == {"seen": ["a", "b"]}
    assert logged.rewards == [0.0, 0.0]
