"""The coordinator against hand-made actors: what is sent, in what order."""

import numpy as np
import pytest
from msgspec.structs import replace

from learner.online.tasks import task_seed
from protocol.messages.messages import (
    PROTOCOL_VERSION,
    Ack,
    Applied,
    Cancel,
    Failed,
    Heartbeat,
    Refuse,
    Release,
    Request,
    Welcome,
)
from protocol.messages.parts import MemoryUse, PolicySpan
from tests.learner.small_run import A, B, G, coordinator, group, hello, join, said, tasks
from tests.protocol.builders import a_completion, a_policy, a_reward, task_id


def test_hello_then_policy_then_work_within_credit_and_the_bound():
    made = coordinator()
    made.receive(A, hello(), 0.0)
    welcome, announced = said(made, A)
    assert isinstance(welcome, Welcome)
    assert announced == a_policy(0)
    made.receive(A, Request(free_completions=5), 0.0)
    first = tasks(made, A)
    assert [t.task.number for t in first] == [0, 1]  # two groups of two completions fit in five
    made.receive(A, Request(free_completions=100), 0.0)
    second = tasks(made, A)
    assert [t.task.number for t in second] == [2, 3]  # (eta + 1) B = 4 tasks in all
    assert {t.min_policy_version for t in (*first, *second)} == {0}
    assert first[0].trainer_state == {"global_step": 0, "max_steps": 3}


def test_what_an_actor_samples_at_a_time_is_told_to_the_user(caplog):
    made = coordinator()
    with caplog.at_level("INFO"):
        made.receive(A, hello(capacity="64 completions at a time: as asked"), 0.0)
    assert "actor a: 64 completions at a time: as asked" in caplog.messages


def test_an_enquiry_gets_the_terms_and_no_work():
    made = coordinator()
    made.receive(A, hello(model_digest="", tokenizer_digest=""), 0.0)
    (welcome,) = said(made, A)
    assert isinstance(welcome, Welcome)
    made.receive(A, Request(free_completions=8), 0.0)
    (refused,) = said(made, A)
    assert isinstance(refused, Refuse)
    assert (refused.code, refused.fatal) == ("hello_required", False)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"protocol_version": 9}, "protocol_version", (f"version {PROTOCOL_VERSION}", "speaks 9")),
        ({"model_digest": "x"}, "model", ("digest m", "has x")),
        ({"tokenizer_digest": "y"}, "tokenizer", ("digest t", "has y")),
    ],
)
def test_another_version_model_or_tokenizer_is_refused_naming_both_sides(changes, code, words):
    made = coordinator()
    made.receive(A, hello(**changes), 0.0)
    (refused,) = said(made, A)
    assert isinstance(refused, Refuse)
    assert (refused.code, refused.fatal) == (code, True)
    assert all(word in refused.reason for word in words)
    assert made.connected.counters[f"refused_{code}"] == 1


def test_a_reconnected_actor_keeps_its_leases_and_is_told_them_again():
    made = coordinator()
    before = join(made)
    assert len(before) == 4
    made.receive(B, hello(), 1.0)
    assert tasks(made, B) == before  # the same attempts: they may have been lost on the way
    assert list(made.connected.by_peer) == [B]
    made.receive(B, group(before[0]), 2.0)
    assert said(made, B) == [Ack(task=before[0].task, attempt=1)]


def test_a_restarted_actor_loses_its_leases_at_once():
    made = coordinator()
    join(made)
    made.receive(B, hello(incarnation="2"), 1.0)
    made.receive(B, Request(free_completions=8), 1.0)
    again = tasks(made, B)
    assert [(t.task.number, t.attempt) for t in again] == [(0, 2), (1, 2), (2, 2), (3, 2)]
    assert [t.seed for t in again] == [task_seed(7, position, "train") for position in range(4)]


def test_a_second_group_is_acknowledged_and_dropped():
    made = coordinator()
    first, second, *_ = join(made)
    for _ in range(2):
        made.receive(A, group(first), 1.0)
        assert said(made, A) == [Ack(task=first.task, attempt=1)]
    assert made.next_batch(1.0) is None
    made.receive(A, group(second), 1.0)
    batch = made.next_batch(1.0)
    assert batch is not None
    assert [item.prompt.row_key for item in batch.groups] == [0, 1]
    assert made.metrics()["ledger/duplicates"] == 1


def test_the_slower_attempt_is_cancelled():
    made = coordinator()
    first, *_ = join(made)
    made.tick(61.0)  # leases ran out, and the silent actor is forgotten
    assert tasks(made, A) == []
    made.receive(B, hello("b"), 62.0)
    made.receive(B, Request(free_completions=2), 62.0)
    (again,) = tasks(made, B)
    assert (again.task, again.attempt) == (first.task, 2)
    made.receive(A, hello(), 63.0)
    made.receive(A, group(first), 63.0)
    assert said(made, B) == [Cancel(task=first.task, attempt=2)]


def test_progress_renews_leases_and_its_lack_ends_them():
    made = coordinator()
    first, *_ = join(made, free_completions=2)
    made.receive(A, Heartbeat(progress=1), 50.0)
    made.tick(70.0)
    assert said(made, A) == []
    made.receive(A, Heartbeat(progress=1), 90.0)  # alive, but the main thread did not move
    made.tick(110.0)
    assert said(made, A) == [Cancel(task=first.task, attempt=1)]


def test_what_the_last_heartbeats_say_is_reported_per_actor_and_in_sum():
    made = coordinator()
    join(made, A)
    join(made, B, "b")
    memory = MemoryUse(active_bytes=10**9, peak_bytes=3 * 10**9, cache_bytes=5 * 10**8)
    made.receive(A, Heartbeat(progress=1, groups_held=2, tokens_per_s=5.0, memory=memory), 1.0)
    made.receive(B, Heartbeat(progress=1, groups_held=1, tokens_per_s=7.0, memory=memory), 1.0)
    metrics = made.metrics()
    assert metrics["actors/groups_held"] == 3
    assert metrics["actors/tokens_per_s"] == 12.0
    names = [f"memory_{name}_gb" for name in ("active", "peak", "cache")]
    assert [metrics[f"actors/b/{name}"] for name in names] == [1.0, 3.0, 0.5]
    assert [metrics[f"actors/{name}"] for name in names] == [2.0, 6.0, 1.0]


def test_an_actor_whose_leases_ran_out_gets_others_only_once_it_moves():
    made = coordinator()
    assert len(join(made, free_completions=2 * G)) == 2
    made.receive(A, Request(free_completions=G), 1.0)
    (third,) = tasks(made, A)
    made.receive(A, Request(free_completions=100 * G), 2.0)
    assert [t.task.number for t in tasks(made, A)] == [3]
    made.receive(A, Heartbeat(progress=1), 10.0)
    made.receive(A, Heartbeat(progress=1), 65.0)
    made.tick(71.0)
    assert {type(message) for message in said(made, A)} == {Cancel}  # and room for 97 groups
    made.receive(A, Heartbeat(progress=1), 72.0)
    assert tasks(made, A) == []
    made.receive(A, Heartbeat(progress=2), 73.0)
    again = tasks(made, A)
    assert [(t.task.number, t.attempt) for t in again] == [(0, 2), (1, 2), (2, 2), (3, 2)]
    assert again[2].task == third.task


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"completions": []}, None),
        ({"reward": a_reward([1.0, np.inf])}, "finite"),
    ],
)
def test_a_group_that_cannot_be_trained_is_refused_and_leased_again(changes, words):
    made = coordinator()
    first, *_ = join(made, free_completions=2)
    if words is None:
        one = group(first).completions[:1]
        changes = {"completions": one, "reward": a_reward([1.0])}
        words = "2 completions are required, got 1"
    made.receive(A, group(first, **changes), 1.0)
    refused, ack = said(made, A)
    assert isinstance(refused, Refuse)
    assert words in refused.reason
    assert ack == Ack(task=first.task, attempt=1)
    made.receive(A, Request(free_completions=2), 1.0)
    assert [(t.task.number, t.attempt) for t in tasks(made, A)] == [(0, 2)]


def test_tokens_of_an_unknown_digest_are_refused():
    made = coordinator()
    first, *_ = join(made)
    spans = [PolicySpan(start=0, version=0, digest="other")]
    strange = a_completion([5, 1], policy_spans=spans)
    made.receive(A, group(first, completions=[strange] * G), 1.0)
    refused = said(made, A)[0]
    assert isinstance(refused, Refuse)
    assert "policy 0 has digest d0, tokens were sampled by other" in refused.reason


def test_a_group_of_another_learner_is_stale_and_acknowledged():
    made = coordinator()
    first, *_ = join(made)
    other = replace(first, task=task_id(0, incarnation="L0"))
    made.receive(A, group(other), 1.0)
    refused, ack = said(made, A)
    assert isinstance(refused, Refuse)
    assert (refused.code, refused.fatal) == ("stale", False)
    assert ack == Ack(task=other.task, attempt=1)
    assert made.metrics()["ledger/discarded"] == 1


def test_failures_drop_a_task_after_three_attempts_and_the_next_row_takes_its_place():
    made = coordinator()
    (task,) = join(made, free_completions=2)
    for _ in range(3):
        made.receive(A, Failed(task=task.task, attempt=task.attempt, reason="no room"), 1.0)
        assert said(made, A) == [Ack(task=task.task, attempt=task.attempt)]
        made.receive(A, Request(free_completions=2), 1.0)
        (task,) = tasks(made, A)
    assert task.task.number == 1
    assert made.metrics()["ledger/dropped"] == 1


def test_an_orderly_leave_is_not_held_against_the_tasks():
    made = coordinator()
    for attempt in range(1, 6):
        (task,) = join(made, free_completions=2)
        assert (task.task.number, task.attempt) == (0, attempt)
        made.receive(A, Release(reason="asked"), 1.0)
    assert made.metrics()["ledger/dropped"] == 0


def test_the_policy_waits_for_an_open_evaluation_whose_actor_died():
    made = coordinator(eval_rows=2)
    made.evaluate(0, 0.0)
    leased = join(made)
    pinned = [t for t in leased if t.kind == "eval"]
    assert [t.pinned_version for t in pinned] == [0, 0]
    made.receive(A, group(pinned[0]), 1.0)
    for task in leased:
        if task.kind == "train":
            made.receive(A, group(task), 1.0)
    assert made.next_batch(1.0) is not None
    made.publish(a_policy(1), 2.0)
    assert made.policy == a_policy(0)
    made.actor_gone(A, 3.0)
    made.connected.take_outgoing()
    made.receive(B, hello("b"), 3.0)
    made.receive(B, Request(free_completions=1), 3.0)
    (again,) = tasks(made, B)
    assert (again.kind, again.task, again.attempt) == ("eval", pinned[1].task, 2)
    assert made.next_eval(3.0) is None
    made.receive(B, group(again, name="b"), 4.0)
    result = made.next_eval(4.0)
    assert result is not None
    assert (result.version, result.dropped) == (0, 0)
    assert [item.prompt.row_key for item in result.groups] == [40, 41]
    assert a_policy(1) in said(made, B)


def test_snapshots_are_needed_until_every_actor_applied_a_newer_one():
    made = coordinator()
    join(made)
    join(made, B, "b")
    assert made.oldest_needed() == 0
    made.receive(A, Applied(version=3, digest="d3"), 1.0)
    assert made.oldest_needed() == 0
    made.actor_gone(B, 1.0)
    assert made.oldest_needed() == 3
    made.actor_gone(A, 1.0)
    assert made.oldest_needed() == 0  # no actor: the policy that is announced to the next
