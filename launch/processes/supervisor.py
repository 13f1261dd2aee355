"""Keeps a run going: its learner, whose end is the run's end, and its replaceable helpers.

A process that dies is started again after a delay (`restarts.py`), the learner while its helpers
(actors, reward servers) stay up. A learner is not restarted once it has ended its work, when it
says that a restart would not help (`exit_status.py`), or when it fails before it was ever ready. A
helper that ends by itself, even with status 0, is restarted unless the learner has dismissed it.

When no helper of a required kind is left, the learner is asked to stop, and the run fails. The
first SIGINT or SIGTERM asks it as well, the second kills everything at once. The task that started
a process also ends it, however the task ends. Faults and restarts become events of the run.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
from anyio.abc import TaskGroup, TaskStatus

from launch.processes.children import (
    Child,
    ChildSpec,
    Processes,
    describe_status,
    shortened,
    start,
)
from launch.processes.exit_status import FAILED, FINISHED, NO_RESTART, STOPPED
from launch.processes.restarts import FIRST_DELAY_S, HEALTHY_S, Restarts
from launch.processes.start import GRACE_S
from launch.run_folder.tail import EventTail, StepTail
from protocol.run_record import (
    Fault,
    Notice,
    Restart,
    StateChanged,
    WorkDone,
    record_event,
)

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
        backoff_s: float = FIRST_DELAY_S,
    ) -> None:
        self._folder = folder
        self._logs = folder / "logs"
        self._processes = processes
        self._learner = processes.learner
        self._say = say
        self._companions = companions
        self._backoff_s = backoff_s
        self._alive: dict[str, Child] = {}
        self._given_up: set[str] = set()
        self._waiting = list(processes.helpers)  # those to start with the next learner

        # What the learner recorded since this object was made.
        self._events = EventTail(folder)
        self._steps = StepTail(folder)
        self._ready = False
        self._work_done = False
        self._fault = ""  # in the words of the learner that ran last

        self._stop = anyio.Event()  # the run is to end: nothing is restarted any more
        self._failed = False
        self._killed = False

    async def run(self) -> int:
        """Run until the learner has ended; return the exit status for the launcher."""
        status = FAILED
        async with anyio.create_task_group() as group:
            await group.start(self._watch_signals)
            for companion in self._companions:
                group.start_soon(companion)
            for note in self._processes.notes:
                record_event(self._folder, Notice(level="info", message=note))

            status = await self._run_learner(group)

            self._stop.set()
            await self._end_helpers()
            group.cancel_scope.cancel()
        return status

    # ---- the learner -------------------------------------------------------------------------

    async def _run_learner(self, group: TaskGroup) -> int:
        restarts = Restarts(self._learner.restarts, self._backoff_s)
        while not self._stop.is_set():
            # Helpers first: they wait for the learner, which takes longest to start.
            waiting, self._waiting, self._work_done = self._waiting, [], False
            for spec in waiting:
                group.start_soon(self._keep_running, spec)

            self._fault = ""
            child, status = await self._run_once(self._learner)
            if status == FINISHED:
                return FINISHED
            if self._killed or self._failed or status == STOPPED:
                break
            if not await self._restart_learner(child, status, restarts):
                return FAILED

        return FAILED if self._failed and not self._killed else STOPPED

    async def _restart_learner(self, child: Child, status: int, restarts: Restarts) -> bool:
        """Wait before the next start; return False, with the reason reported, if there is none."""
        # A learner that was never ready has settings or data that do not work, as a rule.
        worth_it = self._ready and status != NO_RESTART and not self._stop.is_set()
        healthy = self._steps.advanced()
        delay_s = restarts.died(anyio.current_time(), healthy=healthy) if worth_it else None

        if delay_s is not None:
            reason = self._fault.partition("\n")[0] or child.reason(status)
            await self._pause(child.spec, reason, restarts.count, delay_s)
            return True

        if self._fault:
            self._say(shortened(f"{child.spec.name}: {self._fault}"))
        else:
            self._report(Fault(process=child.spec.name, reason=_cause(child, status)))
        if worth_it and restarts.count:
            reason = f"the learner is given up after {child.spec.restarts}; fix the fault, and "
            self._report(Fault(process="launcher", reason=f"{reason}resume the run"))
        return False

    def _read_events(self) -> None:
        """Take in what the learner has recorded since the last call."""
        for event in self._events.read():
            match event:
                case StateChanged(state="running"):
                    self._ready = True
                case WorkDone():
                    self._work_done = True
                case Fault() if event.process == self._learner.name:
                    self._fault = event.reason
                case _:
                    pass

    # ---- helpers -----------------------------------------------------------------------------

    async def _keep_running(self, spec: ChildSpec) -> None:
        restarts = Restarts(spec.restarts, self._backoff_s)
        while not self._stop.is_set():
            started = anyio.current_time()
            child, status = await self._run_once(spec)

            # The learner records that its work is done before it tells its actors to leave. They
            # are needed again only if it dies before its end.
            if self._work_done:
                self._waiting.append(spec)
                return
            if self._stop.is_set():
                return

            now = anyio.current_time()
            delay_s = restarts.died(now, healthy=now - started >= HEALTHY_S)
            if delay_s is None:
                await self._give_up(child, status)
                return
            await self._pause(spec, child.reason(status), restarts.count, delay_s)

    async def _give_up(self, child: Child, status: int) -> None:
        """Give a helper up; end the run if it was the last of a required kind."""
        self._report(Fault(process=child.spec.name, reason=_cause(child, status)))
        self._given_up.add(child.spec.name)

        kind = child.spec.kind
        same_kind = {spec.name for spec in self._processes.helpers if spec.kind == kind}
        if kind not in self._processes.required or not same_kind <= self._given_up:
            return
        reason = f"no {kind} process is left, so the run ends; fix the fault and resume the run"
        self._report(Fault(process="launcher", reason=reason))
        self._failed = True
        await self._ask_learner_to_stop()

        # The end of the run cancels this wait.
        await anyio.sleep(self._processes.stop_timeout_s)
        reason = f"has not stopped within {self._processes.stop_timeout_s:g} s: killed"
        self._report(Fault(process=self._learner.name, reason=reason))
        self._kill(self._learner.name)

    async def _end_helpers(self) -> None:
        async with anyio.create_task_group() as group:
            for child in list(self._alive.values()):
                group.start_soon(child.end, GRACE_S)

    # ---- all processes -----------------------------------------------------------------------

    async def _run_once(self, spec: ChildSpec) -> tuple[Child, int]:
        """Run a process to its end, or end it when cancelled; return its exit status, too."""
        child: Child | None = None
        with anyio.CancelScope(shield=True):  # a half-started process could not be killed
            child = await start(spec, self._logs)
        assert child is not None
        self._alive[spec.name] = child
        try:
            # What was asked for while it was being started.
            if self._killed:
                child.kill()
            elif self._stop.is_set():
                await child.ask_to_stop()
            status = await child.wait()
        finally:
            del self._alive[spec.name]
            with anyio.CancelScope(shield=True):
                # Cancelled by an error of ours, such as a terminal that went away.
                if spec is self._learner and not self._killed:
                    await child.end(self._processes.stop_timeout_s)
                await child.close()

        self._read_events()
        return child, status

    async def _pause(self, spec: ChildSpec, reason: str, attempt: int, delay_s: float) -> None:
        """Report a restart, and wait for it, unless the run is to end."""
        restart = Restart(
            process=spec.name,
            reason=reason,
            attempt=attempt,
            max_restarts=spec.restarts.count,
            delay_s=delay_s,
        )
        self._report(restart)
        with anyio.move_on_after(delay_s):
            await self._stop.wait()

    def _report(self, event: Fault | Restart) -> None:
        record_event(self._folder, event)
        self._say(event.text)

    async def _watch_signals(
        self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        asked = False
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                if asked:
                    self._killed = True
                    for name in list(self._alive):
                        self._kill(name)
                else:
                    asked = True
                    self._say(
                        "stopping after this step, with a checkpoint; Ctrl-C again stops at once"
                    )
                    await self._ask_learner_to_stop()

    async def _ask_learner_to_stop(self) -> None:
        """Ask for the end of the run, whether the learner is at work or waits for its restart."""
        self._stop.set()
        learner = self._alive.get(self._learner.name)
        if learner is not None:
            await learner.ask_to_stop()

    def _kill(self, name: str) -> None:
        if name in self._alive:
            self._alive[name].kill()


def _cause(child: Child, status: int) -> str:
    return f"ended with {describe_status(status)}; {child.log} says:\n{child.log_ending()}"


@contextmanager
def awake() -> Generator[None]:
    """Keep a Mac from sleeping inside the block; do nothing on other systems."""
    program = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if program is None:
        yield
        return

    # It watches this process, so that it does not outlive one that is killed.
    with subprocess.Popen([program, "-i", "-w", str(os.getpid())]) as process:
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
