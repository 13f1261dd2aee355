"""What every process of a run does first: its log, its lifeline, and what MLX needs before it."""

import logging
import os
import signal
import sys
import threading

from launch.processes.blas import prepare_mlx
from launch.processes.open_files import keep_open_files

OUR_LOGGERS = ("pippin", "protocol", "actors", "learner", "launch")  # their names begin with these
GRACE_S = 10.0  # for processes that have nothing to save
STOP_TIMEOUT_S = 300.0  # for the learner: a long step, and a checkpoint of all weights


class Lifeline:
    """A child process's tie to its launcher: standard input, watched on a daemon thread.

    A line on it asks the child to stop cleanly. So does its end, which means that the launcher
    died, even by SIGKILL; the system then ends the process after `grace_s`, whatever it is doing.
    SIGINT is left to the launcher. Without `child`, this only holds the request.
    """

    def __init__(self, *, child: bool, grace_s: float = GRACE_S) -> None:
        self._stop = threading.Event()
        self._grace_s = grace_s
        if child:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    @property
    def stop_requested(self) -> bool:
        """Whether the launcher asked to stop, or is gone."""
        return self._stop.is_set()

    def request_stop(self) -> None:
        """Ask for a clean stop."""
        self._stop.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the request; return whether it came."""
        return self._stop.wait(timeout_s)

    def _watch(self) -> None:
        descriptor = sys.stdin.fileno()
        while os.read(descriptor, 4096):
            self.request_stop()

        # Not a thread of ours, which would wait for whoever holds the interpreter's lock.
        signal.setitimer(signal.ITIMER_REAL, self._grace_s)
        self.request_stop()


def start_process(*, child: bool, mlx: bool, grace_s: float = GRACE_S) -> Lifeline:
    """Start the log, raise the limit on open files, return the lifeline.

    SIGTERM asks for a clean stop, too.

    `child`: the launcher holds standard input, and its end leaves this process `grace_s`. `mlx`:
    `mlx.core` is going to be imported.
    """
    start_log()
    keep_open_files()
    lifeline = Lifeline(child=child, grace_s=grace_s)

    def stop(*_: object) -> None:
        lifeline.request_stop()

    signal.signal(signal.SIGTERM, stop)
    if mlx:
        for advice in prepare_mlx():
            logging.getLogger("pippin").info(advice)
    return lifeline


def start_log() -> None:
    """Log to stderr: our own messages from INFO on, those of libraries from WARNING on."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
