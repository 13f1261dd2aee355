"""The coordinator against hand-made actors: what is sent, in what order, what a resume keeps."""

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from learner.coordinator import Coordinator
from learner.experience import CoordinatorState
from learner.ledger import Ledger
from learner.ledger_types import LedgerSettings
from learner.lost import encode_line, read_journal, since
from learner.peers import Terms
from learner.sources.feed import ListFeed
from learner.sources.prompts import Prompt, PromptSource
from learner.sources.sieve import Report
from learner.tasks import task_seed
from protocol.messages import (
    Ack,
    Applied,
    Cancel,
    Failed,
    Group,
    Heartbeat,
    Hello,
    Refuse,
    Release,
    Request,
    Task,
    Welcome,
)
from protocol.parts import PolicySpan, Sampling
from protocol.settings import DataSettings
from tests.protocol.builders import a_completion, a_group, a_policy, a_reward, a_welcome, task_id

A, B = b"a", b"b"
G = 2


def prompt(number: int) -> Prompt:
    return Prompt(row_key=number, prompt_ids=[2, 3 + number], row={"prompt": f"p{number}"})


def prompts(count: int = 8) -> PromptSource:
    settings = DataSettings(order="sequential")
    rows = [prompt(number) for number in range(count)]
    feed = ListFeed(rows, settings, seed=0, batch_size=1, length=lambda p: len(p.prompt_ids))
    return PromptSource(feed, Report("rows"), None)


def terms(incarnation: str = "L1") -> Terms:
    return Terms(
        welcome=a_welcome(incarnation),
        train=Sampling(num_generations=G, max_completion_length=4),
        evaluate=Sampling(num_generations=1, max_completion_length=4, temperature=0.0),
        seed=7,
        lease_s=60.0,
        vocab_size=64,
    )


LIMITS = LedgerSettings(
    batch_size=2, max_staleness=1, num_generations=G, total_batches=3, lease_s=60.0
)


def coordinator(*, eval_rows: int = 0) -> Coordinator:
    held_out = [prompt(40 + number) for number in range(eval_rows)]
    made = Coordinator(Ledger(LIMITS, "r", "L1"), prompts(), held_out, terms())
    made.advance(a_policy(0), 0.0)
    return made


def hello(name: str = "a", incarnation: str = "1", **changes: object) -> Hello:
    fields = {"protocol_version": 1, "model_digest": "m", "tokenizer_digest": "t", **changes}
    return Hello(actor_id=name, actor_incarnation=incarnation, **fields)  # type: ignore[arg-type]


def group(task: Task, name: str = "a", **changes: Any) -> Group:
    completions = [a_completion([5, 1], version=0)] * task.sampling.num_generations
    fields = {"attempt": task.attempt, "actor_id": name, "completions": completions} | changes
    return a_group(task=task.task, **fields)


def said(made: Coordinator, peer: bytes) -> list[object]:
    return [message for to, message in made.take_outgoing() if to == peer]


def tasks(made: Coordinator, peer: bytes) -> list[Task]:
    return [message for message in said(made, peer) if isinstance(message, Task)]


def join(made: Coordinator, peer: bytes = A, name: str = "a", free_rows: int = 8) -> list[Task]:
    made.receive(peer, hello(name), 0.0)
    made.receive(peer, Request(free_rows=free_rows), 0.0)
    return tasks(made, peer)


def test_hello_then_policy_then_work_within_credit_and_the_bound():
    made = coordinator()
    made.receive(A, hello(), 0.0)
    welcome, announced = said(made, A)
    assert isinstance(welcome, Welcome)
    assert announced == a_policy(0)
    made.receive(A, Request(free_rows=5), 0.0)
    first = tasks(made, A)
    assert [t.task.number for t in first] == [0, 1]  # two groups of two completions fit in five
    made.receive(A, Request(free_rows=100), 0.0)
    second = tasks(made, A)
    assert [t.task.number for t in second] == [2, 3]  # (eta + 1) B = 4 tasks in all
    assert {t.min_policy_version for t in (*first, *second)} == {0}
    assert first[0].trainer_state == {"global_step": 0, "max_steps": 3}


def test_an_enquiry_gets_the_terms_and_no_work():
    made = coordinator()
    made.receive(A, hello(model_digest="", tokenizer_digest=""), 0.0)
    (welcome,) = said(made, A)
    assert isinstance(welcome, Welcome)
    made.receive(A, Request(free_rows=8), 0.0)
    (refused,) = said(made, A)
    assert isinstance(refused, Refuse)
    assert (refused.code, refused.fatal) == ("hello_required", False)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"protocol_version": 9}, "protocol_version", ("version 1", "speaks 9")),
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
    assert made.counters[f"refused_{code}"] == 1


def test_a_reconnected_actor_keeps_its_leases_and_is_told_them_again():
    made = coordinator()
    before = join(made)
    assert len(before) == 4
    made.receive(B, hello(), 1.0)
    assert tasks(made, B) == before  # the same attempts: they may have been lost on the way
    assert list(made.peers) == [B]
    made.receive(B, group(before[0]), 2.0)
    assert said(made, B) == [Ack(task=before[0].task, attempt=1)]


def test_a_restarted_actor_loses_its_leases_at_once():
    made = coordinator()
    join(made)
    made.receive(B, hello(incarnation="2"), 1.0)
    made.receive(B, Request(free_rows=8), 1.0)
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
    assert made.rates()["ledger/duplicates"] == 1


def test_the_slower_attempt_is_cancelled():
    made = coordinator()
    first, *_ = join(made)
    made.tick(61.0)  # leases ran out, and the silent actor is forgotten
    assert tasks(made, A) == []
    made.receive(B, hello("b"), 62.0)
    made.receive(B, Request(free_rows=2), 62.0)
    (again,) = tasks(made, B)
    assert (again.task, again.attempt) == (first.task, 2)
    made.receive(A, hello(), 63.0)
    made.receive(A, group(first), 63.0)
    assert said(made, B) == [Cancel(task=first.task, attempt=2)]


def test_progress_renews_leases_and_its_lack_ends_them():
    made = coordinator()
    first, *_ = join(made, free_rows=2)
    made.receive(A, Heartbeat(progress=1), 50.0)
    made.tick(70.0)
    assert said(made, A) == []
    made.receive(A, Heartbeat(progress=1), 90.0)  # alive, but the main thread did not move
    made.tick(110.0)
    assert said(made, A) == [Cancel(task=first.task, attempt=1)]


def test_an_actor_whose_leases_ran_out_gets_others_only_once_it_moves():
    made = coordinator()
    assert len(join(made, free_rows=2 * G)) == 2
    made.receive(A, Request(free_rows=G), 1.0)
    (third,) = tasks(made, A)
    made.receive(A, Request(free_rows=100 * G), 2.0)
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
    first, *_ = join(made, free_rows=2)
    if words is None:
        one = group(first).completions[:1]
        changes = {"completions": one, "reward": a_reward([1.0])}
        words = "2 completions are required, got 1"
    made.receive(A, group(first, **changes), 1.0)
    refused, ack = said(made, A)
    assert isinstance(refused, Refuse)
    assert words in refused.reason
    assert ack == Ack(task=first.task, attempt=1)
    made.receive(A, Request(free_rows=2), 1.0)
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
    assert made.rates()["ledger/discarded"] == 1


def test_failures_drop_a_task_after_three_attempts_and_the_next_row_takes_its_place():
    made = coordinator()
    (task,) = join(made, free_rows=2)
    for _ in range(3):
        made.receive(A, Failed(task=task.task, attempt=task.attempt, reason="no room"), 1.0)
        assert said(made, A) == [Ack(task=task.task, attempt=task.attempt)]
        made.receive(A, Request(free_rows=2), 1.0)
        (task,) = tasks(made, A)
    assert task.task.number == 1
    assert made.rates()["ledger/dropped"] == 1


def test_an_orderly_leave_is_not_held_against_the_tasks():
    made = coordinator()
    for attempt in range(1, 6):
        (task,) = join(made, free_rows=2)
        assert (task.task.number, task.attempt) == (0, attempt)
        made.receive(A, Release(reason="asked"), 1.0)
    assert made.rates()["ledger/dropped"] == 0


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
    made.advance(a_policy(1), 2.0)
    assert made.policy == a_policy(0)
    made.gone(A, 3.0)
    made.take_outgoing()
    made.receive(B, hello("b"), 3.0)
    made.receive(B, Request(free_rows=1), 3.0)
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
    made.gone(B, 1.0)
    assert made.oldest_needed() == 3
    made.gone(A, 1.0)
    assert made.oldest_needed() == 0  # no actor: the policy that is announced to the next


def resumed(state: CoordinatorState) -> tuple[Coordinator, object]:
    ledger, lost = Ledger.restore(LIMITS, state.ledger, "L2")
    made = Coordinator(ledger, prompts(), [], terms("L2"))
    made.adopt(state, lost)
    return made, lost


def test_a_checkpoint_while_a_batch_is_formed_keeps_its_rows_and_seeds():
    made = coordinator()
    leased = join(made)
    for task in leased[:3]:
        made.receive(A, group(task), 1.0)
    assert made.next_batch(1.0) is not None  # formed, not consumed: a stop saves now
    again, _ = resumed(made.state())
    again.advance(a_policy(0), 0.0)
    new = join(again)
    assert [t.row for t in new] == [t.row for t in leased]
    assert [t.seed for t in new] == [t.seed for t in leased]
    assert [t.task.number for t in new] == [4, 5, 6, 7]
    assert {t.task.incarnation for t in new} == {"L2"}


def test_what_was_lost_is_read_from_the_journal(tmp_path):
    made = coordinator()
    leased = join(made)
    journal = tmp_path / "ledger.jsonl"
    journal.write_bytes(b"".join(encode_line("L1", e) for e in made.drain_journal()))
    state = made.state()
    for task in leased[:3]:
        made.receive(A, group(task), 1.0)
    made.next_batch(1.0)
    made.advance(a_policy(1), 2.0)  # two rows more join
    with journal.open("ab") as file:
        file.writelines(encode_line("L1", e) for e in made.drain_journal())
        file.write(b'{"incarnation":"L1","ev')  # killed in the middle of a line
    events = read_journal(journal, "L1")[state.events :]
    _, report = Ledger.restore(LIMITS, state.ledger, "L2")
    lost = since(report, "r", "L1", state.ledger.version, events)
    assert (lost.version, lost.version_reached) == (0, 1)
    assert [t.number for t in lost.trained_since] == [0, 1]
    assert [t.number for t in lost.received_since] == [2]
    assert [t.number for t in lost.joined_since] == [4, 5]
    assert len(lost.checkpoint.leases) == 4
    assert read_journal(journal, "L0") == []
