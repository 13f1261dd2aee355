"""A child process's tie to its launcher: standard input.

A line on it asks the child to stop cleanly. So does its end, which means that the launcher died,
even by SIGKILL; the process then ends itself after `GRACE_S`. SIGINT is left to the launcher.
"""

import os
import signal
import sys
import threading

GRACE_S = 20.0


class Lifeline:
    """Watches standard input on a daemon thread if `child`; otherwise only holds the request."""

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
