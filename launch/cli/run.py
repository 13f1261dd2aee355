"""Sees a run through: its processes with the display, then the report and what to do next."""

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import anyio

from launch.cli.command_line import read_command_line
from launch.pages.followers import SINKS
from launch.pages.progress import Progress
from launch.pages.run_page import write_report
from launch.processes.blas import HINT, load_openblas
from launch.processes.children import Processes
from launch.processes.exit_status import FINISHED, STOPPED
from launch.processes.specs import offline_processes
from launch.processes.supervisor import Supervisor, awake
from launch.run_folder.resume import restore_settings
from protocol.config.settings import AnyRun, PreferenceRun, SftRun
from protocol.errors import PippinError
from protocol.run_record import State, change_state, read_run


def supervise(folder: Path, run: AnyRun, processes: Processes) -> int:
    """Run the processes to the end with the display, write the report, return the exit status."""
    if not load_openblas():
        sys.stderr.write(f"{HINT}\n")

    progress = Progress(folder, max_steps=run.train.max_steps)
    followers = [progress, *(sink(folder) for sink in SINKS)]

    def say(text: str) -> None:
        progress.update()  # first, what happened before
        progress.say(text)

    supervisor = Supervisor(
        folder,
        processes,
        say=say,
        companions=[follower.follow for follower in followers],
    )
    try:
        with awake(), ExitStack() as stack:
            for follower in followers:
                stack.enter_context(follower)
            status = anyio.run(supervisor.run)
    except KeyboardInterrupt:  # before the supervisor listened for it
        status = STOPPED

    step = saved_step(folder)
    ended_itself = read_run(folder).state in ("stopped", "finished")
    try:
        # A resume that was refused leaves the run as it was.
        if not restore_settings(folder):
            started = step is not None or (folder / "metrics.jsonl").exists()
            record_end(folder, status, started=started)
        if (folder / "metrics.jsonl").exists():
            sys.stdout.write(f"report:  {shown(write_report(folder))}\n")
    except OSError as error:  # a full disk does not change how the run ended
        sys.stdout.write(f"report:  not written: {error}\n")

    # A policy that has not trained yet is of no use.
    trained = status in (FINISHED, STOPPED) and ended_itself and bool(step)
    lines = what_next(folder, run, done=trained)
    if step is not None and status != FINISHED:
        lines.append(f"resume:  uv run {sys.argv[0]} --run.resume {shown(folder)}")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return status


def saved_step(folder: Path) -> int | None:
    """Return the step of a run's newest checkpoint, None without one."""
    found = (folder / "checkpoints").glob("step-*/state.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in found), default=None)


def record_end(folder: Path, status: int, *, started: bool) -> None:
    """Record the state of a run that its learner did not end itself; `started`: it did something.

    A run that failed before its first step leaves its name free.
    """
    if status == FINISHED:
        return
    ended: State = "stopped" if status == STOPPED else "failed"
    ended = ended if started else "failed_to_start"
    if read_run(folder).state != ended:
        change_state(folder, ended)


def shown(path: str | Path) -> str:
    """Write a path for a shell: relative if it lies in the current folder."""
    given = Path(path)
    inside = given.is_absolute() and given.is_relative_to(Path.cwd())
    return shlex.quote(str(given.relative_to(Path.cwd()) if inside else given))


def what_next(folder: Path, run: AnyRun, *, done: bool) -> list[str]:
    """Return lines that say where the run's weights are, and the commands that use them.

    Unless `done`, there are none to use.
    """
    if not done:
        return [f"logs:    {shown(folder / 'logs')}"]

    full = run.model.fine_tune_type == "full"
    weights = shown(folder / ("model" if full else "adapters"))
    model = f"--model {weights if full else shown(run.model.path)}"
    loaded = model if full else f"{model} --adapter-path {weights}"
    return [
        f"weights: {weights}",
        f"chat:    uv run mlx_lm.chat {loaded}",
        f'ask:     uv run mlx_lm.generate {loaded} --prompt "…"',
        f"export:  uv run launch/export.py {shown(folder)} OUT",
    ]


def run_offline(cls: type[PreferenceRun] | type[SftRun], argv: Sequence[str], usage: str) -> int:
    """Run launch/preference.py or launch/sft.py: the learner alone, supervised."""
    run, folder = read_command_line(cls, argv, usage)
    return supervise(folder, run, offline_processes(run, folder))


def main(body: Callable[[], int]) -> None:
    """Run a program's body and exit; a PippinError becomes one line on stderr and exit status 2."""
    try:
        status = body()
    except PippinError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        status = 2
    except KeyboardInterrupt:
        status = STOPPED
    raise SystemExit(status)
