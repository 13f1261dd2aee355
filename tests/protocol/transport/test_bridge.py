"""The bridge: order, bounds, and the end or exception of either side."""

import threading

import anyio
import pytest

from protocol.errors import RefusedError
from protocol.transport.bridge import Bridge, BridgeClosed, Bridges


async def echo(bridge):
    while True:
        await bridge.aput(await bridge.aget() * 2)


def test_items_cross_in_order_both_ways():
    with Bridge(bound=4) as bridge:
        bridge.start(echo)
        got = []
        for number in range(100):
            assert bridge.put(number, timeout_s=5)
            got.append(bridge.get(timeout_s=5))
    assert got == [2 * number for number in range(100)]


def test_queues_are_bounded_and_waits_end():
    release = threading.Event()

    async def deaf(bridge):
        await anyio.to_thread.run_sync(release.wait)
        assert [await bridge.aget() for _ in range(3)] == [0, 1, 2]

    with Bridge(bound=2) as bridge:
        bridge.start(deaf)
        assert bridge.get() is None
        assert bridge.put(0)
        assert bridge.put(1)
        assert not bridge.put(2, timeout_s=0)
        assert not bridge.put(2, timeout_s=0.01)
        release.set()
        assert bridge.put(2, timeout_s=5)


def test_the_io_side_waits_for_room():
    async def producer(bridge):
        for number in range(50):
            await bridge.aput(number)

    with Bridge(bound=2) as bridge:
        bridge.start(producer)
        assert [bridge.get(timeout_s=5) for _ in range(50)] == list(range(50))
        with pytest.raises(BridgeClosed):
            bridge.get(timeout_s=None)


def test_the_io_sides_exception_comes_after_its_items():
    async def failing(bridge):
        await bridge.aput("last words")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            raise RefusedError("another model")

    bridge = Bridge()
    bridge.start(failing)
    assert bridge.get(timeout_s=5) == "last words"
    with pytest.raises(RefusedError, match="another model"):
        bridge.get(timeout_s=None)
    with pytest.raises(RefusedError):
        bridge.put("x", timeout_s=None)
    with pytest.raises(RefusedError):
        bridge.close()
    bridge.close()


def test_a_put_that_waits_sees_the_io_sides_end():
    ending = threading.Event()

    async def ends(bridge):
        await anyio.to_thread.run_sync(ending.wait)

    with Bridge(bound=1) as bridge:
        bridge.start(ends)
        bridge.put(1)
        threading.Timer(0.05, ending.set).start()
        with pytest.raises(BridgeClosed):
            bridge.put(2, timeout_s=None)


def test_the_main_sides_exception_reaches_the_io_side_after_its_items():
    seen = []

    async def listener(bridge):
        try:
            while True:
                seen.append(await bridge.aget())
        except BridgeClosed as closed:
            seen.append(closed.__cause__)
            raise

    problem = ValueError("main")

    def body():
        with Bridge() as bridge:
            bridge.start(listener)
            bridge.put("item")
            raise problem

    with pytest.raises(ValueError, match="main"):
        body()
    assert seen == ["item", problem]


def test_an_io_side_that_does_not_listen_is_cancelled():
    cancelled = threading.Event()

    async def elsewhere(bridge):
        await bridge.aput("up")
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    bridge = Bridge()
    bridge.start(elsewhere)
    assert bridge.get(timeout_s=5) == "up"
    bridge.close(grace_s=0.05)
    assert cancelled.wait(5)
    with pytest.raises(BridgeClosed):
        bridge.put("late")


def test_several_exceptions_stay_a_group():
    async def failing(_):
        async with anyio.create_task_group() as tasks:
            for kind in (KeyError, ValueError):
                tasks.start_soon(_raise, kind)

    bridge = Bridge()
    bridge.start(failing)
    with pytest.raises(ExceptionGroup) as caught:
        bridge.get(timeout_s=None)
    assert {type(error) for error in caught.value.exceptions} == {KeyError, ValueError}


async def _raise(kind):
    raise kind("x")


def test_one_thread_waits_for_several_bridges():
    both = Bridges()
    with Bridge(among=both) as first, Bridge(among=both) as second:
        first.start(echo)
        second.start(echo)
        assert not both.wait(0.01)
        for bridge, other in ((first, second), (second, first)):
            bridge.put(21)
            assert both.wait(5)
            assert not other.has_news()
            assert bridge.get() == 42
        assert not both.wait(0)


def test_the_end_of_one_io_thread_ends_the_wait_for_all():
    async def failing(bridge):
        await bridge.aget()
        raise RefusedError("another model")

    both = Bridges()
    with Bridge(among=both) as first:
        first.start(echo)
        second = Bridge(among=both)
        second.start(failing)
        second.put("go on")
        assert both.wait(5)
        with pytest.raises(RefusedError, match="another model"):
            second.get()
        assert first.get() is None
