"""What a run cannot do without waits for a full disk; a disk that stays full ends the run."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from protocol.errors import DiskError, PippinError

log = logging.getLogger("pippin.learner")

RETRY_S = 0.5
PATIENCE_S = 60.0
T = TypeVar("T")


class DiskWait:
    """One wait for a disk that does not take `what`; `patience_s` is its length in seconds.

    The caller tries again every `RETRY_S`, and tells of each attempt.
    """

    def __init__(self, what: str, patience_s: float = PATIENCE_S) -> None:
        self._what = what
        self._patience_s = patience_s
        self._deadline: float | None = None

    def refused(self, error: Exception) -> None:
        """Note a refusal: warn of the first one. Raises DiskError after the last."""
        now, reason = time.monotonic(), str(error).rstrip(".")
        if self._deadline is None:
            self._deadline = now + self._patience_s
            log.warning(
                "%s cannot be written: %s. The run waits; free space within %g s, or it ends",
                self._what,
                reason,
                self._patience_s,
            )
        if now > self._deadline:
            raise DiskError(
                f"{self._what} could not be written for {self._patience_s:g} s: {reason}. What was "
                "acknowledged is in the journal; free space, then continue with --run.resume"
            ) from error

    def taken(self) -> None:
        """Note a success: say so after a refusal."""
        if self._deadline is not None:
            log.warning("%s can be written again", self._what)


def write_patiently(write: Callable[[], T], what: str) -> T:
    """Return what `write` returns; while the disk refuses `what`, try again.

    `write` leaves nothing behind when it fails. Raises DiskError if the disk stays full, and at
    once whatever else `write` raises.
    """
    wait = DiskWait(what)
    while True:
        try:
            written = write()
        except (OSError, PippinError) as error:
            if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
                raise
            wait.refused(error)
            time.sleep(RETRY_S)
        else:
            wait.taken()
            return written
