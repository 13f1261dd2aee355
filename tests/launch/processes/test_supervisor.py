"""The supervisor with real processes: restarts, a failing learner, both Ctrl-Cs, a dead launcher.

Children write a line to a FIFO when they are ready and hold it open while they live, so its end
says that all are gone.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from protocol.run_record import AnyEvent, Fault, Restart, parse_events

CHILD = """
import os, sys
from launch.processes.start import Lifeline
fifo, name, how = sys.argv[1:]
if how == "fails":
    print("\\n".join(f"line {i}" for i in range(30)), flush=True)
    sys.exit(7)
if how == "explains":
    from pathlib import Path
    from protocol.run_record import Fault, record_event
    print("line of the log", flush=True)
    reason = "ConfigError: required this, got that"
    record_event(Path(fifo).parent, Fault(process=name, reason=reason))
    sys.exit(1)
lifeline = Lifeline(child=True)
out = os.open(fifo, os.O_WRONLY)
os.write(out, f"{name} {os.getpid()}\\n".encode())
lifeline.wait()
if how == "stubborn":
    import threading
    threading.Event().wait()
"""

LAUNCHER = """
import sys
from pathlib import Path
import anyio
from launch.processes.children import ChildSpec, Processes
from launch.processes.supervisor import Supervisor
folder, learner, actor = sys.argv[1:]
def spec(name, kind, how, restarts=0):
    command = [sys.executable, f"{folder}/child.py", f"{folder}/fifo", name, how]
    return ChildSpec(name, kind, command, restarts)
helpers = [spec("actor-0", "actor", actor, 2)]
processes = Processes(spec("learner", "learner", learner), helpers, frozenset({"actor"}))
supervisor = Supervisor(
    Path(folder), processes, say=lambda text: print(text, flush=True), backoff_s=0.01
)
sys.exit(anyio.run(supervisor.run))
"""


class Launched:
    """A launcher process and the FIFO of its children."""

    def __init__(self, folder: Path, learner: str, actor: str) -> None:
        (folder / "child.py").write_text(CHILD)
        (folder / "launcher.py").write_text(LAUNCHER)
        os.mkfifo(folder / "fifo")
        command = [sys.executable, str(folder / "launcher.py"), str(folder), learner, actor]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._fifo: IO[str] | None = None
        self._path = folder / "fifo"
        self._folder = folder

    @property
    def fifo(self) -> IO[str]:
        """The read end, opened when a child opens its own."""
        if self._fifo is None:
            self._fifo = self._path.open()
        return self._fifo

    def ready(self) -> tuple[str, int]:
        """Wait for the next child; return its name and process id."""
        name, pid = self.fifo.readline().split()
        return name, int(pid)

    def heard(self, words: str) -> str:
        """Read what the launcher says up to a line with `words`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if words in line:
                return line
        raise AssertionError(f"the launcher ended without saying {words!r}")

    def events(self) -> list[AnyEvent]:
        """Return the events that were recorded."""
        return parse_events((self._folder / "events.jsonl").read_bytes())

    def close(self) -> None:
        """End what is left."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self._fifo is not None:
            self._fifo.close()


@pytest.fixture
def launched(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launched]:
    run = Launched(tmp_path, *request.param)
    yield run
    run.close()


@pytest.mark.parametrize("launched", [("works", "works")], indirect=True)
def test_an_actor_that_is_killed_is_started_again_and_ctrl_c_stops_cleanly(launched: Launched):
    pids = dict([launched.ready(), launched.ready()])
    os.kill(pids["actor-0"], signal.SIGKILL)
    assert "actor-0 ended with SIGKILL; restart 1 of 2" in launched.heard("restart")
    name, again = launched.ready()
    assert name == "actor-0"
    assert again != pids["actor-0"]
    launched.process.send_signal(signal.SIGINT)
    assert launched.process.wait() == 0
    assert launched.fifo.read() == ""
    (restart,) = launched.events()
    assert isinstance(restart, Restart)
    assert (restart.process, restart.reason, restart.attempt) == ("actor-0", "SIGKILL", 1)


@pytest.mark.parametrize("launched", [("fails", "works")], indirect=True)
def test_a_failing_learner_fails_the_run_and_shows_its_last_lines(launched: Launched):
    launched.heard("learner: ended with exit status 7; ")
    assert launched.heard("line").strip() == "line 10"
    launched.heard("line 29")
    assert launched.process.wait() == 7
    (fault,) = launched.events()
    assert isinstance(fault, Fault)
    assert fault.process == "learner"
    assert fault.reason.endswith("line 28\nline 29")


@pytest.mark.parametrize("launched", [("explains", "works")], indirect=True)
def test_the_reason_that_a_learner_recorded_is_shown_once_instead_of_its_log(launched: Launched):
    output, _ = launched.process.communicate(timeout=30)
    assert output == "learner: ConfigError: required this, got that\n"
    assert launched.process.returncode == 1
    assert [event.text for event in launched.events()] == [output.strip()]


@pytest.mark.parametrize("launched", [("works", "fails")], indirect=True)
def test_restarts_are_bounded_and_a_run_without_actors_fails(launched: Launched):
    launched.heard("restart 2 of 2 in 0.02 s")
    launched.heard("actor-0: ended with exit status 7; ")
    launched.heard("no actor process is left")
    assert launched.process.wait() == 1
    kinds = [type(event).__name__ for event in launched.events()]
    assert kinds == ["Restart", "Restart", "Fault", "Fault"]


@pytest.mark.parametrize("launched", [("stubborn", "works")], indirect=True)
def test_the_second_ctrl_c_ends_everything_at_once(launched: Launched):
    launched.ready()
    launched.ready()
    launched.process.send_signal(signal.SIGINT)
    launched.heard("Ctrl-C again")
    launched.process.send_signal(signal.SIGINT)
    assert launched.process.wait() == 130
    assert launched.fifo.read() == ""


@pytest.mark.parametrize("launched", [("works", "works")], indirect=True)
def test_children_end_when_the_launcher_is_killed(launched: Launched):
    launched.ready()
    launched.ready()
    launched.process.kill()
    assert launched.fifo.read() == ""
