"""Both ends of a memory channel: order, the bound, closing, and two threads at once."""

import threading

import anyio
import pytest

from protocol.messages.messages import Hello, Request, Stop
from protocol.transport.memory_channel import PEER, MemoryChannel

pytestmark = pytest.mark.anyio
HELLO = Hello(protocol_version=2, actor_id="a", actor_incarnation="i")


def request(number: int) -> Request:
    return Request(free_completions=number)


async def test_messages_arrive_in_order_as_the_same_objects():
    channel = MemoryChannel()
    async with channel.server as server, channel.client as client:
        asked = [HELLO, *(request(n) for n in range(5))]
        assert [client.send(message) for message in asked] == [True] * 6
        for message in asked:
            peer, received = await server.receive()
            assert peer == PEER
            assert received is message

        answers = [Stop(reason=str(n)) for n in range(5)]
        assert [server.send(PEER, message) for message in answers] == [True] * 5
        for message in answers:
            assert await client.receive() is message
        assert server.take_gone() == []
        assert not server.refusals


async def test_a_full_queue_loses_the_message_and_reports_a_slow_peer():
    channel = MemoryChannel(bound=2)
    async with channel.server as server, channel.client as client:
        assert [client.send(request(n)) for n in range(3)] == [True, True, False]
        assert (await server.receive())[1] == request(0)
        assert client.send(request(3))
        assert [(await server.receive())[1] for _ in range(2)] == [request(1), request(3)]

        stops = [Stop(reason=str(n)) for n in range(4)]
        assert [server.send(PEER, stop) for stop in stops] == [True, True, False, False]
        assert server.take_gone() == [PEER]
        assert server.take_gone() == []
        assert [await client.receive() for _ in range(2)] == stops[:2]
        assert server.send(PEER, stops[3])
        assert await client.receive() == stops[3]


async def test_what_was_sent_before_closing_arrives_and_nothing_after_it():
    channel = MemoryChannel()
    async with channel.client as client:
        async with channel.server as server:
            server.send(PEER, Stop(reason="over"))
            client.send(HELLO)
        assert not client.send(request(1))
        assert not server.send(PEER, Stop(reason="late"))
        assert await client.receive() == Stop(reason="over")
        assert (await server.receive())[1] == HELLO

        # Nothing more comes: a receiver waits until it is cancelled.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.receive)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
    assert server.take_gone() == [PEER]


async def test_a_cancelled_receiver_loses_no_message():
    channel = MemoryChannel()
    async with channel.client as client, channel.server as server:
        for number in range(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server.receive)
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
                client.send(request(number))
            assert (await server.receive())[1] == request(number)


def test_two_event_loops_in_two_threads_lose_and_swap_nothing():
    count, bound = 3000, 8
    channel = MemoryChannel(bound=bound)
    echoed: list[int] = []

    async def serve() -> None:
        async with channel.server as server:
            for _ in range(count):
                peer, message = await server.receive()
                assert isinstance(message, Request)
                assert server.send(peer, Stop(reason=str(message.free_completions)))

    async def ask() -> None:
        async with channel.client as client:
            sent = 0
            while len(echoed) < count:
                while sent < count and sent - len(echoed) < bound:
                    assert client.send(request(sent))
                    sent += 1
                with anyio.fail_after(10):
                    answer = await client.receive()
                assert isinstance(answer, Stop)
                echoed.append(int(answer.reason))

    serving = threading.Thread(target=anyio.run, args=(serve,), daemon=True)
    serving.start()
    anyio.run(ask)
    serving.join(10)
    assert not serving.is_alive()
    assert echoed == list(range(count))
