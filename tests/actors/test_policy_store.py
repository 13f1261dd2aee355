"""Which snapshots are fetched, and when they are put in force."""

from actors.policy_store import PolicyStore
from protocol.messages.messages import Policy


def policy(version: int) -> Policy:
    return Policy(version=version, digest=f"d{version}", size=1)


def test_the_newest_is_fetched_one_at_a_time_and_taken_once():
    current = 0
    store = PolicyStore(lambda version: version > current)
    assert store.next_fetch(0.0) is None
    store.announce(policy(1))
    store.announce(policy(2))
    assert store.next_fetch(0.0) == policy(2)
    store.announce(policy(3))
    assert store.next_fetch(0.0) is None
    store.fetched(policy(2), b"two")
    assert store.next_fetch(0.0) == policy(3)
    assert store.take() == (policy(2), b"two")
    current = 2
    assert store.take() is None
    store.fetched(policy(3), b"three")
    assert store.take() == (policy(3), b"three")
    current = 3
    store.announce(policy(3))
    assert store.next_fetch(0.0) is None


def test_a_deferred_swap_waits_and_a_pinned_version_comes_first():
    allowed = {1}
    store = PolicyStore(lambda version: version in allowed)
    store.announce(policy(1))
    store.announce(policy(2))
    assert store.next_fetch(0.0) == policy(1)
    store.fetched(policy(1), b"one")
    allowed.clear()
    assert store.take() is None
    allowed.add(1)
    assert store.take() == (policy(1), b"one")


def test_a_failed_fetch_is_tried_again_unless_superseded():
    store = PolicyStore(lambda version: True)
    store.announce(policy(1))
    assert store.next_fetch(0.0) == policy(1)
    store.failed(policy(1), "gone", 0.0)
    assert store.next_fetch(0.9) is None
    assert store.next_fetch(1.0) == policy(1)
    store.announce(policy(2))
    store.failed(policy(1), "gone", 1.0)
    assert store.next_fetch(2.0) == policy(2)


def test_what_was_on_its_way_from_an_old_learner_is_dropped():
    store = PolicyStore(lambda version: True)
    store.announce(policy(5))
    store.next_fetch(0.0)
    store.reset()
    store.fetched(policy(5), b"old")
    store.failed(policy(5), "old", 0.0)
    assert store.take() is None
    assert store.next_fetch(0.0) is None
