"""The bridge between a main thread and its I/O thread: two bounded queues.

    main thread  ── put ──▶ [ to_io ] ── aget ──▶  I/O thread
                 ◀── get ── [ from_io ] ◀── aput ──

The main side blocks (`put`, `get`), the I/O side is asynchronous (`aput`, `aget`). When either side
ends or raises, both queues close: items already queued can still be taken, then the other side
raises the exception, or `BridgeClosed` after a normal end. So nothing waits for a dead thread.
Items are handed over by reference and must not be MLX arrays.

A main thread with several I/O threads makes their bridges among one `Bridges`, and waits for all of
them at once.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import anyio

from protocol.errors import PippinError, only_leaf

BOUND = 256
GRACE_S = 5.0

ToIo = TypeVar("ToIo")
FromIo = TypeVar("FromIo")


class BridgeClosed(PippinError):
    """The other side of the bridge has ended."""


class Bridges:
    """The bridges of one main thread, which share a condition, so that it can wait for any."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.members: list[Bridge[Any, Any]] = []

    def wait(self, timeout_s: float) -> bool:
        """Wait until a bridge has news; return False if none has within `timeout_s`."""
        with self.changed:
            return self.changed.wait_for(
                lambda: any(bridge.has_news() for bridge in self.members), timeout_s
            )


class Bridge(Generic[ToIo, FromIo]):
    """Two queues of at most `bound` items; a full one unblocks when the other side takes an item.

    Start, use and close it from one main thread; as a context manager it closes itself. `among`:
    the bridges that the thread waits for together.
    """

    def __init__(self, *, bound: int = BOUND, among: Bridges | None = None) -> None:
        self._bound = bound
        self._to_io: deque[ToIo] = deque()
        self._from_io: deque[FromIo] = deque()
        self._changed = threading.Condition() if among is None else among.changed
        self._main_ended = False
        self._io_ended = False
        self._main_error: BaseException | None = None
        self._io_error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scope: anyio.CancelScope | None = None
        self._wake_io = anyio.Event()
        if among is not None:
            among.members.append(self)

    # ---- the main thread's side --------------------------------------------------------------

    def start(
        self, async_main: Callable[["Bridge[ToIo, FromIo]"], Awaitable[None]], name: str = "io"
    ) -> None:
        """Start the I/O thread, which runs `async_main(bridge)` on asyncio."""
        self._thread = threading.Thread(
            target=self._run_thread, args=(async_main,), name=name, daemon=True
        )
        self._thread.start()

    def put(self, item: ToIo, timeout_s: float | None = None) -> bool:
        """Queue `item` for the I/O side, waiting at most `timeout_s` for room (None: forever).

        Return False if there was none. Raise the I/O side's exception, or `BridgeClosed`.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._io_ended or self._main_ended or len(self._to_io) < self._bound,
                timeout_s,
            )
            self._raise_if_ended()
            if len(self._to_io) >= self._bound:
                return False
            self._to_io.append(item)
        self._call_io(self._wake)
        return True

    def get(self, timeout_s: float | None = 0.0) -> FromIo | None:
        """Take the I/O side's next item, waiting at most `timeout_s` for it (None: forever).

        Return None if none came. When the queue is empty and the I/O side has ended, raise its
        exception, or `BridgeClosed`.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._io_ended or self._main_ended or bool(self._from_io), timeout_s
            )
            if self._from_io:
                item = self._from_io.popleft()
            else:
                self._raise_if_ended()
                return None
        self._call_io(self._wake)
        return item

    def has_news(self) -> bool:
        """Whether `get` would return an item, or raise, without waiting."""
        with self._changed:
            return bool(self._from_io) or self._io_ended or self._main_ended

    def close(self, error: BaseException | None = None, *, grace_s: float = GRACE_S) -> None:
        """End the main side and wait for the I/O thread.

        The I/O side can take what is queued and then sees the end; after `grace_s` it is
        cancelled. Raise the I/O side's exception, if it had one and `error` is None.
        """
        with self._changed:
            seen = self._main_ended
            self._main_ended, self._main_error = True, self._main_error or error
            self._changed.notify_all()
        self._call_io(self._wake)

        if self._thread is not None:
            self._thread.join(grace_s)
            if self._thread.is_alive():
                self._call_io(self._cancel)
                self._thread.join(grace_s)

        if error is None and not seen and self._io_error is not None:
            raise self._io_error

    def __enter__(self) -> Self:
        """Return the bridge, which the caller has yet to start."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close, passing the exception on to the I/O side."""
        self.close(error)

    def _raise_if_ended(self) -> None:
        if self._io_error is not None:
            raise self._io_error
        if self._io_ended or self._main_ended:
            raise BridgeClosed("required a running I/O thread, got one that has ended")

    # ---- the I/O side ------------------------------------------------------------------------

    async def aput(self, item: FromIo) -> None:
        """Queue `item` for the main thread, waiting for room. Raises what `aget` raises."""
        while True:
            with self._changed:
                if self._main_ended:
                    raise self._main_end()
                if len(self._from_io) < self._bound:
                    self._from_io.append(item)
                    self._changed.notify_all()
                    return
                wake = self._wake_io
            await wake.wait()

    async def aget(self) -> ToIo:
        """Take the main thread's next item.

        When none is left and the main side has ended, raise `BridgeClosed` from its exception.
        """
        while True:
            with self._changed:
                if self._to_io:
                    item = self._to_io.popleft()
                    self._changed.notify_all()
                    return item
                if self._main_ended:
                    raise self._main_end()
                wake = self._wake_io
            await wake.wait()

    def _main_end(self) -> BridgeClosed:
        closed = BridgeClosed("required a running main thread, got one that has ended")
        closed.__cause__ = self._main_error
        return closed

    def _run_thread(self, async_main: Callable[["Bridge[ToIo, FromIo]"], Awaitable[None]]) -> None:
        error: BaseException | None = None
        try:
            anyio.run(self._run, async_main)
        except BaseException as raised:  # noqa: BLE001 (it is raised in the main thread)
            error = only_leaf(raised)
        with self._changed:
            self._io_ended = True
            if not (self._main_ended and isinstance(error, BridgeClosed)):
                self._io_error = error
            self._changed.notify_all()

    async def _run(self, async_main: Callable[["Bridge[ToIo, FromIo]"], Awaitable[None]]) -> None:
        with anyio.CancelScope() as scope:
            with self._changed:
                self._scope, self._loop = scope, asyncio.get_running_loop()
            self._wake()
            try:
                await async_main(self)
            finally:
                with self._changed:
                    self._loop = None

    def _wake(self) -> None:
        with self._changed:
            waking, self._wake_io = self._wake_io, anyio.Event()
        waking.set()

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    def _call_io(self, function: Callable[[], None]) -> None:
        with self._changed:  # the loop ends only after `_loop` is cleared under this lock
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function)
