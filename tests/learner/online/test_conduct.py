"""Liars: groups that cannot be, leases of others, and the actor that goes on sending them."""

import logging

import numpy as np
import pytest
from msgspec.structs import replace

from learner.online.conduct import MAX_FAULTS, MAX_NAMES, Conduct
from learner.online.reward_names import CERTAIN_S
from learner.online.tasks import LOGPROB_TOLERANCE
from protocol.messages.arrays import floats_bytes
from protocol.messages.messages import Ack, Cancel, Failed, Refuse, Request
from tests.learner.small_run import A, B, G, coordinator, group, hello, join, said, tasks
from tests.protocol.builders import a_completion, a_reward


def completions(logprobs=(-0.5, -0.5), kept=None):
    """Make G completions, the last with these log-probs and kept masses."""
    good = a_completion([5, 1], version=0)
    masses = b"" if kept is None else floats_bytes(kept)
    last = replace(good, sampling_logprobs=floats_bytes(logprobs), kept_logmass=masses)
    return [good] * (G - 1) + [last]


FAULTS = {
    "logprobs above 0": ("logprobs", {"completions": completions((-0.5, 0.01))}),
    "logprobs nan": ("logprobs", {"completions": completions((float("nan"), -0.5))}),
    "logprobs inf": ("logprobs", {"completions": completions((float("-inf"), -0.5))}),
    "mass above 0": ("kept_logmass", {"completions": completions(kept=(0.5, -0.1))}),
    "mass nan": ("kept_logmass", {"completions": completions(kept=(float("nan"), -0.1))}),
    "other function": ("reward_names", {"reward": a_reward([1.0] * G, ["g"])}),
    "one more": ("reward_names", {"reward": a_reward([1.0] * 2 * G, ["f", "g"])}),
    "reward inf": ("rewards", {"reward": a_reward([float("inf")] * G)}),
    "too many": ("completions", {"completions": completions() * 2, "reward": a_reward([1.0] * 4)}),
}


@pytest.mark.parametrize(("kind", "changes"), FAULTS.values(), ids=FAULTS)
def test_groups_that_cannot_be_are_refused_and_counted_by_kind(kind, changes):
    made = coordinator()
    made.deliveries.reward_names.learned(["f"], 0.0)
    first, *_ = join(made, free_completions=2)
    made.receive(A, group(first, **changes), 1.0)
    answers = said(made, A)
    assert [m.code for m in answers if isinstance(m, Refuse)] == ["invalid"]
    assert Ack(task=first.task, attempt=1) in answers
    assert made.metrics()[f"wire/groups_invalid_{kind}"] == 1.0
    assert made.metrics()["wire/groups_invalid"] == 1.0


@pytest.mark.parametrize("logprobs", [(0.0, -0.5), (LOGPROB_TOLERANCE / 2, -0.5), (-80.0, -1e-7)])
def test_rounding_above_zero_is_accepted(logprobs):
    made = coordinator()
    made.deliveries.reward_names.learned(["f"], 0.0)
    first, *_ = join(made, free_completions=2)
    made.receive(A, group(first, completions=completions(logprobs, kept=logprobs)), 1.0)
    assert not any(isinstance(m, Refuse) for m in said(made, A))
    assert made.ledger.state.queue


def test_float32_log_softmax_stays_within_the_tolerance():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(200, 4096)) * rng.uniform(1, 2000, size=(200, 1))).astype(np.float32)
    top = logits.max(axis=1, keepdims=True)
    sums = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True, dtype=np.float32))
    assert (logits - sums).max() <= LOGPROB_TOLERANCE


def test_a_group_without_names_or_before_the_names_are_known_is_accepted():
    for known, reward in ((["f"], a_reward([], [])), (None, a_reward([1.0] * G, ["x"]))):
        made = coordinator()
        if known is not None:
            made.deliveries.reward_names.learned(known, 0.0)
        first, *_ = join(made, free_completions=2)
        made.receive(A, group(first, reward=reward), 1.0)
        assert "wire/groups_invalid" not in made.metrics()


def test_an_actor_is_not_blamed_for_a_reward_server_that_was_restarted_with_other_functions():
    made = coordinator()
    made.deliveries.reward_names.learned(["f"], 0.0)
    first, *_ = join(made, free_completions=2)
    other = a_reward([1.0] * G, ["g"])
    for _ in range(2 * MAX_FAULTS):  # the services have not been asked since
        made.receive(A, group(first, reward=other), CERTAIN_S)
    assert A in made.connected.by_peer
    assert made.deliveries.reward_names.doubted

    made.deliveries.reward_names.learned(["g"], CERTAIN_S)
    assert not made.deliveries.reward_names.doubted
    again, *_ = join(made, B, "b", free_completions=2)
    made.receive(B, group(again, "b", reward=other), CERTAIN_S + 1)
    assert made.ledger.state.counters.received == 1


def test_nobody_answers_or_fails_a_lease_of_another():
    made = coordinator()
    first, *_ = join(made, free_completions=2)
    join(made, B, "b", free_completions=2)
    made.receive(B, group(first, "b"), 1.0)
    made.receive(B, group(first, "a"), 1.0)  # and says that it is from the holder
    made.receive(B, Failed(task=first.task, attempt=1, reason="mine now"), 1.0)
    assert made.metrics()["wire/groups_invalid_lease"] == 2.0
    assert made.metrics()["wire/failures_of_others"] == 1.0
    assert not any(isinstance(m, Cancel) for m in said(made, A))

    made.receive(A, group(first), 2.0)  # its holder's group counts
    assert Ack(task=first.task, attempt=1) in said(made, A)
    assert made.metrics()["wire/groups_invalid"] == 2.0


def test_a_late_group_of_an_earlier_attempt_is_its_holders():
    made = coordinator()
    first, *_ = join(made, free_completions=2)
    made.tick(61.0)
    made.receive(B, hello("b"), 61.0)
    made.receive(B, Request(free_completions=2), 61.0)
    (again,) = tasks(made, B)
    assert (again.task, again.attempt) == (first.task, 2)
    made.receive(B, group(first, "b"), 62.0)  # the first attempt was not b's
    assert made.metrics()["wire/groups_invalid_lease"] == 1.0
    made.receive(A, hello("a"), 62.0)
    made.receive(A, group(first), 62.0)
    assert Cancel(task=first.task, attempt=2) in said(made, B)


def test_an_actor_that_keeps_sending_bad_groups_is_turned_away_once(caplog):
    made = coordinator()
    first, second, *_ = join(made, free_completions=4)
    with caplog.at_level(logging.WARNING):
        for _ in range(MAX_FAULTS):
            # The lease of another's task would do as well: what counts is that none can be used.
            made.receive(A, replace(group(first), actor_id="b"), 1.0)
    (told,) = [m for m in said(made, A) if isinstance(m, Refuse) and m.fatal]
    assert told.code == "turned_away"
    assert sum("turned away" in message for message in caplog.messages) == 1
    assert made.metrics()["wire/refused_turned_away"] == 1.0

    assert A not in made.connected.by_peer
    freed = {task.task.number: task.attempt for task in join(made, B, "b")}
    assert {first.task.number: 2, second.task.number: 2}.items() <= freed.items()
    made.receive(b"new", hello("a", "2"), 2.0)
    (again,) = said(made, b"new")
    assert isinstance(again, Refuse)
    assert (again.code, again.fatal) == ("turned_away", True)


def test_good_groups_make_up_for_bad_ones():
    conduct = Conduct()
    for _ in range(MAX_FAULTS - 1):
        conduct.fault("a")
        assert not conduct.is_turned_away("a")
    conduct.useful("a")
    conduct.fault("a")
    assert not conduct.is_turned_away("a")
    assert not conduct.is_turned_away("a")
    conduct.fault("a")
    assert conduct.is_turned_away("a")
    conduct.useful("a")  # too late
    assert conduct.is_turned_away("a")
    conduct.fault("a")
    assert conduct.is_turned_away("a")


def test_names_with_faults_are_bounded():
    conduct = Conduct()
    for _ in range(MAX_FAULTS - 1):
        conduct.fault("a")
    for number in range(MAX_NAMES):
        conduct.fault(str(number))
    conduct.fault("a")
    assert not conduct.is_turned_away("a")
