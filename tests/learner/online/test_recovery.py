"""What a journal leads to, entry by entry: every prefix is a learner that was killed there."""

import math
from pathlib import Path

import msgspec
import pytest

from learner.ledger.events import LedgerEvent
from learner.ledger.journal import Entry, JournalWriter
from learner.ledger.journal_reader import JournalReader
from learner.ledger.ledger import Ledger
from learner.ledger.losses import losses_since
from learner.online.coordinator import Coordinator
from learner.online.experience import CoordinatorState, EvalResult, TrainBatch
from learner.online.recovery import History, follow
from protocol.errors import JournalError
from protocol.messages.messages import Ack, Group
from tests.learner.small_run import (
    IDENTITY,
    LIMITS,
    A,
    G,
    coordinator,
    coordinator_of,
    group,
    join,
    prompt,
    prompts,
    said,
    tasks,
)
from tests.protocol.builders import a_policy, a_reward

HELD_OUT = [prompt(40), prompt(41)]


def saved(made: Coordinator) -> CoordinatorState:
    """Return the state as a checkpoint holds it."""
    data = msgspec.msgpack.encode(made.state(0))
    return msgspec.msgpack.decode(data, type=CoordinatorState)


def history_of(state: CoordinatorState) -> History:
    return History.of_checkpoint(state, prompts(), HELD_OUT)


def continued(history: History) -> Coordinator:
    """Make the coordinator that goes on with a history."""
    made = coordinator_of(Ledger(LIMITS, history.ledger), HELD_OUT)
    made.prompts = history.prompts
    made.restore(history)
    return made


def a_life(made: Coordinator) -> list[Entry]:
    """Live through groups, a batch, an evaluation and the next policy; return the journal."""
    leased = join(made, free_completions=16)
    for task in leased[:3]:
        made.receive(A, group(task), 1.0)
    assert made.next_batch(1.0) is not None
    made.evaluate(0, 1.0)
    for task in tasks(made, A):
        made.receive(A, group(task), 2.0)
    assert made.next_eval(2.0) is not None
    made.publish(a_policy(1), 3.0)  # two rows more join
    return made.drain_entries()


def test_a_journal_leads_to_the_state_that_the_learner_had():
    made = coordinator(eval_rows=2)
    made.drain_entries()
    state = saved(made)
    entries = a_life(made)
    history = history_of(state)
    batches, evaluations = follow(history, entries)
    assert msgspec.to_builtins(continued(history).state(0)) == msgspec.to_builtins(made.state(0))
    (batch,) = batches
    assert (batch.trained_at, [item.prompt.row_key for item in batch.groups]) == (0, [0, 1])
    (evaluation,) = evaluations
    assert (evaluation.version, len(evaluation.groups), evaluation.dropped) == (0, 2, 0)
    assert history.evaluated == 0
    assert history.published[1].digest == made.ledger.state.digest


@pytest.mark.parametrize("middle", [False, True])
def test_a_learner_killed_at_any_entry_continues_as_if_it_had_not_been(middle: bool):
    """From each prefix, what is still to come leads to the end of the uninterrupted run."""
    whole = coordinator(eval_rows=2)
    whole.drain_entries()
    start = saved(whole)
    entries = a_life(whole)
    for count in range(1, len(entries) + 1):
        history = history_of(start)
        first_batches, first_evaluations = follow(history, entries[:count])
        if middle and not isinstance(entries[count - 1], Group):
            # A checkpoint is made there, and read again.
            checkpoint = saved(continued(history))
            history = history_of(checkpoint)
            follow(history, [])
        rest_batches, rest_evaluations = [], []
        for entry in entries[count:]:
            match history.apply(entry):
                case TrainBatch() as batch:
                    rest_batches.append(batch)
                case EvalResult() as result:
                    rest_evaluations.append(result)
                case None:
                    pass
        assert history.ledger == whole.ledger.state
        assert len(first_batches) + len(rest_batches) == 1
        assert len(first_evaluations) + len(rest_evaluations) == 1
        last = continued(history).state(0)
        assert msgspec.to_builtins(last) == msgspec.to_builtins(whole.state(0))


def test_the_batch_in_training_at_a_checkpoint_is_handed_out_again():
    made = coordinator()
    for task in join(made)[:3]:
        made.receive(A, group(task), 1.0)
    formed = made.next_batch(1.0)
    history = history_of(saved(made))
    batches, _ = follow(history, [])
    assert list(batches) == [formed]
    again = continued(history)
    again.publish(a_policy(1), 2.0)
    assert again.ledger.state.version == 1
    assert again.ledger.state.counters.trained == 2


def test_a_returned_batch_is_leased_again_with_its_rows_and_seeds():
    made = coordinator()
    leased = join(made, free_completions=16)
    for task in leased[:2]:
        made.receive(A, group(task), 1.0)
    assert made.next_batch(1.0) is not None
    made.return_batch("no rewards", 2.0)
    made.assign(2.0)
    again = tasks(made, A)
    assert [(t.task, t.attempt, t.row, t.seed) for t in again] == [
        (t.task, 2, t.row, t.seed) for t in leased[:2]
    ]
    made_again = history_of(saved(made))
    assert [*follow(made_again, [])[0]] == []


def test_groups_without_any_reward_are_returned_with_the_batch_and_none_is_taken_after_it():
    """Reward functions that broke have scored what is queued, and still score what comes."""
    made = coordinator()
    made.drain_entries()
    state = saved(made)
    leased = join(made, free_completions=16)
    unscored = a_reward([math.nan] * G)
    for task in leased[:3]:
        made.receive(A, group(task, reward=unscored), 1.0)
    assert made.next_batch(1.0) is not None
    made.return_batch("no rewards", 2.0)
    said(made, A)
    made.receive(A, group(leased[3], reward=unscored), 3.0)
    assert [message for message in said(made, A) if isinstance(message, Ack)] == []

    history = history_of(state)
    follow(history, made.drain_entries())
    again = continued(history)
    assert msgspec.to_builtins(again.state(0)) == msgspec.to_builtins(made.state(0))
    assert all(record.taken is None for record in again.ledger.state.queue.values())
    rows = {task.row for task in join(again, free_completions=16)}
    assert rows == {task.row for task in leased}


def test_a_new_incarnation_leases_only_rows_without_a_group():
    made = coordinator()
    leased = join(made)
    for task in leased[:3]:
        made.receive(A, group(task), 1.0)
    assert made.next_batch(1.0) is not None  # formed, not consumed: a stop saves now
    history = history_of(saved(made))
    ledger = Ledger(LIMITS, history.ledger)
    report = ledger.begin_incarnation("L2", keep_groups=True)
    history.tasks.rejoin(report.rejoined, keep_groups=True)
    again = coordinator_of(ledger)
    again.prompts = history.prompts
    again.restore(history)
    again.publish(a_policy(0), 0.0)
    (new,) = join(again)
    assert (new.row, new.seed, new.task.number) == (leased[3].row, leased[3].seed, 7)
    assert new.task.incarnation == "L2"
    batch = again.next_batch(1.0)
    assert batch is not None
    assert [item.prompt.row_key for item in batch.groups] == [0, 1]


def test_what_is_lost_is_listed():
    made = coordinator(eval_rows=2)
    made.drain_entries()
    state = saved(made)
    events = [entry for entry in a_life(made) if isinstance(entry, LedgerEvent)]
    ledger = Ledger(LIMITS, state.ledger)
    before = ledger.state.copy()
    report = ledger.begin_incarnation("L2", keep_groups=False)
    lost = losses_since(before, report, events, "why")
    assert (lost.reason, lost.version, lost.version_reached) == ("why", 0, 1)
    assert [t.number for t in lost.trained_since] == [0, 1]
    assert [t.number for t in lost.received_since] == [2]
    assert [t.number for t in lost.joined_since] == [6, 7]


def test_a_group_is_in_the_journal_before_its_acknowledgement(tmp_path: Path):
    made = coordinator()
    task, *_ = join(made)
    made.drain_entries()
    sent = group(task)
    made.receive(A, sent, 1.0)
    entries = made.drain_entries()
    assert entries[0] == sent
    assert [type(entry).__name__ for entry in entries[1:2]] == ["GroupReceived"]

    writer = JournalWriter(tmp_path, IDENTITY, 0)
    writer.append(entries)
    writer.close()
    assert [entry for _, entry in JournalReader(tmp_path)] == entries


def test_a_journal_without_a_group_or_of_other_rows_is_refused():
    made = coordinator(eval_rows=2)
    made.drain_entries()
    state = saved(made)
    entries = a_life(made)
    without = [entry for entry in entries if not isinstance(entry, Group)]
    with pytest.raises(JournalError, match="has no group for task 0, attempt 1"):
        follow(history_of(state), without)
    other = msgspec.structs.replace(state, position=5)
    with pytest.raises(JournalError, match="is row 4 of the training order"):
        follow(history_of(other), entries)
