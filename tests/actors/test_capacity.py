"""How many completions an actor takes, from figures by hand, and its estimate beside the engine."""

import argparse
from dataclasses import replace
from typing import Any, Literal

import pytest

from actors.capacity import (
    ActorMemory,
    Capacity,
    capacity_of,
    choose_capacity,
    estimate_memory,
    memory_budget,
)
from launch.actor import completions
from protocol.config.settings import ModelSettings
from protocol.errors import ModelError
from protocol.model.policy import load_policy
from tests.benchmarks.actor_memory import Case, measure
from tests.protocol.builders import a_welcome
from tests.tiny import CONFIG, tensors, tiny_model, write_model_folder

MEMORY = ActorMemory(
    weights=1000,
    slot=80,
    slot_layer=20,
    sampling=10,
    position=2,
    token=5,
    max_prompt=8,
    chunk=10,
    num_generations=4,
)


def test_the_peak_is_weights_slots_and_the_larger_of_prefill_and_sampling():
    # One prompt of 8 tokens: 8 positions, and 8 tokens in one pass.
    assert MEMORY.total(1) == 1000 + 100 + 8 * 2 + 8 * 5
    # Two prompts: 16 positions, but only 10 tokens in one pass.
    assert MEMORY.total(5) == 1000 + 500 + 16 * 2 + 10 * 5
    assert replace(MEMORY, sampling=40).total(5) == 1000 + 500 + 5 * 40


def test_prompts_are_read_together_up_to_8192_tokens():
    long = replace(MEMORY, max_prompt=3000)
    assert long.total(8) == 1000 + 800 + 6000 * 2 + 10 * 5
    assert long.total(16) == 1000 + 1600 + 8192 * 2 + 10 * 5
    assert replace(MEMORY, max_prompt=9000).total(1) == 1000 + 100 + 9000 * 2 + 10 * 5


@pytest.mark.parametrize(
    ("budget", "most"), [(1155, 0), (1156, 1), (1581, 4), (1582, 5), (10**6, 64)]
)
def test_the_most_that_a_budget_holds(budget: int, most: int):
    assert MEMORY.most_within(budget, 64) == most


def test_what_is_counted_in_a_model():
    model = tiny_model()
    stored = 4 * sum(array.size for array in tensors(model).values())
    found = estimate_memory(
        model, CONFIG, max_prompt=20, max_tokens=40, num_generations=8, prefill_step_size=64
    )
    # Two layers, keys and values of one head of 32 numbers; slots of 64 positions hold 40.
    position = 2 * 2 * 32 * 4
    assert found == ActorMemory(
        weights=stored,
        slot=64 * position,
        slot_layer=64 * position // 2,
        sampling=3 * 64 * 4,
        position=2 * position,
        token=(3 * 32 + 3 * 64) * 4 + 2 * 20 * 4,  # and two heads' scores against the prompt
        max_prompt=20,
        chunk=64,
        num_generations=8,
    )


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({"local_actors": 1}, 800 - 300),
        ({"local_actors": 2}, (800 - 300) // 2),
        ({"local_actors": 2, "device": "1"}, 800 // 2),
        ({"local_actors": 2, "host": "other"}, 800),
        ({"local_actors": 1, "learner_bytes": 900}, 0),
    ],
    ids=str,
)
def test_the_budget_is_what_the_learner_and_other_actors_leave(
    changes: dict[str, Any], budget: int
):
    welcome = a_welcome(**({"host": "here", "device": "0", "learner_bytes": 300} | changes))
    assert memory_budget(welcome, host="here", device="0", memory=1000) == budget


@pytest.mark.parametrize(
    ("asked", "actors", "budget", "completions", "fits", "reason"),
    [
        ("auto", 1, 10**6, 128, True, "the queue holds at most 128 in flight"),
        ("auto", 3, 10**6, 43, True, "the queue holds at most 128 in flight over 3 actors"),
        ("auto", 0, 10**6, 128, True, "the queue holds at most 128 in flight"),  # remote
        (
            "auto",
            1,
            1582,
            5,
            True,
            "bounded by memory, as there is 0.00 GB for it; 128 would use the whole queue",
        ),
        (
            "auto",
            1,
            0,
            1,
            False,
            "bounded by memory, as there is 0.00 GB for it; 128 would use the whole queue",
        ),
        (64, 1, 10**6, 64, True, "as asked"),
        (64, 1, 1582, 64, False, "as asked, but there is 0.00 GB for it, enough for 5"),
    ],
)
def test_how_many_completions_are_chosen_and_why(
    asked: int | Literal["auto"],
    actors: int,
    budget: int,
    completions: int,
    fits: bool,
    reason: str,
):
    welcome = a_welcome(in_flight_completions=128, local_actors=actors)
    chosen = choose_capacity(asked, welcome, MEMORY, budget)
    assert chosen == Capacity(completions, MEMORY.total(completions), reason, fits)


def test_all_actors_of_a_deterministic_run_sample_as_many_at_a_time():
    welcome = a_welcome(in_flight_completions=128, local_actors=3, deterministic=True)
    reason = "the queue holds at most 128 in flight"
    chosen = choose_capacity("auto", welcome, MEMORY, 10**6)
    assert chosen == Capacity(128, MEMORY.total(128), reason, fits=True)

    assert choose_capacity("auto", welcome, MEMORY, MEMORY.total(128)).completions == 128
    expected = r"run.deterministic: all actors sample 128 completions .* enough for 127\."
    with pytest.raises(ModelError, match=expected):
        choose_capacity("auto", welcome, MEMORY, MEMORY.total(128) - 1)
    assert choose_capacity(5, welcome, MEMORY, 1582).completions == 5


def test_the_choice_in_one_line():
    chosen = Capacity(64, 2_140_000_000, "as asked", fits=True)
    assert str(chosen) == "64 completions at a time, estimated at 2.14 GB: as asked"


@pytest.mark.parametrize(("asked", "level"), [("auto", "INFO"), (10**7, "WARNING")])
def test_the_choice_is_logged_and_a_number_that_does_not_fit_is_warned_about(
    tmp_path: Any, caplog: pytest.LogCaptureFixture, asked: int | Literal["auto"], level: str
):
    settings = ModelSettings(path=str(write_model_folder(tmp_path)), dtype="float32")
    policy = load_policy(settings, seed=0)
    terms: dict[str, Any] = {"in_flight_completions": 64, "max_prompt": 100, "max_tokens": 200}
    with caplog.at_level("INFO", logger="pippin.actor"):
        chosen = capacity_of(asked, a_welcome(**terms), policy, prefill_step_size=64)
    assert chosen.completions == (64 if asked == "auto" else asked)
    assert [record.levelname for record in caplog.records] == [level]
    shared = capacity_of(
        asked, a_welcome(**terms), policy, prefill_step_size=64, shares_weights=True
    )
    weights = sum(array.nbytes for array in tensors(policy.model).values())
    assert chosen.peak_bytes - shared.peak_bytes == weights


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_the_flag_takes_auto_or_a_number(text: str):
    assert (completions("auto"), completions("7")) == ("auto", 7)
    with pytest.raises(argparse.ArgumentTypeError, match="auto or a number of at least 1"):
        completions(text)


SMALL = Case(hidden=128, layers=4, vocab=1024, rows=32, completion=8)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rows": 64},
        {"prompt": 300, "rows": 16},
        {"group": 1},
        {"vocab": 8192, "prompt": 16, "rows": 64},
    ],
    ids=str,
)
def test_estimates_are_near_measured_peaks(changes: dict[str, int]):
    case = replace(SMALL, **changes)
    peak, estimate = measure(case)
    assert 0.75 < estimate.total(case.rows) / peak < 1.25
