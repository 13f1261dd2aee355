"""The channel without sockets behaves as the one with."""

import pytest

from protocol.errors import ChannelError
from protocol.messages.messages import Request, Stop
from protocol.transport.channel import ClientChannel, ServerChannel
from protocol.transport.memory_channel import memory_pair

pytestmark = pytest.mark.anyio


async def test_messages_go_both_ways_and_peers_end_alone():
    server, client = memory_pair(outbox_bound=2)
    typed_server: ServerChannel = server
    typed_client: ClientChannel = client
    second = server.connect()
    assert typed_client.send(Request(free_completions=1))
    assert second.send(Request(free_completions=2))
    assert not second.send(Request(free_completions=3))
    peer, message = await typed_server.receive()
    other, _ = await server.receive()
    assert message == Request(free_completions=1)
    assert peer != other
    assert server.last_seen(peer) is not None
    stop = Stop(reason="x")
    assert [server.send(peer, stop) for _ in range(3)] == [True, True, False]
    assert server.take_gone() == [peer]
    assert server.last_seen(peer) is None
    assert server.send(other, stop)
    assert await second.receive() == stop
    assert await client.receive() == stop
    async with second:
        pass
    assert not server.send(other, stop)
    assert server.take_gone() == [other]
    with pytest.raises(ChannelError):
        second.send(Request(free_completions=1))
    async with server:
        pass
    assert not client.send(Request(free_completions=1))
