"""How the two learner programs, learn.py and collect.py, begin, report and end."""

import argparse
import logging
import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from launch.processes.blas import bound_lookahead
from launch.processes.exit_status import FAILED, FINISHED, NO_RESTART, STOPPED
from launch.processes.start import STOP_TIMEOUT_S, Lifeline, start_process
from protocol.errors import ChannelError, LedgerError, PippinError
from protocol.run_record import (
    EVENT_LOGGER,
    Fault,
    Notice,
    State,
    append_events,
    change_state,
    record_event,
)
from protocol.transport.bridge import BridgeClosed

log = logging.getLogger("pippin.learner")
ROWS_LOGGER = "pippin.data.rows"  # messages about single dataset rows
UNWRITTEN = 64  # messages kept while the disk is full
SHOWN_ROWS = 5  # of those, how many are shown in a row; the log has all of them

# Errors of ours that a restart may cure: an address still in use, a bug of ours in rare timing.
PASSING = (ChannelError, LedgerError, BridgeClosed)

Work = Callable[[argparse.Namespace, Lifeline], State]


class NoticeHandler(logging.Handler):
    """Appends INFO and WARNING messages to the run's events; errors become a Fault elsewhere.

    `log_file` holds all messages, and is named where some are left out.
    """

    def __init__(self, folder: Path, log_file: str) -> None:
        super().__init__(logging.INFO)
        self._folder = folder
        self._log_file = log_file
        self._rows = 0
        self._unwritten: deque[Notice] = deque(maxlen=UNWRITTEN)

    def emit(self, record: logging.LogRecord) -> None:
        """Append the message, unless it is an event's own or one of too many about rows."""
        if record.name == EVENT_LOGGER or record.levelno >= logging.ERROR:
            return

        text = record.getMessage()
        self._rows = self._rows + 1 if record.name == ROWS_LOGGER else 0
        if self._rows > SHOWN_ROWS + 1:
            return
        if self._rows == SHOWN_ROWS + 1:
            text = f"    … all of them: {self._log_file}"

        level = "warning" if record.levelno >= logging.WARNING else "info"
        self._unwritten.append(Notice(level=level, message=text))
        # On a full disk, with the next message; until then they are in the log.
        with suppress(OSError):
            append_events(self._folder, self._unwritten)
            self._unwritten.clear()


def arguments(description: str | None) -> argparse.Namespace:
    """Read the command line: the run folder, and the endpoints of a run with actors."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--endpoint", action="append", default=[], help="where actors connect")
    parser.add_argument("--snapshots", default="", help="where snapshots are served")
    parser.add_argument(
        "--rewards", action="append", default=[], help="a service's endpoints, joined by commas"
    )
    parser.add_argument("--colocate", action="store_true", help="sample in this process, too")
    parser.add_argument("--child", action="store_true", help="end when standard input closes")
    parser.add_argument(
        "--stop-timeout-s",
        type=float,
        default=STOP_TIMEOUT_S,
        metavar="S",
        help="with --child: seconds to save and end when standard input closes",
    )
    return parser.parse_args()


def run_learner(name: str, description: str | None, work: Work) -> NoReturn:
    """Do the work, record how it ended, and exit with a status of `exit_status.py`.

    `name` is that of the process's log; `work` returns the run's state at its end.
    """
    args = arguments(description)
    bound_lookahead()  # before MLX is imported
    lifeline = start_process(child=args.child, mlx=True, grace_s=args.stop_timeout_s)
    logging.getLogger().addHandler(NoticeHandler(args.run_dir, f"logs/{name}.log"))

    try:
        state = work(args, lifeline)
        change_state(args.run_dir, state)
        status = STOPPED if state == "stopped" else FINISHED
    except Exception as error:  # noqa: BLE001 - the process ends here, whatever it was
        status = _report_failure(args.run_dir, name, error)

    sys.stdout.flush()
    sys.stderr.flush()
    # After a failure, threads may still wait for what never comes.
    os._exit(status) if status in (FAILED, NO_RESTART) else sys.exit(status)


def _report_failure(folder: Path, name: str, error: Exception) -> int:
    """Log and record why the learner failed; return its exit status."""
    reason = f"{type(error).__name__}: {error}"
    expected = isinstance(error, PippinError | OSError)
    log.error("%s", reason, exc_info=None if expected else error)
    # The log's ending tells more about an error that nobody foresaw.
    if expected:
        record_event(folder, Fault(process=name, reason=reason))

    final = isinstance(error, PippinError) and not isinstance(error, PASSING)
    return NO_RESTART if final else FAILED
