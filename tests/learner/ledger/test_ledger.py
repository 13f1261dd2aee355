"""The ledger's rules, one example each; times are seconds on a made-up clock."""

from typing import get_args

import msgspec
import pytest

from learner.ledger.events import AnyEvent, PolicyPublished
from learner.ledger.leases import OpenLeases
from learner.ledger.ledger import Ledger
from learner.ledger.state import LedgerState
from learner.ledger.types import LedgerSettings, Receipt
from protocol.errors import LedgerError
from protocol.messages.parts import TaskId

ACTOR = "actor-0"


def settings(**changes) -> LedgerSettings:
    base = {"batch_size": 2, "max_staleness": 1, "num_generations": 4, "lease_s": 10.0}
    return LedgerSettings(**{**base, **changes})


def started(**changes) -> Ledger:
    ledger = Ledger.new(settings(**changes), "run", "first")
    ledger.published(0, "d0")
    return ledger


def fill(ledger: Ledger) -> list[TaskId]:
    """Join rows named after their number until there is no room."""
    joined = []
    while ledger.room():
        joined.append(ledger.join(f"row-{len(joined)}", 0.0))
    return joined


def deliver(ledger: Ledger, free_completions: int = 1000, now: float = 0.0) -> None:
    for grant in ledger.lease(ACTOR, free_completions, now):
        receipt = ledger.received(grant.task, grant.attempt, ACTOR, now)
        assert receipt.outcome == "accepted"


def replayed(state: LedgerState, events: list[AnyEvent]) -> LedgerState:
    state = state.copy()
    for event in events:
        event.apply_to(state)
    return state


def test_nothing_joins_or_is_leased_before_a_policy_can_be_fetched():
    ledger = Ledger.new(settings(), "run", "first")
    assert ledger.room() == 0
    with pytest.raises(LedgerError, match="without room"):
        ledger.join("row", 0.0)
    ledger.published(0, "d0")
    assert ledger.room() == 4


@pytest.mark.parametrize(("eta", "rooms"), [(0, [2, 0, 0, 2]), (1, [4, 0, 0, 2])])
def test_admission_counts_the_queue_training_and_a_late_publication(eta, rooms):
    ledger = started(max_staleness=eta)
    seen = [ledger.room()]
    fill(ledger)
    deliver(ledger)
    ledger.form_batch(0.0)
    seen.append(ledger.room())
    ledger.consumed()
    seen.append(ledger.room())
    ledger.published(1, "d1")
    seen.append(ledger.room())
    assert seen == rooms


def test_leases_go_out_in_queue_order_within_the_credit():
    ledger = started()
    first, second, third, _ = fill(ledger)
    grants = ledger.lease(ACTOR, 11, 0.0)
    assert [(g.task, g.attempt, g.min_policy_version) for g in grants] == [
        (first, 1, 0),
        (second, 1, 0),
    ]
    assert ledger.lease("actor-1", 3, 0.0)[0].task == third
    assert ledger.lease("actor-1", 3, 0.0) == []
    assert ledger.lease("actor-2", 0, 0.0) == []


def test_a_retry_goes_first_and_keeps_its_place():
    ledger = started()
    first, second, third, _ = fill(ledger)
    ledger.lease("slow", 4, 0.0)
    ledger.lease(ACTOR, 4, 0.0)
    (cancelled,) = ledger.actor_gone("slow", 1.0)
    assert (cancelled.task, cancelled.attempt, cancelled.dropped) == (first, 1, False)
    grants = ledger.lease("actor-2", 8, 1.0)
    assert [(g.task, g.attempt) for g in grants] == [(first, 2), (third, 1)]
    ledger.received(second, 1, ACTOR, 2.0)
    assert not ledger.batch_ready()
    ledger.received(first, 2, "actor-2", 2.0)
    assert ledger.form_batch(2.0).tasks == [first, second]


def test_progress_renews_and_silence_expires_until_the_task_is_dropped():
    ledger = started(max_attempts=2)
    first, *_ = fill(ledger)
    ledger.lease(ACTOR, 4, 0.0)
    ledger.renew_leases(ACTOR, 9.0)
    assert ledger.expire(18.9) == []
    assert [c.dropped for c in ledger.expire(19.0)] == [False]
    ledger.lease(ACTOR, 4, 20.0)
    (last,) = ledger.expire(30.0)
    assert (last.task, last.attempt, last.dropped) == (first, 2, True)
    assert ledger.state.counters.dropped == {"expired": 1}
    assert ledger.room() == 1
    assert ledger.received(first, 1, ACTOR, 31.0) == Receipt(outcome="dropped")
    assert ledger.state.counters.discarded == {"dropped": 1}


def test_a_lease_lasts_from_when_it_was_given_though_its_actor_was_renewed_before():
    ledger = started()
    first, second, *_ = fill(ledger)
    ledger.lease(ACTOR, 4, 0.0)
    ledger.renew_leases(ACTOR, 1.0)
    ledger.lease(ACTOR, 4, 5.0)
    assert [lease.task for lease in ledger.expire(14.9)] == [first]
    assert [lease.task for lease in ledger.expire(15.0)] == [second]


def test_a_lease_has_an_age_limit_whatever_its_actor_reports():
    ledger = started(max_lease_s=25.0)
    first, second, *_ = fill(ledger)
    ledger.lease(ACTOR, 4, 0.0)
    ledger.lease(ACTOR, 4, 8.0)
    for now in (8.0, 16.0, 24.0):
        ledger.renew_leases(ACTOR, now)
        assert ledger.expire(now) == []
    (ended,) = ledger.expire(25.0)
    assert (ended.task, ended.actor, ended.overdue) == (first, ACTOR, True)
    assert ended.reason == "leased for 25 s (queue.max_lease_s)"
    assert [lease.task for lease in ledger.expire(33.0)] == [second]
    assert ledger.state.counters.expired == 2


def test_leases_that_a_restored_state_holds_count_as_given_at_the_first_look():
    ledger = started(max_lease_s=25.0)
    fill(ledger)
    ledger.lease("a", 4, 7_000.0)
    ledger.lease("b", 4, 7_000.0)
    leases = OpenLeases(ledger.settings, ledger.state.copy())
    assert [record.number for record in leases.of("b")] == [1]
    assert leases.take_due(100.0) == []
    leases.renew("a", 105.0)
    assert leases.take_due(109.9) == []
    assert [record.number for record in leases.take_due(110.0)] == [1]
    assert [record.number for record in leases.take_due(115.0)] == [0]


def test_the_first_attempt_to_come_counts_and_cancels_the_other():
    ledger = started()
    first, *_ = fill(ledger)
    ledger.lease("slow", 4, 0.0)
    ledger.expire(10.0)
    ledger.lease(ACTOR, 4, 11.0)
    receipt = ledger.received(first, 1, "slow", 12.0)
    assert receipt.outcome == "accepted"
    assert receipt.cancelled is not None
    assert (receipt.cancelled.attempt, receipt.cancelled.actor) == (2, ACTOR)
    assert ledger.received(first, 2, ACTOR, 13.0).outcome == "duplicate"
    assert (ledger.state.counters.received, ledger.state.counters.duplicates) == (1, 1)
    assert ledger.failed(first, 2, "late", 14.0).outcome == "duplicate"


def test_strange_tasks_and_attempts_are_unknown():
    ledger = started()
    first, *_ = fill(ledger)
    other = msgspec.structs.replace(first, incarnation="zeroth")
    never = msgspec.structs.replace(first, number=99)
    for task, attempt in ((other, 1), (never, 1), (first, 1), (first, 0)):
        assert ledger.received(task, attempt, ACTOR, 0.0).outcome == "unknown"
    assert ledger.failed(other, 1, "?", 0.0).outcome == "unknown"


def test_a_group_outside_its_lease_is_stale_and_leased_again():
    ledger = started()
    first, *_ = fill(ledger)
    ledger.lease(ACTOR, 4, 0.0)
    assert ledger.received(first, 1, ACTOR, 1.0, [0, 1]).outcome == "stale"
    assert ledger.state.counters.discarded == {"stale": 1}
    assert ledger.lease(ACTOR, 4, 1.0)[0].attempt == 2
    assert ledger.received(first, 2, ACTOR, 1.0, [0]).outcome == "accepted"


def test_failures_drop_with_their_reason_and_an_orderly_leave_is_not_one():
    ledger = started(max_attempts=1)
    fill(ledger)
    (grant,) = ledger.lease(ACTOR, 4, 0.0)
    assert not ledger.actor_gone(ACTOR, 1.0, blamed=False)[0].dropped
    (again,) = ledger.lease(ACTOR, 4, 1.0)
    assert (again.task, again.attempt) == (grant.task, 2)
    assert ledger.failed(again.task, 2, "prompt too long", 2.0).dropped
    assert ledger.state.dropped == {0: "prompt too long"}


def test_the_last_batch_is_short_when_rows_end():
    ledger = started(max_attempts=1)
    first, second, third = (ledger.join(i, 0.0) for i in range(3))
    ledger.end_of_rows(0.0)
    assert ledger.room() == 0
    grants = ledger.lease(ACTOR, 12, 0.0)
    ledger.failed(first, 1, "x", 0.0)
    for grant in grants[1:]:
        ledger.received(grant.task, 1, ACTOR, 0.0)
    assert ledger.form_batch(0.0).tasks == [second, third]
    ledger.consumed()
    assert ledger.is_finished()
    assert (ledger.state.version, ledger.state.counters.trained) == (1, 2)


def test_a_short_batch_waits_for_the_end_of_rows():
    ledger = started()
    only = ledger.join("row", 0.0)
    deliver(ledger)
    assert not ledger.batch_ready()
    ledger.end_of_rows(0.0)
    assert ledger.form_batch(0.0).tasks == [only]


def test_the_run_takes_no_more_rows_than_its_batches_need():
    ledger = started(max_staleness=4, total_batches=3)
    assert len(fill(ledger)) == 6
    for version in (1, 2, 3):
        assert not ledger.is_finished()
        deliver(ledger)
        ledger.form_batch(0.0)
        ledger.consumed()
        ledger.published(version, f"d{version}")
    assert ledger.is_finished()
    assert ledger.room() == 0


def test_evaluation_stands_outside_admission_and_is_pinned():
    ledger = started(eval_generations=2, max_attempts=1, max_eval_tasks=3)
    fill(ledger)
    ledger.join_eval(["a", "b", "c"], 0, 0.0)
    assert ledger.room() == 0
    assert len(ledger.state.queue) == 4
    with pytest.raises(LedgerError, match="max_eval_tasks"):
        ledger.join_eval(["d"], 0, 0.0)
    grants = ledger.lease(ACTOR, 10, 0.0)
    assert [(g.kind, g.pinned_version) for g in grants] == [
        ("eval", 0),
        ("eval", 0),
        ("eval", 0),
        ("train", None),
    ]
    ledger.received(grants[0].task, 1, ACTOR, 0.0, [0])
    ledger.failed(grants[1].task, 1, "no", 0.0)
    assert not ledger.eval_ready()
    ledger.received(grants[2].task, 1, ACTOR, 0.0, [0])
    done = ledger.take_eval()
    assert (done.version, done.dropped) == (0, {"b": "no"})
    assert done.tasks == [grants[0].task, grants[2].task]
    assert not ledger.state.evals
    assert ledger.received(grants[0].task, 1, ACTOR, 1.0).outcome == "duplicate"


def test_a_resume_joins_again_in_order_and_says_what_was_lost():
    ledger = started()
    first, second, third, fourth = fill(ledger)
    ledger.join_eval(["e"], 0, 0.0)
    grants = ledger.lease(ACTOR, 13, 0.0)
    assert len(grants) == 4
    for task in (first, second):
        ledger.received(task, 1, ACTOR, 0.0)
    ledger.form_batch(0.0)
    saved = msgspec.json.decode(msgspec.json.encode(ledger.state), type=LedgerState)
    resumed = Ledger(settings(), saved)
    with pytest.raises(LedgerError, match="needs a name of its own"):
        resumed.begin_incarnation("first", keep_groups=False)
    lost = resumed.begin_incarnation("second", keep_groups=False)
    assert lost.groups == [first, second]
    assert [c.task for c in lost.leases] == [third, grants[0].task]
    assert lost.eval_rows == ["e"]
    assert [r.old for r in lost.rejoined] == [first, second, third, fourth]
    assert [r.row_key for r in lost.rejoined] == ["row-0", "row-1", "row-2", "row-3"]
    assert [r.new.number for r in lost.rejoined] == [5, 6, 7, 8]
    assert resumed.lease(ACTOR, 100, 0.0) == []
    resumed.published(0, "d0")
    assert [g.task for g in resumed.lease(ACTOR, 100, 0.0)] == [r.new for r in lost.rejoined]
    assert resumed.received(first, 1, ACTOR, 0.0).outcome == "unknown"


def test_a_new_incarnation_keeps_the_groups_that_were_received():
    ledger = started()
    first, second, third, fourth = fill(ledger)
    ledger.lease(ACTOR, 100, 0.0)
    for task in (second, first, fourth):
        ledger.received(task, 1, ACTOR, 0.0)
    ledger.form_batch(0.0)
    report = ledger.begin_incarnation("second", keep_groups=True)
    assert report.groups == []
    assert [c.task for c in report.leases] == [third]
    ledger.published(0, "d0")
    new = [each.new for each in report.rejoined]
    # The batch that was in training forms again; only the third row is sampled again.
    assert ledger.form_batch(1.0).tasks == new[:2]
    assert [grant.task for grant in ledger.lease(ACTOR, 100, 1.0)] == [new[2]]


def test_a_returned_batch_is_sampled_again_before_all_else():
    ledger = started()
    first, second, _, _ = fill(ledger)
    ledger.lease(ACTOR, 100, 0.0)
    for task in (first, second):
        ledger.received(task, 1, ACTOR, 0.0)
    ledger.form_batch(0.0)
    ledger.return_batch("no rewards", 1.0)
    again = ledger.lease(ACTOR, 100, 1.0)
    assert [(grant.task, grant.attempt) for grant in again] == [(first, 2), (second, 2)]
    with pytest.raises(LedgerError, match="none is in training"):
        ledger.return_batch("no rewards", 1.0)


def test_a_resume_with_a_tighter_bound_leases_only_what_the_bound_allows():
    ledger = started(max_staleness=4)
    fill(ledger)
    resumed = Ledger(settings(max_staleness=0), ledger.state)
    resumed.begin_incarnation("second", keep_groups=False)
    resumed.published(0, "d0")
    assert len(resumed.state.queue) == 10
    assert len(resumed.lease(ACTOR, 1000, 0.0)) == 2
    assert resumed.room() == 0


def test_events_replay_to_the_same_state():
    ledger = Ledger.new(settings(), "run", "first")
    empty = LedgerState(run="run", incarnation="")
    ledger.published(0, "d0")
    fill(ledger)
    deliver(ledger, 8)
    ledger.form_batch(0.0)
    middle, head = ledger.state.copy(), ledger.drain_events()
    ledger.consumed()
    assert replayed(empty, head) == middle
    assert replayed(middle, ledger.drain_events()) == ledger.state
    assert ledger.drain_events() == []


def test_the_events_and_their_tags():
    assert {event.__struct_config__.tag for event in get_args(AnyEvent)} == {
        "Began", "Joined", "Leased", "Received", "Discarded", "Closed", "Dropped", "RowsEnded",
        "Formed", "Returned", "Consumed", "Published", "EvalTaken",
    }  # fmt: skip


def test_impossible_events_are_refused():
    ledger = started()
    with pytest.raises(LedgerError, match="none is in training"):
        ledger.consumed()
    with pytest.raises(LedgerError, match="batch_ready"):
        ledger.form_batch(0.0)
    with pytest.raises(LedgerError, match="required 0 to 0"):
        ledger.published(1, "d1")
    with pytest.raises(LedgerError, match="required 0 to 0"):
        replayed(ledger.state, [PolicyPublished(version=3, digest="d3")])
