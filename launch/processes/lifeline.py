"""A child process's tie to its launcher: standard input.

A line on it is a request to stop cleanly; its end (the launcher died, even by SIGKILL) is one too,
and after `GRACE_S` the process ends itself. SIGINT is left to the launcher.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable

GRACE_S = 20.0


class Lifeline:
    """Watches standard input on a daemon thread if `child`; otherwise only holds the request."""

    def __init__(self, *, child: bool, on_stop: Callable[[], None] | None = None) -> None:
        self._stop = threading.Event()
        self._on_stop = on_stop
        if child:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    @property
    def stop_requested(self) -> bool:
        """Whether the launcher asked to stop, or is gone."""
        return self._stop.is_set()

    def request_stop(self) -> None:
        """Ask for a clean stop."""
        if not self._stop.is_set():
            self._stop.set()
            if self._on_stop is not None:
                self._on_stop()

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
