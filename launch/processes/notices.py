"""Passes the learner's log messages on to the user, as events of the run."""

import logging
from contextlib import suppress
from pathlib import Path

from protocol.run_record import EVENT_LOGGER, Notice, append_event

ROWS_LOGGER = "pippin.data.rows"  # messages about single dataset rows
SHOWN_ROWS = 5  # of those, shown one after another; the log has them all


class NoticeHandler(logging.Handler):
    """Appends INFO and WARNING messages to the run's events; errors become a Fault elsewhere.

    `log_file` holds all messages, and is named where some are left out.
    """

    def __init__(self, folder: Path, log_file: str) -> None:
        super().__init__(logging.INFO)
        self._folder = folder
        self._log_file = log_file
        self._rows = 0

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
        with suppress(OSError):  # a full disk; the message is in the log
            append_event(self._folder, Notice(level=level, message=text))
