"""The supervisor with real processes: restarts, a failing learner, both Ctrl-Cs, a dead launcher.

Children write a line to a FIFO when they are ready and hold it open while they live, so its end
says that all are gone.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.run_record import AnyEvent, Fault, Restart, parse_events

# The n-th process of a name behaves in the n-th way of `ways`, later ones in the last.
CHILD = """
import logging, os, sys, time
from pathlib import Path
from launch.processes.exit_status import NO_RESTART
from launch.processes.start import Lifeline, start_log
from protocol.run_record import Fault, StateChanged, WorkDone, record_event

fifo, name, ways = sys.argv[1:]
folder = Path(fifo).parent
with (folder / f"{name}.starts").open("a") as file:
    file.write("x")
started = len((folder / f"{name}.starts").read_text())
how = ways.split(",")[:started][-1]
start_log()

if how == "fails":
    print("\\n".join(f"line {i}" for i in range(30)), flush=True)
    sys.exit(7)
if how == "leaves":
    sys.exit(0)
if how in ("explains", "cannot"):
    if how == "cannot":
        record_event(folder, StateChanged(state="running"))
    print("line of the log", flush=True)
    record_event(folder, Fault(process=name, reason="ConfigError: required this, got that"))
    sys.exit(NO_RESTART)

lifeline = Lifeline(child=True, grace_s=0.2 if how == "stubborn" else 10)
if name == "learner":
    record_event(folder, StateChanged(state="running"))
if how.startswith("step"):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {how[4:]}}}\\n')
    how = "crashes"
if how == "crashes":
    logging.getLogger("pippin").error("MemoryError: too much")
    sys.exit(1)

out = os.open(fifo, os.O_WRONLY)
os.write(out, f"{name} {os.getpid()}\\n".encode())
if how == "dismisses":
    record_event(folder, WorkDone())
    (folder / "dismissed").touch()
    while not (folder / "actor").exists():
        time.sleep(0.01)
    actor = int((folder / "actor").read_text())
    try:
        while True:  # until the launcher has taken note of its end
            os.kill(actor, 0)
            time.sleep(0.01)
    except ProcessLookupError:
        sys.exit(1)
if how == "finishes":
    while not (folder / "finish").exists():
        time.sleep(0.01)
    sys.exit(0)
if how == "obeys":
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "pid").rename(folder / "actor")
    while not (folder / "dismissed").exists():
        time.sleep(0.01)
    sys.exit(0)
lifeline.wait()
(folder / f"{name}.stopped").touch()
if how == "stubborn":
    import ctypes
    ctypes.PyDLL(None).pause()  # holds the GIL
if how == "dies":
    os.abort()
sys.exit(130 if name == "learner" else 0)
"""

LAUNCHER = """
import sys
from pathlib import Path
import anyio
from launch.processes.children import ChildSpec, Processes
from launch.processes.restarts import RestartLimit
from launch.processes.supervisor import Supervisor
folder, learner, actor, backoff_s = sys.argv[1:]
def spec(name, kind, how):
    command = [sys.executable, f"{folder}/child.py", f"{folder}/fifo", name, how]
    return ChildSpec(name, kind, command, RestartLimit(2))
helpers = [spec("actor-0", "actor", actor)]
required = frozenset({"actor"})
stop_timeout_s = 0.1 if learner == "stubborn" else 60.0
processes = Processes(
    spec("learner", "learner", learner), helpers, required, stop_timeout_s=stop_timeout_s
)
supervisor = Supervisor(
    Path(folder), processes, say=lambda text: print(text, flush=True), backoff_s=float(backoff_s)
)
sys.exit(anyio.run(supervisor.run))
"""


class Launched:
    """A launcher process and the FIFO of its children."""

    def __init__(self, folder: Path, learner: str, actor: str, backoff_s: float = 0.01) -> None:
        (folder / "child.py").write_text(CHILD)
        (folder / "launcher.py").write_text(LAUNCHER)
        os.mkfifo(folder / "fifo")
        # Held from the beginning, so that no child waits for a reader.
        descriptor = os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
        self.fifo = os.fdopen(descriptor)
        command = [sys.executable, str(folder / "launcher.py"), str(folder), learner, actor]
        command.append(str(backoff_s))
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.folder = folder

    def ready(self) -> tuple[str, int]:
        """Wait for the next child; return its name and process id."""
        while not (line := self.fifo.readline()):
            time.sleep(0.01)  # no child holds it at the moment
        name, pid = line.split()
        return name, int(pid)

    def heard(self, words: str) -> str:
        """Read what the launcher says up to a line with `words`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if words in line:
                return line
        raise AssertionError(f"the launcher ended without saying {words!r}")

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """Send a signal to the launcher."""
        self.process.send_signal(number)

    def events(self) -> list[AnyEvent]:
        """Return the faults and restarts that were recorded."""
        events = parse_events((self.folder / "events.jsonl").read_bytes())
        return [event for event in events if isinstance(event, Fault | Restart)]

    def said(self) -> list[str]:
        """Return the first line of each fault and restart that was recorded."""
        return [event.text.partition("\n")[0] for event in self.events()]

    def starts(self, name: str) -> int:
        """Return how many times a child was started."""
        return len((self.folder / f"{name}.starts").read_text())

    def close(self) -> None:
        """End what is left."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.fifo.close()


@pytest.fixture
def launched(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launched]:
    run = Launched(tmp_path, *request.param)
    yield run
    run.close()


@pytest.mark.parametrize("launched", [("works", "works")], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_actor_that_is_killed_is_started_again_and_a_signal_stops_cleanly(
    launched: Launched, number: signal.Signals
):
    pids = dict([launched.ready(), launched.ready()])
    os.kill(pids["actor-0"], signal.SIGKILL)
    assert "actor-0 ended with SIGKILL; restart 1 of 2" in launched.heard("restart")
    name, again = launched.ready()
    assert name == "actor-0"
    assert again != pids["actor-0"]
    launched.interrupt(number)
    assert launched.process.wait() == 130
    assert launched.fifo.read() == ""
    (restart,) = launched.events()
    assert isinstance(restart, Restart)
    assert (restart.process, restart.reason, restart.attempt) == ("actor-0", "SIGKILL", 1)


@pytest.mark.parametrize("launched", [("works", "works")], indirect=True)
def test_a_learner_that_is_killed_is_started_again_while_its_actor_stays(launched: Launched):
    pids = dict([launched.ready(), launched.ready()])
    os.kill(pids["learner"], signal.SIGKILL)
    assert launched.heard("restart") == "learner ended with SIGKILL; restart 1 of 2 in 0.01 s\n"
    name, again = launched.ready()
    assert name == "learner"
    assert again != pids["learner"]
    os.kill(pids["actor-0"], 0)
    launched.interrupt()
    assert launched.process.wait() == 130
    assert launched.fifo.read() == ""
    assert launched.starts("actor-0") == 1


@pytest.mark.parametrize("launched", [("crashes", "works")], indirect=True)
def test_restarts_of_the_learner_are_bounded(launched: Launched):
    assert launched.process.wait(30) == 1
    reason = "learner ended with exit status 1 (MemoryError: too much)"
    given_up = "launcher: the learner is given up after 2 restarts within 3600 s"
    assert launched.said() == [
        f"{reason}; restart 1 of 2 in 0.01 s",
        f"{reason}; restart 2 of 2 in 0.02 s",
        f"learner: ended with exit status 1; {launched.folder}/logs/learner.log says:",
        f"{given_up}; fix the fault, and resume the run",
    ]


@pytest.mark.parametrize("launched", [("step1,step2,step2,step3", "works")], indirect=True)
def test_a_step_that_no_learner_had_reached_resets_the_delay(launched: Launched):
    assert launched.process.wait(30) == 1
    delays = [event.delay_s for event in launched.events() if isinstance(event, Restart)]
    assert delays == [0.01, 0.01]
    assert launched.starts("learner") == 3


@pytest.mark.parametrize("launched", [("crashes,cannot", "works")], indirect=True)
def test_a_learner_that_cannot_be_helped_is_not_restarted(launched: Launched):
    assert launched.process.wait(30) == 1
    assert launched.said()[1:] == ["learner: ConfigError: required this, got that"]
    assert launched.starts("learner") == 2


@pytest.mark.parametrize("launched", [("fails", "works")], indirect=True)
def test_a_learner_that_was_never_ready_fails_the_run_and_shows_its_last_lines(launched: Launched):
    launched.heard("learner: ended with exit status 7; ")
    assert launched.heard("line").strip() == "line 10"
    launched.heard("line 29")
    assert launched.process.wait() == 1
    (fault,) = launched.events()
    assert isinstance(fault, Fault)
    assert fault.process == "learner"
    assert fault.reason.endswith("line 28\nline 29")
    # The end of the pipe: the actor is gone too, whether or not it had come to its work.
    assert "learner" not in launched.fifo.read()


@pytest.mark.parametrize("launched", [("explains", "works")], indirect=True)
def test_the_reason_that_a_learner_recorded_is_shown_once_instead_of_its_log(launched: Launched):
    output, _ = launched.process.communicate(timeout=30)
    assert output == "learner: ConfigError: required this, got that\n"
    assert launched.process.returncode == 1
    assert [event.text for event in launched.events()] == [output.strip()]


@pytest.mark.parametrize("launched", [("works", "leaves,works")], indirect=True)
def test_an_actor_that_leaves_although_nobody_asked_it_is_replaced(launched: Launched):
    assert dict([launched.ready(), launched.ready()]).keys() == {"learner", "actor-0"}
    launched.interrupt()
    assert launched.process.wait() == 130
    assert launched.said() == ["actor-0 ended with exit status 0; restart 1 of 2 in 0.01 s"]


@pytest.mark.parametrize("launched", [("dismisses,works", "obeys,works")], indirect=True)
def test_an_actor_that_was_dismissed_comes_back_only_with_another_learner(launched: Launched):
    launched.ready()
    launched.ready()
    assert {launched.ready()[0], launched.ready()[0]} == {"learner", "actor-0"}
    launched.interrupt()
    assert launched.process.wait() == 130
    (restart,) = launched.events()
    assert isinstance(restart, Restart)
    assert restart.process == "learner"


@pytest.mark.parametrize("launched", [("works", "fails")], indirect=True)
def test_without_actors_the_learner_is_asked_to_stop_and_the_run_fails(launched: Launched):
    launched.heard("restart 2 of 2 in 0.02 s")
    launched.heard("actor-0: ended with exit status 7; ")
    launched.heard("no actor process is left")
    assert launched.process.wait() == 1
    kinds = [type(event).__name__ for event in launched.events()]
    assert kinds == ["Restart", "Restart", "Fault", "Fault"]


@pytest.mark.parametrize("launched", [("stubborn", "fails")], indirect=True)
def test_a_learner_without_actors_that_does_not_stop_is_killed(launched: Launched):
    assert launched.process.wait(30) == 1
    assert launched.said()[-1] == "learner: has not stopped within 0.1 s: killed"


@pytest.mark.parametrize("launched", [("crashes", "fails", 1000.0)], indirect=True)
def test_a_signal_ends_a_run_whose_processes_all_wait_for_their_restart(launched: Launched):
    launched.heard("restart")
    launched.heard("restart")
    launched.interrupt()
    assert launched.process.wait(30) == 130
    assert (launched.starts("learner"), launched.starts("actor-0")) == (1, 1)


@pytest.mark.parametrize("launched", [("finishes", "fails", 1000.0)], indirect=True)
def test_the_end_of_a_run_does_not_wait_for_the_restart_of_an_actor(launched: Launched):
    launched.heard("restart 1 of 2 in 1000 s")
    (launched.folder / "finish").touch()
    assert launched.process.wait(30) == 0
    assert launched.starts("actor-0") == 1


@pytest.mark.parametrize("launched", [("dies", "works")], indirect=True)
def test_a_learner_that_dies_while_it_stops_is_not_restarted(launched: Launched):
    launched.ready()
    launched.ready()
    launched.interrupt()
    assert launched.process.wait() == 1
    (fault,) = launched.said()
    assert fault.startswith("learner: ended with SIGABRT; ")


@pytest.mark.parametrize("launched", [("stubborn", "works")], indirect=True)
def test_the_second_ctrl_c_ends_everything_at_once(launched: Launched):
    launched.ready()
    launched.ready()
    launched.interrupt()
    launched.heard("Ctrl-C again")
    launched.interrupt()
    assert launched.process.wait() == 130
    assert launched.fifo.read() == ""


@pytest.mark.parametrize("launched", [("works", "works")], indirect=True)
def test_an_error_of_the_launcher_leaves_the_learner_time_to_save(launched: Launched):
    pids = dict([launched.ready(), launched.ready()])
    assert launched.process.stdout is not None
    launched.process.stdout.close()  # so that the next message cannot be shown
    os.kill(pids["actor-0"], signal.SIGKILL)
    assert launched.process.wait() == 1
    assert (launched.folder / "learner.stopped").exists()
    assert launched.fifo.read() == ""


@pytest.mark.parametrize("launched", [("works", "works"), ("works", "stubborn")], indirect=True)
def test_children_end_when_the_launcher_is_killed_even_those_that_do_not_stop(launched: Launched):
    launched.ready()
    launched.ready()
    launched.process.kill()
    assert launched.fifo.read() == ""
