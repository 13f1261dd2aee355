"""What is done to a run: processes killed or frozen, at moments that the journal shows."""

import os
import signal
import subprocess
from contextlib import suppress

from actors.session import RESEND_S
from tests.acceptance.run import Launcher


def after_a_step(run: Launcher, count: int = 1) -> None:
    """Wait until the learner has taken `count` more steps."""
    goal = len(run.steps()) + count
    run.until(lambda: len(run.steps()) >= goal, f"step {goal}")


def held(run: Launcher, actor: str, since: int) -> set[tuple[int, int]]:
    """Return the leases, (task, attempt), that `actor` got after `since` events and still holds."""
    found: set[tuple[int, int]] = set()
    for event in (line["event"] for line in run.events()[since:]):
        if event["type"] == "Leased" and event["actor"] == actor:
            found.add((event["number"], event["attempt"]))
        elif event["type"] in ("Received", "Closed"):
            found.discard((event["number"], event["attempt"]))
    return found


def kill_actor(run: Launcher, before: int) -> int:
    """Kill actor-0 while it works on a task that this process leased; return its process ID.

    `before` is the ID of the process that was killed last.
    """

    def restarted() -> int:
        found = run.child("--name actor-0")
        return found[0] if found is not None and found[0] != before else 0

    pid = run.until(restarted, "new actor-0")
    seen = len(run.events())
    run.until(lambda: held(run, "actor-0", seen), "lease of actor-0")
    os.kill(pid, signal.SIGKILL)
    return pid


def kill_reward_server(run: Launcher) -> None:
    """Kill the reward server."""
    found = run.until(lambda: run.child("reward_server.py"), "reward server")
    os.kill(found[0], signal.SIGKILL)


def freeze_actor(run: Launcher, name: str) -> None:
    """Stop a working actor until another has delivered one of its tasks; then let it continue."""
    pid, _ = run.until(lambda: run.child(f"--name {name}"), name)
    while not _frozen_until_overtaken(run, name, pid):
        after_a_step(run)


def _frozen_until_overtaken(run: Launcher, name: str, pid: int) -> bool:
    """Return whether another actor delivered a task; if not, the groups were on their way."""
    seen = len(run.events())
    stuck = run.until(lambda: held(run, name, seen), f"lease of {name}")
    os.kill(pid, signal.SIGSTOP)

    def deliveries() -> dict[int, str]:
        events = [line["event"] for line in run.events()[seen:]]
        return {e["number"]: e["actor"] for e in events if e["type"] == "Received"}

    mine = {number for number, _ in stuck}
    try:
        run.until(lambda: mine <= deliveries().keys(), f"group that overtook {name}")
    finally:
        os.kill(pid, signal.SIGCONT)
    return any(deliveries()[number] != name for number in mine)


def freeze_learner(run: Launcher) -> None:
    """Stop the learner while groups are on their way, until the actors send them again."""
    pid, _ = run.until(lambda: run.child("learn.py"), "learner")
    seen = len(run.events())
    run.until(lambda: held(run, "actor-1", seen), "lease of actor-1")
    os.kill(pid, signal.SIGSTOP)
    try:
        with suppress(subprocess.TimeoutExpired):
            run.process.wait(2 * RESEND_S)
    finally:
        os.kill(pid, signal.SIGCONT)
