"""What reward functions print, on its way into the server's log, which keeps the newest of it.

    worker ──pipe──▶ thread in the reward server ──▶ standard error: a log, a terminal, a pipe

A log that the launcher opened for appending and reading is shortened in place, because the launcher
and the server hold the same open file. Where standard error is anything else, all output goes
there.
"""

import fcntl
import logging
import os
import re
import stat
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress

LIMIT = 16 << 20  # bytes of a log, above which its oldest lines are dropped
KEPT = 9 << 20  # bytes that are left then
KEPT_AT_START = 8 << 20  # and before a process is started that appends to it: see `shorten`
_MARK = re.compile(rb"\[(\d+) bytes of earlier output were dropped here\]\n")
_BLOCK = 1 << 16


class Relay:
    """Copies a pipe to a descriptor on a daemon thread, until all that write to it have ended."""

    def __init__(self, source: int, sink: int, *, limit: int = LIMIT, kept: int = KEPT) -> None:
        self._source = source
        self._sink = sink
        self._kept = kept
        self._limit = limit if _is_log(sink) else None
        self._thread = threading.Thread(target=self._copy, name="printed", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Wait until all is copied, at most `timeout_s`: a process that escaped may write on."""
        self._thread.join(timeout_s)

    def _copy(self) -> None:
        held = b""
        while data := os.read(self._source, _BLOCK):
            # In a log, what this process says itself begins a line of its own.
            data = held + data
            whole = data.rfind(b"\n") + 1
            end = whole if self._limit is not None and (whole or len(data) < _BLOCK) else len(data)
            held = data[end:]
            self._pass_on(data[:end])
        self._pass_on(held + b"\n" if held else b"")
        os.close(self._source)

    def _pass_on(self, data: bytes) -> None:
        # A full disk or closed terminal costs what was printed, never the functions.
        with suppress(OSError):
            _write(self._sink, data)
            if self._limit is not None and os.fstat(self._sink).st_size > self._limit:
                with _nobody_logs():
                    shorten(self._sink, self._kept)


@contextmanager
def _nobody_logs() -> Generator[None]:
    """Keep this process's own messages waiting: one that came meanwhile would be lost."""
    with ExitStack() as stack:
        for handler in logging.getLogger().handlers:
            handler.acquire()
            stack.callback(handler.release)
        yield


def shorten(log: int, kept: int) -> None:
    """Leave about the newest `kept` bytes of a log, whole lines, and say how much was dropped.

    `log` is open for appending and reading. Nothing happens to a log that is not longer.
    """
    size = os.fstat(log).st_size
    if size <= kept:
        return

    newest = os.pread(log, kept, size - kept)
    newest = newest[newest.find(b"\n", 0, _BLOCK) + 1 :]  # a line may be of any length
    mark = _MARK.match(os.pread(log, 128, 0))
    dropped = size - len(newest) + (int(mark[1]) - len(mark[0]) if mark else 0)

    os.ftruncate(log, 0)
    _write(log, b"[%d bytes of earlier output were dropped here]\n" % dropped + newest)


def _is_log(descriptor: int) -> bool:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    ours = flags & os.O_APPEND and flags & os.O_ACCMODE == os.O_RDWR
    return bool(ours) and stat.S_ISREG(os.fstat(descriptor).st_mode)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
