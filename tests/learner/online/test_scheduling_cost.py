"""What a message costs the coordinator, in executed lines, however many actors there are."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from learner.ledger.ledger import Ledger
from learner.online.coordinator import Coordinator
from learner.online.credit import CreditQueue
from protocol.messages.messages import ActorMessage, Applied, Heartbeat, Request
from tests.learner.small_run import LIMITS, G, coordinator_of, group, hello, prompts, tasks
from tests.protocol.builders import a_policy


def lines_of(work: Callable[[], object]) -> int:
    """Count the lines that are executed, those of called functions and of every turn included."""
    count = 0

    def trace(_frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def peer_of(number: int) -> bytes:
    return f"peer-{number}".encode()


def crowd(actors: int) -> Coordinator:
    """Have so many actors hold a task each, with room for more; none is left to lease."""
    limits = replace(LIMITS, batch_size=actors, max_staleness=0, total_batches=None)
    made = coordinator_of(Ledger.new(limits, "r", "L1"))
    made.prompts = prompts(actors)
    made.publish(a_policy(0), 0.0)
    for number in range(actors):
        made.receive(peer_of(number), hello(f"actor-{number}"), 0.0)
        made.receive(peer_of(number), Applied(version=0, digest="d0"), 0.0)
        made.receive(peer_of(number), Request(free_completions=G), 0.0)
    for number in range(actors):
        made.receive(peer_of(number), Request(free_completions=8 * G), 1.0)
    return made


def cost(actors: int, message: Callable[[Coordinator], ActorMessage]) -> int:
    """Return what a message of an actor in the middle of the crowd costs."""
    made = crowd(actors)
    sent = message(made)
    return lines_of(lambda: made.receive(peer_of(actors // 2), sent, 2.0))


def the_group(made: Coordinator) -> ActorMessage:
    middle = len(made.connected.by_peer) // 2
    leased = tasks(made, peer_of(middle))
    assert [task.task.number for task in leased] == [middle]
    return group(leased[0], f"actor-{middle}")


@pytest.mark.parametrize(
    ("message", "most"),
    [
        (lambda _: Heartbeat(progress=5, tokens_sampled=9), 120),
        (lambda _: Request(free_completions=9 * G), 150),
        (the_group, 300),
    ],
    ids=["heartbeat", "request", "group"],
)
def test_a_message_costs_the_same_among_8_and_among_400_actors(message, most):
    among_few, among_many = cost(8, message), cost(400, message)
    assert among_few == among_many
    assert among_few <= most


class _Peer:
    def __init__(self, name: bytes, joined: int) -> None:
        self.name, self.joined, self.room, self.idle = name, joined, 0, True


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.booleans()), max_size=30),
    st.integers(1, 6),
)
def test_the_peer_with_the_most_room_is_first_or_an_idle_one_where_none_has_enough(changes, needed):
    queue = CreditQueue()
    peers = [_Peer(bytes([number]), number) for number in range(5)]
    for number, room, idle in changes:
        peer = peers[number]
        peer.room, peer.idle = room, idle
        if room:
            queue.put(peer.name, room, peer.joined, idle=idle)
        else:
            queue.remove(peer.name)

    def by_room(among: list[_Peer]) -> bytes | None:
        return max(among, key=lambda p: (p.room, -p.joined)).name if among else None

    having = [peer for peer in peers if peer.room]
    enough = [peer for peer in having if peer.room >= needed]
    idle = [peer for peer in having if peer.idle]
    assert queue.first(needed) == (by_room(enough) or by_room(idle))
