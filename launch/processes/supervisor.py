"""Keeps a run's processes: the learner, whose end is the run's end, and its replaceable helpers.

A helper (actor, reward server) that dies is started again after a back-off that doubles, up to
`max_restarts` times. A helper that exits with status 0 has left on purpose. When no helper of a
required kind is left, the run fails. The first SIGINT or SIGTERM asks the learner to stop cleanly,
the second kills everything at once.
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

from launch.processes.children import Child, ChildSpec, describe_status, start

INTERRUPTED = 130
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
GRACE_S = 10.0

Companion = Callable[[], Coroutine[None, None, None]]


class Supervisor:
    """Runs one learner with its helpers; `say` receives events for the user, in words.

    `required`: kinds of helper of which at least one must be left. `companions` run alongside and
    are cancelled at the end (the display).
    """

    def __init__(
        self,
        learner: ChildSpec,
        helpers: Sequence[ChildSpec],
        logs: Path,
        *,
        say: Callable[[str], None],
        required: frozenset[str] = frozenset(),
        companions: Sequence[Companion] = (),
        backoff_s: float = FIRST_BACKOFF_S,
    ) -> None:
        self._learner = learner
        self._helpers = list(helpers)
        self._logs = logs
        self._say = say
        self._required = required
        self._companions = companions
        self._backoff_s = backoff_s
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
        """Run to the learner's end; return the exit status for the launcher."""
        status = 1
        async with anyio.create_task_group() as group:
            try:
                await group.start(self._watch_signals)
                for companion in self._companions:
                    group.start_soon(companion)
                for spec in self._helpers:
                    group.start_soon(self._keep, spec)
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
        if self._interrupts:
            await child.ask_to_stop()
        status = await child.wait()
        del self._alive[child.spec.name]
        if self._interrupts > 1:
            return INTERRUPTED
        if self._failed:
            return 1
        if status != 0:
            self._say(self._obituary(child, status))
        return status if status >= 0 else 128 - status

    async def _keep(self, spec: ChildSpec) -> None:
        """Keep one helper running, within its restarts."""
        backoff_s = self._backoff_s
        for attempt in range(spec.max_restarts + 1):
            child = await start(spec, self._logs)
            self._alive[spec.name] = child
            status = await child.wait()
            del self._alive[spec.name]
            if status == 0 or self._over:
                return
            if attempt < spec.max_restarts:
                self._say(
                    f"{spec.name} ended with {describe_status(status)}; restart {attempt + 1} of "
                    f"{spec.max_restarts} in {backoff_s:g} s"
                )
                await anyio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
            else:
                self._give_up(child, status)

    def _give_up(self, child: Child, status: int) -> None:
        self._say(self._obituary(child, status))
        self._given_up.add(child.spec.name)
        kind = child.spec.kind
        peers = {spec.name for spec in self._helpers if spec.kind == kind}
        if kind in self._required and peers <= self._given_up:
            self._say(f"no {kind} process is left: the run ends; mend the fault and resume it")
            self._failed = True
            self._kill(self._learner.name)

    def _obituary(self, child: Child, status: int) -> str:
        return (
            f"{child.spec.name} ended with {describe_status(status)}; {child.log} says:\n"
            f"{child.last_words()}"
        )

    async def _watch_signals(
        self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                self._interrupts += 1
                learner = self._alive.get(self._learner.name)
                if self._interrupts == 1:
                    self._say("stopping after this step, with a checkpoint; Ctrl-C again: at once")
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


@contextmanager
def awake() -> Generator[None]:
    """Keep a Mac from sleeping while the block runs; nothing elsewhere."""
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
