"""What every process of a run does first: its log, its lifeline, and what MLX needs before it."""

import logging
import signal
import sys
from types import FrameType

from launch.processes.blas import HINT, load_openblas
from launch.processes.lifeline import Lifeline

OUR_LOGGERS = ("pippin", "protocol", "actors", "learner", "launch")  # their names begin with these


def start_process(*, child: bool, mlx: bool) -> Lifeline:
    """Start the log and return the lifeline; SIGTERM asks for a clean stop, too.

    `child`: the launcher holds standard input. `mlx`: `mlx.core` is going to be imported.
    """
    start_log()
    lifeline = Lifeline(child=child)

    def stop(_number: int, _frame: FrameType | None) -> None:
        lifeline.request_stop()

    signal.signal(signal.SIGTERM, stop)
    if mlx and not load_openblas():
        logging.getLogger("pippin").info(HINT)
    return lifeline


def start_log() -> None:
    """Log to stderr: our own messages from INFO on, those of libraries from WARNING on."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
