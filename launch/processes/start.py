"""What a program of a run does first: its log, its lifeline, and what MLX needs before it."""

import logging
import signal
import sys

from launch.processes.blas import HINT, load_openblas
from launch.processes.lifeline import Lifeline

OURS = ("pippin", "protocol", "actors", "learner", "launch")  # what the names of loggers begin with


def begin(*, child: bool, mlx: bool) -> Lifeline:
    """Start the log and return the lifeline, which SIGTERM asks to stop too.

    `child`: the launcher holds standard input. `mlx`: `mlx.core` is imported later on.
    """
    start_log()
    lifeline = Lifeline(child=child)
    signal.signal(signal.SIGTERM, lambda *_: lifeline.request_stop())
    if mlx and not load_openblas():
        logging.getLogger("pippin").info(HINT)
    return lifeline


def start_log() -> None:
    """Write our own messages to stderr from INFO on, those of libraries from WARNING on."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    for ours in OURS:
        logging.getLogger(ours).setLevel(logging.INFO)
