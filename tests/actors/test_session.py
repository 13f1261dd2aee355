"""The actor's conversation as a pure state machine: messages in, actions out."""

from typing import Any

import pytest

from actors.actions import (
    CancelSampling,
    JoinRun,
    LeaveRun,
    NotePolicy,
    RequestScores,
    Sample,
    SendToLearner,
)
from actors.engine.base import GenerationResult
from actors.session import ActorIdentity, Session
from protocol.errors import RefusedError
from protocol.messages.arrays import floats_view
from protocol.messages.messages import (
    PROTOCOL_VERSION,
    Ack,
    Applied,
    Cancel,
    Failed,
    Group,
    Hello,
    Refuse,
    Release,
    Request,
    Stop,
    Task,
)
from protocol.messages.parts import TaskId
from tests.protocol.builders import a_completion, a_policy, a_reward, a_task, a_welcome

REWARD = a_reward([1.0, 0.0])


def key_of(lease: Task) -> tuple[TaskId, int]:
    return (lease.task, lease.attempt)


def result_of(lease: Task) -> GenerationResult:
    return GenerationResult(
        key=key_of(lease),
        completions=[a_completion([1, 2]), a_completion([3])],
        started_at=100.0,
        finished_at=102.5,
    )


def identity() -> ActorIdentity:
    return ActorIdentity("a0", "i0", "host", model_digest="m", tokenizer_digest="t")


def joined_session() -> Session:
    session = Session(identity())
    session.hello(0.0)
    session.receive(a_welcome(), 0.0)
    session.take_actions()
    return session


def said(session: Session) -> list[Any]:
    return [
        action.message for action in session.take_actions() if isinstance(action, SendToLearner)
    ]


def owe_group(session: Session, lease: Task, now: float) -> Group:
    session.receive(lease, now)
    session.generated(key_of(lease), result_of(lease), now)
    session.scored(key_of(lease), REWARD, 0.25, now)
    (group,) = (m for m in said(session) if isinstance(m, Group))
    return group


def test_hello_is_repeated_until_the_learner_welcomes():
    session = Session(identity())
    session.hello(0.0)
    (hello,) = said(session)
    assert (hello.actor_id, hello.model_digest, hello.protocol_version) == (
        "a0",
        "m",
        PROTOCOL_VERSION,
    )
    session.credit(8)
    session.tick(4.9)
    assert said(session) == []
    session.tick(5.0)
    assert said(session) == [hello]
    session.receive(a_welcome(), 5.1)
    assert session.take_actions() == [JoinRun(a_welcome(), new_incarnation=True)]
    session.tick(60.0)
    assert said(session) == []


def test_credit_follows_free_completions_less_what_was_leased():
    session = joined_session()
    session.credit(8)
    session.credit(8)
    assert said(session) == [Request(free_completions=8)]
    session.receive(a_task(1), 0.0)
    session.take_actions()
    session.credit(6)  # 8 offered, 2 leased: the learner knows
    assert said(session) == []
    session.credit(7)
    assert said(session) == [Request(free_completions=7)]


def test_a_task_is_sampled_scored_sent_and_kept_until_acknowledged():
    session = joined_session()
    lease = a_task()
    session.receive(lease, 1.0)
    (sample,) = session.take_actions()
    assert isinstance(sample, Sample)
    assert sample.request.prompt_ids == [4, 5]
    assert (sample.request.seed, sample.request.min_policy_version) == (11, 3)
    session.generated(key_of(lease), result_of(lease), 2.0)
    assert session.take_actions() == [RequestScores(lease, result_of(lease))]
    session.scored(key_of(lease), REWARD, 0.25, 3.0)
    (group,) = said(session)
    assert (group.actor_id, group.actor_incarnation, group.learner_incarnation) == (
        "a0",
        "i0",
        "L1",
    )
    assert (group.generation_s, group.reward_s, group.attempt) == (2.5, 0.25, 1)
    assert floats_view(group.reward.rewards).tolist() == [1.0, 0.0]
    session.tick(7.9)
    assert said(session) == []
    session.tick(8.0)
    assert said(session) == [group]
    session.receive(lease, 8.1)  # leased again while it is owed
    assert said(session) == [group]
    session.receive(Ack(task=lease.task, attempt=1), 8.2)
    session.tick(100.0)
    assert said(session) == []
    assert session.groups_held == 0


def test_without_reward_services_a_group_has_no_rewards():
    session = Session(identity())
    session.hello(0.0)
    session.receive(a_welcome(rewards=[]), 0.0)
    lease = a_task()
    session.receive(lease, 0.0)
    session.take_actions()
    session.generated(key_of(lease), result_of(lease), 0.0)
    (group,) = said(session)
    assert (group.reward.names, group.reward.rewards) == ([], b"")


def test_a_cancelled_lease_is_nobodys():
    session = joined_session()
    sampling, scoring = a_task(1), a_task(2)
    session.receive(sampling, 0.0)
    session.receive(scoring, 0.0)
    session.generated(key_of(scoring), result_of(scoring), 0.0)
    session.take_actions()
    session.receive(Cancel(task=sampling.task, attempt=1), 1.0)
    session.receive(Cancel(task=scoring.task, attempt=1), 1.0)
    session.receive(Cancel(task=scoring.task, attempt=7), 1.0)
    assert session.take_actions() == [CancelSampling(key_of(sampling))]
    session.scored(key_of(scoring), REWARD, 0.1, 1.0)
    session.failed(key_of(scoring), "late", 1.0)
    session.generated(key_of(sampling), result_of(sampling), 1.0)
    assert session.take_actions() == []


def test_a_failure_is_owed_like_a_group():
    session = joined_session()
    lease = a_task()
    session.receive(lease, 0.0)
    session.take_actions()
    session.failed(key_of(lease), "no room", 0.0)
    expected = Failed(task=lease.task, attempt=1, reason="no room")
    assert said(session) == [expected]
    session.tick(5.0)
    assert said(session) == [expected]
    session.receive(Ack(task=lease.task, attempt=1), 5.0)
    session.tick(20.0)
    assert said(session) == []


def test_groups_that_may_be_sampled_are_counted_by_the_policy_that_was_applied():
    session = joined_session()
    old, new, pinned = (
        a_task(1, min_policy_version=3),
        a_task(2, min_policy_version=4),
        a_task(3, min_policy_version=3, pinned_version=3),
    )
    for lease in (old, new, pinned):
        session.receive(lease, 0.0)
    assert (session.groups_held, session.groups_sampling) == (3, 0)
    session.applied(3, "d3")
    assert session.groups_sampling == 2
    session.applied(4, "d4")
    assert session.groups_sampling == 2
    session.generated(key_of(new), result_of(new), 1.0)  # it is scored now
    assert (session.groups_held, session.groups_sampling) == (3, 1)


def test_a_learner_that_welcomes_the_actor_again_is_told_its_policy_again():
    session = joined_session()
    session.applied(3, "d3")
    session.take_actions()
    session.hello(1.0)
    session.receive(a_welcome(), 1.0)
    sent = [a.message for a in session.take_actions() if isinstance(a, SendToLearner)]
    assert [type(message) for message in sent] == [Hello, Applied]
    assert sent[1] == Applied(version=3, digest="d3")
    session.receive(a_welcome("L2"), 2.0)  # another learner counts versions from 0
    session.receive(a_welcome("L2"), 2.0)
    sent = [a.message for a in session.take_actions() if isinstance(a, SendToLearner)]
    assert [type(message) for message in sent] == [Hello]


def test_after_a_reconnect_hello_comes_first_then_what_is_owed():
    session = joined_session()
    group = owe_group(session, a_task(), 1.0)
    for _ in range(3):
        session.receive(Refuse(code="hello_required", reason="say Hello first"), 2.0)
    (hello,) = said(session)
    assert isinstance(hello, Hello)
    session.tick(6.5)
    session.credit(32)
    assert said(session) == []  # nothing before the welcome
    session.receive(a_welcome(), 6.6)
    assert said(session) == [group]
    session.credit(32)
    assert said(session) == [Request(free_completions=32)]


def test_a_new_learner_gets_a_new_hello_and_nothing_of_the_old():
    session = joined_session()
    owe_group(session, a_task(1), 1.0)
    session.receive(a_task(2), 1.0)
    session.take_actions()
    session.receive(a_welcome("L2"), 2.0)
    abandon, joined, hello = session.take_actions()
    assert abandon == CancelSampling(key_of(a_task(2)))
    assert joined == JoinRun(a_welcome("L2"), new_incarnation=True)
    assert isinstance(hello, SendToLearner)
    assert isinstance(hello.message, Hello)
    assert session.groups_held == 0
    session.receive(a_welcome("L2"), 2.1)
    assert session.take_actions() == [JoinRun(a_welcome("L2"), new_incarnation=False)]
    assert session.joined


def test_refusals_that_are_final_end_the_actor():
    session = Session(identity())
    session.hello(0.0)
    with pytest.raises(RefusedError, match=r"\(tokenizer\): ours is t, yours u"):
        session.receive(Refuse(code="tokenizer", reason="ours is t, yours u", fatal=True), 0.0)
    session.receive(Refuse(code="invalid", reason="a bad group"), 0.0)


def test_policy_and_stop_are_passed_on_and_leaving_releases():
    session = joined_session()
    policy = a_policy(4)
    session.receive(policy, 0.0)
    session.applied(4, "d4")
    session.receive(Stop(reason="done"), 0.0)
    first, second, third = session.take_actions()
    assert (first, third) == (NotePolicy(policy), LeaveRun("done"))
    assert isinstance(second, SendToLearner)
    session.receive(a_task(), 0.0)
    session.take_actions()
    session.leave("done")
    assert said(session) == [Release(reason="done")]
    assert session.groups_held == 0
