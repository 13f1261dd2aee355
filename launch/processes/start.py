"""What every process of a run does first: its log, its lifeline, and what MLX needs before it."""

import logging
import os
import signal
import sys
import threading

from launch.processes.blas import prepare_mlx
from launch.processes.open_files import keep_open_files

OUR_LOGGERS = ("pippin", "protocol", "actors", "learner", "launch")  # their names begin with these
GRACE_S = 20.0


class Lifeline:
    """A child process's tie to its launcher: standard input, watched on a daemon thread.

    A line on it asks the child to stop cleanly. So does its end, which means that the launcher
    died, even by SIGKILL; the process then ends itself after `GRACE_S`. SIGINT is left to the
    launcher. Without `child`, this only holds the request.
    """

    def __init__(self, *, child: bool) -> None:
        self._stop = threading.Event()
        if child:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
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

        self.request_stop()
        timer = threading.Timer(GRACE_S, os._exit, args=(1,))
        timer.daemon = True
        timer.start()


def start_process(*, child: bool, mlx: bool) -> Lifeline:
    """Start the log, raise the limit on open files, return the lifeline.

    SIGTERM asks for a clean stop, too.

    `child`: the launcher holds standard input. `mlx`: `mlx.core` is going to be imported.
    """
    start_log()
    keep_open_files()
    lifeline = Lifeline(child=child)

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
