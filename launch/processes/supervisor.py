"""Keeps a run going: its learner, whose end is the run's end, and its replaceable helpers.

A helper (actor, reward server) that dies is restarted after a delay that doubles, up to
`max_restarts` times. A helper that exits with status 0 has left on purpose. If no helper of a
required kind is left, the run fails. The first SIGINT or SIGTERM asks the learner to stop cleanly,
the second kills everything at once. Faults and restarts are recorded as events of the run.
"""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
from anyio.abc import TaskStatus

from launch.processes.children import (
    Child,
    ChildSpec,
    Processes,
    describe_status,
    shortened,
    start,
)
from launch.run_folder.tail import EventTail
from protocol.run_record import Fault, Notice, Restart, record_event

INTERRUPTED = 130
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
GRACE_S = 10.0

Companion = Callable[[], Coroutine[None, None, None]]


class Supervisor:
    """Runs the processes of the run in `folder`; `say` shows a text to the user.

    `companions` run alongside and are cancelled at the end (the display).
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        *,
        say: Callable[[str], None],
        companions: Sequence[Companion] = (),
        backoff_s: float = FIRST_BACKOFF_S,
    ) -> None:
        self._folder = folder
        self._logs = folder / "logs"
        self._learner = processes.learner
        self._helpers = processes.helpers
        self._required = processes.required
        self._notes = processes.notes
        self._say = say
        self._companions = companions
        self._backoff_s = backoff_s
        self._events = EventTail(folder)
        self._alive: dict[str, Child] = {}
        self._given_up: set[str] = set()
        self._failed = False
        self._interrupts = 0
        self._over = False

    @property
    def interrupted(self) -> bool:
        """Whether a signal asked the run to stop."""
        return self._interrupts > 0

    async def run(self) -> int:
        """Run until the learner ends; return the exit status for the launcher."""
        status = 1
        async with anyio.create_task_group() as group:
            try:
                await group.start(self._watch_signals)
                for companion in self._companions:
                    group.start_soon(companion)
                for note in self._notes:
                    record_event(self._folder, Notice(level="info", message=note))
                # Before the learner, which takes longest to start: helpers wait for it.
                for spec in self._helpers:
                    group.start_soon(self._keep_running, spec)

                status = await self._run_learner()

                self._over = True
                await self._end_helpers()
            finally:
                for child in self._alive.values():
                    child.kill()
            group.cancel_scope.cancel()
        return status

    async def _run_learner(self) -> int:
        child = await start(self._learner, self._logs)
        self._alive[child.spec.name] = child
        if self._interrupts:  # while it was being started
            await child.ask_to_stop()
        status = await child.wait()
        del self._alive[child.spec.name]

        # We killed it: its own exit status says nothing.
        if self._interrupts > 1:
            return INTERRUPTED
        if self._failed:
            return 1
        if status != 0:
            self._report_learner(child, status)
        return status if status >= 0 else 128 - status

    def _report_learner(self, child: Child, status: int) -> None:
        """Say why the learner failed: in its own words if it recorded them, or by its log."""
        recorded = [
            event
            for event in self._events.read()
            if isinstance(event, Fault) and event.process == child.spec.name
        ]
        if recorded:
            self._say(shortened(recorded[-1].text))
        else:
            self._report(Fault(process=child.spec.name, reason=_cause(child, status)))

    async def _keep_running(self, spec: ChildSpec) -> None:
        backoff_s = self._backoff_s
        for attempt in range(1, spec.max_restarts + 2):
            child = await start(spec, self._logs)
            self._alive[spec.name] = child
            status = await child.wait()
            del self._alive[spec.name]

            # Status 0: it left on purpose, as an actor does at the end of the run.
            if status == 0 or self._over:
                return
            if attempt > spec.max_restarts:
                self._give_up(child, status)
                return

            restart = Restart(
                process=spec.name,
                reason=describe_status(status),
                attempt=attempt,
                max_restarts=spec.max_restarts,
                delay_s=backoff_s,
            )
            self._report(restart)
            await anyio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)

    def _give_up(self, child: Child, status: int) -> None:
        """Give a helper up; fail the run if it was the last of a required kind."""
        self._report(Fault(process=child.spec.name, reason=_cause(child, status)))
        self._given_up.add(child.spec.name)

        kind = child.spec.kind
        same_kind = {spec.name for spec in self._helpers if spec.kind == kind}
        if kind in self._required and same_kind <= self._given_up:
            reason = f"no {kind} process is left, so the run ends; fix the fault and resume the run"
            self._report(Fault(process="launcher", reason=reason))
            self._failed = True
            self._kill(self._learner.name)

    def _report(self, event: Fault | Restart) -> None:
        record_event(self._folder, event)
        self._say(event.text)

    async def _watch_signals(
        self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                self._interrupts += 1
                if self._interrupts == 1:
                    self._say(
                        "stopping after this step, with a checkpoint; Ctrl-C again stops at once"
                    )
                    learner = self._alive.get(self._learner.name)
                    if learner is not None:
                        await learner.ask_to_stop()
                else:
                    self._over = True
                    for name in list(self._alive):
                        self._kill(name)

    def _kill(self, name: str) -> None:
        if name in self._alive:
            self._alive[name].kill()

    async def _end_helpers(self) -> None:
        async with anyio.create_task_group() as group:
            for child in list(self._alive.values()):
                group.start_soon(child.end, GRACE_S)


def _cause(child: Child, status: int) -> str:
    return f"ended with {describe_status(status)}; {child.log} says:\n{child.log_ending()}"


@contextmanager
def awake() -> Generator[None]:
    """Keep a Mac from sleeping inside the block; do nothing on other systems."""
    program = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if program is None:
        yield
        return

    with subprocess.Popen([program, "-i"]) as process:
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
