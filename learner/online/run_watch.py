"""Notices that no actor is connected, or that no step comes, and what the run waits for.

Each is told once, as a warning, and once more when it has ended. The learner's warnings are events
of the run, which the display shows (`launch/processes/learner_program.py`).
"""

import logging
from dataclasses import dataclass
from itertools import islice

from learner.ledger.ledger import Ledger
from learner.ledger.state import TaskRecord

log = logging.getLogger("pippin.learner")

# An actor that died is back within seconds, and a large model is loaded within a minute.
NO_ACTOR_S = 60.0
# The first step of a large model takes minutes, most of them compilation. A step that takes so much
# longer than the longest before it is more than chance.
NO_STEP_S = 300.0
NO_STEP_FACTOR = 3.0
NAMED_TASKS = 4  # of those that a step waits for


@dataclass
class RunWatch:
    """Since when there has been no actor, and no step; both None before the first policy.

    `longest_s` is the longest step so far.
    """

    no_actor_since: float | None = None
    stepped_at: float | None = None
    longest_s: float = 0.0
    _told_actor: bool = False
    _told_step: bool = False

    def started(self, now: float) -> None:
        """Begin to watch: a policy can be sampled with."""
        if self.stepped_at is None:
            self.no_actor_since = self.stepped_at = now

    def stepped(self, now: float) -> None:
        """Note a step."""
        if self.stepped_at is not None:
            took = now - self.stepped_at
            self.longest_s = max(self.longest_s, took)
            if self._told_step:
                log.info("the run goes on: a step came after %.0f s", took)
        self.stepped_at, self._told_step = now, False

    def tick(self, ledger: Ledger, actors: int, now: float) -> None:
        """Look whether something has been waited for too long."""
        if self.stepped_at is None or ledger.is_finished():
            return
        self._look_for_actors(actors, now)

        bound = max(NO_STEP_S, NO_STEP_FACTOR * self.longest_s)
        waited = now - self.stepped_at
        if waited > bound and not self._told_step:
            self._told_step = True
            log.warning("no step for %.0f s: %s", waited, what_is_missing(ledger, now))

    def _look_for_actors(self, actors: int, now: float) -> None:
        if actors:
            if self._told_actor and self.no_actor_since is not None:
                waited = now - self.no_actor_since
                log.info("the run goes on: an actor is connected again after %.0f s", waited)
            self.no_actor_since, self._told_actor = None, False
            return

        if self.no_actor_since is None:
            self.no_actor_since = now
        waited = now - self.no_actor_since
        if waited > NO_ACTOR_S and not self._told_actor:
            self._told_actor = True
            log.warning(
                "no actor has been connected for %.0f s, so nothing is sampled: look at the logs "
                "of the actors, or start one with launch/actor.py",
                waited,
            )


def what_is_missing(ledger: Ledger, now: float) -> str:
    """Say which tasks the next step waits for, and who has them."""
    state = ledger.state
    if state.training:
        return "a batch is in training"

    head = islice(state.queue.values(), ledger.settings.batch_size)
    missing = [record for record in (*state.evals.values(), *head) if not record.ended]
    if not missing:
        return "no task is queued" if not state.queue else "more tasks have to join the queue"

    named = ", ".join(_who_has(ledger, record, now) for record in missing[:NAMED_TASKS])
    more = len(missing) - NAMED_TASKS
    return f"waiting for {named}" + (f" and {more} more tasks" if more > 0 else "")


def _who_has(ledger: Ledger, record: TaskRecord, now: float) -> str:
    name = f"task {record.number}" if record.kind == "train" else f"evaluation {record.number}"
    if record.lease is None:
        return f"{name} (no actor has it)"
    age = ledger.lease_age(record.number, now)
    return f"{name} (with actor {record.lease.actor} for {age:.0f} s)"
