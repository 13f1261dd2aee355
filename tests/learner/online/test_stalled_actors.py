"""Actors that do not get on with their work, and runs in which nothing moves."""

import logging
from typing import Any

import pytest
from msgspec.structs import replace

from learner.ledger.ledger import Ledger
from learner.online.coordinator import Coordinator
from learner.online.progress import ActorProgress
from protocol.messages.messages import (
    Ack,
    Applied,
    Cancel,
    Heartbeat,
    Policy,
    Request,
    Task,
)
from tests.learner.small_run import (
    LIMITS,
    A,
    B,
    G,
    coordinator,
    coordinator_of,
    group,
    hello,
    join,
    said,
    tasks,
)
from tests.protocol.builders import a_policy


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pippin.learner")


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Take what the user was told."""
    messages = list(caplog.messages)
    caplog.clear()
    return messages


def leased(sent: list[Task]) -> list[tuple[int, int]]:
    return [(task.task.number, task.attempt) for task in sent]


def beats(made: Coordinator, until: float, start: float = 0.0, **fields: Any) -> None:
    """Send heartbeats of a main thread of a that turns, every 10 s, and let time pass."""
    now = start
    while now < until:
        now += 10.0
        made.receive(A, Heartbeat(progress=int(now), **fields), now)
        if B in made.connected.by_peer:
            made.receive(B, Heartbeat(progress=int(now)), now)
        made.tick(now)


def idle_b(made: Coordinator, now: float) -> None:
    """Have actor b join, with the newest policy and room for everything."""
    made.receive(B, hello("b"), now)
    made.receive(B, Applied(version=9, digest="d"), now)
    made.receive(B, Request(free_completions=100), now)
    said(made, B)


def after_a_step() -> Coordinator:
    """Make a coordinator at version 1; actor a holds tasks 2 to 5 and still samples with 0."""
    made = coordinator()
    first = join(made)
    made.receive(A, Applied(version=0, digest="d0"), 0.0)
    for task in first[:2]:
        made.receive(A, group(task), 1.0)
    assert made.next_batch(1.0) is not None
    made.receive(A, Request(free_completions=2 * G), 1.0)
    made.publish(a_policy(1), 2.0)
    sent = said(made, A)
    assert [type(m) for m in sent] == [Ack, Ack, Policy, Task, Task]
    assert [m.task.number for m in sent if isinstance(m, Task)] == [4, 5]
    return made


def test_an_actor_that_cannot_fetch_the_policy_is_named_and_works_again_once_it_has_it(caplog):
    made = after_a_step()
    made.policy_timeout_s = 200.0
    idle_b(made, 3.0)
    told(caplog)
    for now in (100.0, 202.0):
        made.receive(A, Heartbeat(progress=int(now)), now)
        made.receive(B, Heartbeat(progress=int(now)), now)
        made.tick(now)
    assert told(caplog) == []
    made.tick(202.1)
    assert told(caplog) == [
        "actor a has applied no newer policy for 200 s (queue.policy_timeout_s), though one was "
        "announced: it cannot fetch it; its tasks go to others"
    ]
    outgoing = made.connected.take_outgoing()
    cancelled = [m.task.number for peer, m in outgoing if peer == A and isinstance(m, Cancel)]
    given = [m for peer, m in outgoing if peer == B and isinstance(m, Task)]
    assert (cancelled, len(outgoing)) == ([2, 3, 4, 5], 8)
    assert leased(given) == [(2, 2), (3, 2), (4, 2), (5, 2)]
    assert made.ledger.state.queue[2].failures == 0

    made.receive(A, Request(free_completions=100), 203.0)
    made.actor_gone(B, 203.0, blamed=False)
    made.tick(204.0)
    assert said(made, A) == []
    made.receive(A, Applied(version=1, digest="d1"), 205.0)
    assert leased(tasks(made, A)) == [(2, 3), (3, 3), (4, 3), (5, 3)]
    assert told(caplog) == ["actor a works again"]


def test_an_actor_that_applies_newer_policies_may_always_be_behind():
    actor = ActorProgress(turned_at=0.0)
    actor.announced(1, 10.0)
    actor.announced(2, 20.0)
    assert not actor.cannot_fetch(310.0, 300.0)
    assert actor.cannot_fetch(310.1, 300.0)
    actor.has_applied(1, 2, 300.0)
    assert not actor.cannot_fetch(600.0, 300.0)
    assert actor.cannot_fetch(600.1, 300.0)
    actor.has_applied(1, 2, 500.0)  # nothing new
    assert actor.cannot_fetch(600.1, 300.0)
    actor.has_applied(2, 2, 601.0)
    assert not actor.cannot_fetch(9_999.0, 300.0)


def test_a_lease_that_is_too_old_goes_to_another_and_its_actor_gets_none_until_it_delivers(caplog):
    made = coordinator_of(Ledger.new(replace(LIMITS, max_lease_s=100.0), "r", "L1"))
    made.publish(a_policy(0), 0.0)
    first = join(made)
    made.receive(A, Applied(version=0, digest="d0"), 0.0)
    now = 0.0
    while now < 90.0:
        now += 10.0
        made.receive(A, Heartbeat(progress=int(now), tokens_sampled=int(now)), now)
        made.tick(now)
    idle_b(made, 99.0)
    told(caplog)
    made.tick(100.0)
    assert told(caplog) == [
        "actor a has held a task for 100 s (queue.max_lease_s); its tasks go to others"
    ]
    outgoing = made.connected.take_outgoing()
    assert [peer for peer, _ in outgoing] == [B] * 4  # a is not cancelled: it could still deliver
    assert leased([m for _, m in outgoing if isinstance(m, Task)]) == [(n, 2) for n in range(4)]

    made.receive(A, Heartbeat(progress=200, tokens_sampled=200), 101.0)
    made.receive(A, Request(free_completions=100), 101.0)
    made.actor_gone(B, 101.0, blamed=False)
    made.tick(102.0)
    assert said(made, A) == []
    made.receive(A, group(first[1]), 103.0)
    sent = said(made, A)
    assert sent[0] == Ack(task=first[1].task, attempt=1)
    assert leased([m for m in sent if isinstance(m, Task)]) == [(0, 3), (2, 3), (3, 3)]
    assert "actor a works again" in told(caplog)


def test_an_engine_that_samples_nothing_is_noticed_though_its_main_thread_turns(caplog):
    made = coordinator()
    first = join(made)
    made.receive(A, Applied(version=0, digest="d0"), 0.0)
    idle_b(made, 0.0)
    told(caplog)
    beats(made, 50.0, tokens_sampled=7, groups_sampling=4)  # the first 7 tokens come at 10 s
    assert told(caplog) == []
    beats(made, 70.0, start=50.0, tokens_sampled=7, groups_sampling=4)
    assert told(caplog) == [
        "actor a has sampled nothing of its tasks for 60 s (queue.lease_s); its tasks go to others"
    ]
    outgoing = made.connected.take_outgoing()
    assert [peer for peer, _ in outgoing] == [B] * 4
    assert leased([m for _, m in outgoing if isinstance(m, Task)]) == [(n, 2) for n in range(4)]

    made.receive(A, Request(free_completions=100), 71.0)
    made.actor_gone(B, 71.0, blamed=False)
    beats(made, 80.0, start=70.0, tokens_sampled=7, groups_sampling=4)
    assert said(made, A) == []
    made.actor_gone(A, 81.0)
    made.receive(A, hello(), 81.0)  # to reconnect is no sign of work
    made.receive(A, Request(free_completions=100), 81.0)
    assert tasks(made, A) == []
    made.receive(A, Heartbeat(progress=90, tokens_sampled=8, groups_sampling=4), 82.0)
    assert leased(tasks(made, A)) == [(n, 3) for n in range(4)]
    assert first[0].task == made.ledger.leases_of("a")[0].task


def test_a_new_process_of_a_stalled_actor_starts_afresh():
    made = coordinator()
    join(made)
    beats(made, 60.0, groups_sampling=4)
    made.receive(A, Request(free_completions=100), 61.0)
    assert tasks(made, A) == []
    made.receive(B, hello(incarnation="2"), 62.0)
    made.receive(B, Request(free_completions=100), 62.0)
    assert leased(tasks(made, B)) == [(n, 2) for n in range(4)]


def test_slow_rewards_are_no_stall(caplog):
    made = coordinator()
    join(made)
    made.receive(A, Applied(version=0, digest="d0"), 0.0)
    told(caplog)
    beats(made, 290.0, tokens_sampled=7, groups_held=4)  # all four groups are being scored
    assert told(caplog) == []
    assert len(made.ledger.leases_of("a")) == 4


def test_a_prompt_that_is_read_is_progress(caplog):
    made = coordinator()
    join(made)
    made.receive(A, Applied(version=0, digest="d0"), 0.0)
    told(caplog)
    for now in range(10, 300, 10):
        made.receive(A, Heartbeat(progress=now, tokens_read=now, groups_sampling=4), float(now))
        made.tick(float(now))
    assert told(caplog) == []


def test_that_no_actor_is_connected_is_told_once_and_so_is_its_end(caplog):
    made = coordinator()
    for now in (0.0, 59.0, 60.0, 61.0, 62.0, 100.0):
        made.tick(now)
    made.receive(A, hello(), 101.0)
    made.tick(101.0)
    made.tick(102.0)
    assert told(caplog) == [
        "no actor has been connected for 61 s, so nothing is sampled: look at the logs of the "
        "actors, or start one with launch/actor.py",
        "the run goes on: an actor is connected again after 101 s",
    ]
    made.actor_gone(A, 200.0)
    made.tick(200.0)
    made.tick(261.0)
    assert told(caplog)[0].startswith("no actor has been connected for 61 s")


def test_that_no_step_comes_is_told_once_with_what_it_waits_for(caplog):
    made = coordinator()
    first = join(made, free_completions=G)
    made.receive(A, Applied(version=0, digest="d0"), 0.0)
    told(caplog)
    for now in range(10, 330, 10):
        made.receive(A, Heartbeat(progress=now, tokens_sampled=now), float(now))
        made.tick(float(now))
    assert told(caplog) == [
        "no step for 310 s: waiting for task 0 (with actor a for 310 s), task 1 (no actor has it)"
    ]
    made.receive(A, group(first[0]), 330.0)
    made.receive(A, Request(free_completions=G), 330.0)
    (second,) = tasks(made, A)
    made.receive(A, group(second), 331.0)
    assert made.next_batch(331.0) is not None
    made.publish(a_policy(1), 332.0)
    assert told(caplog) == ["the run goes on: a step came after 332 s"]
    # Now that a step is known to take as long, three times that is too long.
    for now in (600.0, 1_328.0):
        made.tick(now)
    assert not any("no step" in message for message in told(caplog))
    made.tick(332.0 + 3 * 332.0 + 1.0)
    assert any(message.startswith("no step for 997 s: ") for message in told(caplog))


def test_a_finished_run_waits_for_nothing(caplog):
    made = coordinator_of(Ledger.new(replace(LIMITS, total_batches=1), "r", "L1"))
    made.publish(a_policy(0), 0.0)
    for task in join(made):
        made.receive(A, group(task), 1.0)
    assert made.next_batch(1.0) is not None
    made.publish(a_policy(1), 1.0)
    made.actor_gone(A, 2.0)
    told(caplog)
    made.tick(10_000.0)
    assert told(caplog) == []


def test_acknowledgements_go_before_tasks_and_policies():
    made = coordinator()
    first, *_ = join(made, free_completions=G)
    made.receive(A, Request(free_completions=2 * G), 1.0)
    made.receive(A, group(first), 1.0)
    assert [type(message) for message in said(made, A)] == [Ack, Task, Task]
