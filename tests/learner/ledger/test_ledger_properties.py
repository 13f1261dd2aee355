"""The ledger against actors that lose, delay, repeat and reorder, and that crash and rejoin.

Every answer that it gives is compared with that of a ledger which scans its whole state.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from learner.ledger.events import AnyEvent
from learner.ledger.ledger import Ledger
from learner.ledger.types import Batch, EndedLease, Grant, LedgerSettings
from protocol.messages.parts import TaskId
from tests.learner.ledger.scanning import CheckedLedger

B, G, EVAL_G, LEASE_S, MAX_LEASE_S, ATTEMPTS = 2, 3, 2, 10.0, 17.0, 3
ACTORS = st.sampled_from(["a", "b", "c"])


@dataclass
class FakeActor:
    """What an actor holds."""

    work: list[Grant] = field(default_factory=list)


@dataclass
class Parcel:
    """A group on its way, with the versions that sampled it."""

    grant: Grant
    actor: str
    versions: tuple[int, ...]


class Simulation(RuleBasedStateMachine):
    """One learner, three actors, and a network that does as it likes."""

    eta = 0

    @initialize(batches=st.integers(1, 6), rows=st.integers(1, 14))
    def start(self, batches: int, rows: int) -> None:
        self.limits = LedgerSettings(
            batch_size=B,
            max_staleness=self.eta,
            num_generations=G,
            eval_generations=EVAL_G,
            total_batches=batches,
            lease_s=LEASE_S,
            max_lease_s=MAX_LEASE_S,
            max_attempts=ATTEMPTS,
        )
        self.ledger: Ledger = CheckedLedger.new(self.limits, "run", "0")
        self.ledger.drain_events()
        self.base, self.journal = self.ledger.state.copy(), list[AnyEvent]()
        self.now, self.incarnations, self.next_row, self.rows = 0.0, 1, 0, rows
        self.actors = {name: FakeActor() for name in "abc"}
        self.network: list[Parcel] = []
        self.row_of: dict[TaskId, int] = {}
        self.versions: dict[TaskId, tuple[int, ...]] = {}
        self.outcomes: dict[TaskId, list[str]] = {}
        self.batch: Batch | None = None
        self.trained: list[int] = []
        self.dropped: list[int] = []
        self.leased_rows: set[int] = set()
        self.published = 0
        self.ledger.published(0, "d0")

    # ---- the learner --------------------------------------------------------------------------

    @rule(count=st.integers(1, 6))
    def join(self, count: int) -> None:
        for _ in range(min(count, self.ledger.room())):
            if self.next_row == self.rows:
                self.ledger.end_of_rows(self.now)
                break
            self.row_of[self.ledger.join(self.next_row, self.now)] = self.next_row
            self.next_row += 1

    @precondition(lambda self: self.ledger.batch_ready())
    @rule()
    def form(self) -> None:
        self.batch = batch = self.ledger.form_batch(self.now)
        numbers = [task.number for task in batch.tasks]
        assert numbers == sorted(numbers)
        assert len(numbers) == B or self.next_row == self.rows
        for task in batch.tasks:
            assert batch.version - min(self.versions[task]) <= self.eta

    @precondition(lambda self: self.batch is not None)
    @rule(publish=st.booleans())
    def consume(self, publish: bool) -> None:
        assert self.batch is not None
        self.ledger.consumed()
        self.trained += [self.row_of[task] for task in self.batch.tasks]
        self.batch = None
        if publish:
            self.publish()

    @rule()
    def publish(self) -> None:
        self.published = self.ledger.state.version
        self.ledger.published(self.published, f"d{self.published}")

    @precondition(lambda self: not self.ledger.state.evals)
    @rule(rows=st.integers(1, 3))
    def evaluate(self, rows: int) -> None:
        self.ledger.join_eval([f"eval-{i}" for i in range(rows)], self.published, self.now)

    @precondition(lambda self: self.ledger.eval_ready())
    @rule()
    def take_eval(self) -> None:
        done = self.ledger.take_eval()
        assert all(set(self.versions[task]) == {done.version} for task in done.tasks)

    @rule(seconds=st.sampled_from([1.0, 2.0, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.cancel(self.ledger.expire(self.now))

    @precondition(lambda self: self.batch is not None)
    @rule(back=st.sampled_from([False, False, True]))
    def give_back(self, back: bool) -> None:
        """Find, now and then, that a batch cannot be trained on."""
        if not back:
            return
        assert self.batch is not None
        self.ledger.return_batch("no rewards", self.now)
        assert list(self.ledger.state.queue)[: len(self.batch.tasks)] == [
            task.number for task in self.batch.tasks
        ]
        for task in self.batch.tasks:
            self.outcomes.pop(task, None)  # it is sampled again
        self.batch = None

    @rule(kill=st.sampled_from([False, False, False, True]), keep=st.booleans())
    def resume(self, kill: bool, keep: bool) -> None:
        """Kill the learner, now and then, and resume it from the newest state."""
        if not kill:
            return
        saved = msgspec.json.decode(msgspec.json.encode(self.ledger.state), type=type(self.base))
        old = [*saved.training.values(), *saved.queue.values()]
        self.check_replay()
        self.ledger = CheckedLedger(self.limits, saved.copy())
        lost = self.ledger.begin_incarnation(str(self.incarnations), keep_groups=keep)
        self.ledger.drain_events()
        self.base, self.journal = self.ledger.state.copy(), []
        self.incarnations += 1
        self.batch, self.published = None, self.ledger.state.version
        assert [r.row_key for r in lost.rejoined] == [r.row_key for r in old]
        received = {r.number for r in old if r.taken is not None}
        assert {t.number for t in lost.groups} == (set() if keep else received)
        kept = [r.row_key for r in self.ledger.state.queue.values() if r.taken is not None]
        assert kept == [r.row_key for r in old if keep and r.taken is not None]
        assert len(lost.eval_rows) == len(saved.evals)
        self.row_of |= {r.new: self.row_of[r.old] for r in lost.rejoined}
        if keep:
            old_versions = self.versions
            known = [r for r in lost.rejoined if r.old in old_versions]
            self.versions |= {r.new: old_versions[r.old] for r in known}
        self.ledger.published(self.published, "again")
        for actor in self.actors.values():
            actor.work.clear()

    # ---- the actors ---------------------------------------------------------------------------

    @rule(name=ACTORS, free_completions=st.sampled_from([0, 2, 3, 7, 12]))
    def lease(self, name: str, free_completions: int) -> None:
        self.join(6)
        self.give(name, free_completions)

    @rule(name=ACTORS, count=st.integers(1, 4), data=st.data())
    def sample(self, name: str, count: int, data: Any) -> None:
        """Finish some groups, in any order; the actor swaps policies whenever it likes."""
        actor = self.actors[name]
        for _ in range(min(count, len(actor.work))):
            grant = actor.work.pop(data.draw(st.integers(0, len(actor.work) - 1)))
            versions: tuple[int, ...] = (grant.pinned_version or 0,)
            if grant.pinned_version is None:
                first = data.draw(st.integers(grant.min_policy_version, self.published))
                versions = (first, data.draw(st.integers(first, self.published)))
            self.network.append(Parcel(grant, name, versions))

    @rule(name=ACTORS, free_completions=st.sampled_from([3, 6, 12]))
    def work_well(self, name: str, free_completions: int) -> None:
        """Lease, sample with the oldest policy that is allowed, deliver twice, and train."""
        self.join(6)
        for grant in self.give(name, free_completions):
            version = grant.min_policy_version
            self.hand_over(Parcel(grant, name, (version,)))
            self.hand_over(Parcel(grant, name, (version,)))
        self.actors[name].work.clear()
        if self.batch is not None:
            self.consume(False)
        if self.ledger.batch_ready():
            self.form()

    @rule(data=st.data(), repeat=st.booleans())
    def deliver(self, data: Any, repeat: bool) -> None:
        """Deliver any parcel, in any order; with `repeat` it stays and comes again."""
        if self.network:
            index = data.draw(st.integers(0, len(self.network) - 1))
            self.hand_over(self.network[index] if repeat else self.network.pop(index))

    @rule(data=st.data())
    def lose(self, data: Any) -> None:
        if self.network:
            self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    @rule(name=ACTORS)
    def fail(self, name: str) -> None:
        if self.actors[name].work:
            grant = self.actors[name].work.pop()
            receipt = self.ledger.failed(grant.task, grant.attempt, "reward died", self.now)
            if receipt.dropped and grant.kind == "train":
                self.dropped.append(self.row_of[grant.task])

    @rule(name=ACTORS)
    def progress(self, name: str) -> None:
        self.ledger.renew_leases(name, self.now)

    @rule(name=ACTORS, blamed=st.booleans())
    def withdraw(self, name: str, blamed: bool) -> None:
        self.cancel(self.ledger.withdraw(name, "stuck", self.now, blamed=blamed))

    @rule(name=ACTORS, noticed=st.booleans(), blamed=st.booleans())
    def crash(self, name: str, noticed: bool, blamed: bool) -> None:
        """Crash and rejoin, empty-handed; unnoticed, its leases wait for their expiry."""
        self.actors[name] = FakeActor()
        if noticed:
            self.cancel(self.ledger.actor_gone(name, self.now, blamed=blamed))

    # ---- what must hold -----------------------------------------------------------------------

    def hand_over(self, parcel: Parcel) -> None:
        grant, task = parcel.grant, parcel.grant.task
        receipt = self.ledger.received(task, grant.attempt, parcel.actor, self.now, parcel.versions)
        before = self.outcomes.setdefault(task, [])
        if task.incarnation != str(self.incarnations - 1):
            assert receipt.outcome == "unknown"
        elif "accepted" in before:
            assert receipt.outcome == "duplicate"
        elif grant.kind == "train" and self.row_of[task] in self.dropped:
            assert receipt.outcome == "dropped"
        elif grant.kind == "train":
            assert receipt.outcome == "accepted"
        before.append(receipt.outcome)
        if receipt.outcome == "accepted":
            self.versions[task] = parcel.versions
        if receipt.cancelled is not None:
            self.cancel([receipt.cancelled])

    def give(self, name: str, free_completions: int) -> list[Grant]:
        idle = not self.ledger.leases_of(name)
        grants = self.ledger.lease(name, free_completions, self.now)
        rows = sum(G if g.kind == "train" else EVAL_G for g in grants)
        assert self.ledger.completions_to_lease() in (None, G, EVAL_G)
        assert rows <= free_completions or (idle and free_completions > 0 and len(grants) == 1)
        for grant in grants:
            if grant.kind == "train":
                self.leased_rows.add(self.row_of[grant.task])
        self.actors[name].work += grants
        return grants

    def cancel(self, ended: list[EndedLease]) -> None:
        for lease in ended:
            if lease.dropped and lease.task in self.row_of:
                self.dropped.append(self.row_of[lease.task])

    def check_replay(self) -> None:
        self.journal += self.ledger.drain_events()
        state = self.base.copy()
        for event in self.journal:
            event.apply_to(state)
        assert state == self.ledger.state

    @invariant()
    def bounded(self) -> None:
        assert len(self.ledger.state.queue) + len(self.ledger.state.training) <= (self.eta + 1) * B
        assert self.ledger.state.version <= (self.limits.total_batches or 0)

    def teardown(self) -> None:
        """With one actor that delivers, the run ends, and every row ended exactly once."""
        if not hasattr(self, "ledger"):
            return
        for _ in range(4 * (self.rows + B)):
            if self.ledger.is_finished():
                break
            self.wait(LEASE_S + 1)
            self.publish()
            self.join(self.rows + 1)
            for grant in self.give("a", 1000):
                version = grant.min_policy_version
                self.hand_over(Parcel(grant, "a", (version,)))
            if self.ledger.eval_ready():
                self.take_eval()
            if self.ledger.batch_ready():
                self.form()
            if self.batch is not None:
                self.consume(True)
        assert self.ledger.is_finished()
        ended = sorted(self.trained + self.dropped)
        assert ended == list(range(self.next_row))
        assert self.leased_rows == set(ended)
        counters = self.ledger.state.counters
        assert counters.trained == len(self.trained)
        assert set(counters.discarded) <= {"dropped", "unknown"}
        assert self.ledger.state.version == self.limits.total_batches or self.next_row == self.rows
        self.check_replay()


@pytest.mark.parametrize("eta", [0, 1, 4])
def test_no_fault_of_actors_or_network_breaks_the_ledger(eta):
    machine = type(f"Simulation{eta}", (Simulation,), {"eta": eta})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
