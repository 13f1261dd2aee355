"""Connections are bounded: which are ended, and that an actor goes on working beside a flood."""

import os
import socket as sockets

import anyio
import pytest

from protocol.messages.messages import Hello, Stop
from protocol.transport.channel import Client, Server
from protocol.transport.connections import HANDSHAKE_S, MAX_UNPROVEN, ConnectionTable
from protocol.transport.curve_keys import load_client_keys, make_keys
from protocol.transport.endpoints import ipc_folder

HELLO = Hello(protocol_version=4, actor_id="studio", actor_incarnation="i")
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15) + b"\0" + bytes(31)


def test_the_oldest_of_the_most_crowded_address_makes_room():
    table = ConnectionTable(max_unproven=3)
    assert [table.accepted(n, "flood", 0.0) for n in (1, 2)] == [None, None]
    assert table.accepted(3, "studio", 0.1) is None
    assert table.accepted(4, "flood", 0.2) == 1
    assert table.accepted(5, "mini", 0.3) == 2
    assert len(table) == 3
    assert table.accepted(6, "flood", 0.4) == 4


def test_a_connection_that_sent_a_message_or_outlived_the_handshake_is_kept():
    table = ConnectionTable(max_unproven=2)
    for number in (1, 2):
        table.accepted(number, "a", 0.0)
    table.proved(1)
    assert table.accepted(3, "a", 1.0) is None
    assert table.accepted(4, "a", HANDSHAKE_S + 1) is None  # ZMQ would have ended 2 by now
    assert len(table) == 4
    assert table.accepted(5, "a", HANDSHAKE_S + 1.1) == 3


def test_above_the_bound_on_all_connections_the_newest_is_ended():
    table = ConnectionTable(max_connections=2, max_unproven=2)
    for number in (1, 2):
        assert table.accepted(number, "a", 0.0) is None
        table.proved(number)
    assert table.accepted(3, "a", 0.0) == 3
    table.closed(1)
    assert table.accepted(3, "a", 0.0) is None


def test_a_descriptor_that_is_used_again_is_a_new_connection():
    table = ConnectionTable(max_unproven=2)
    for address in ("a", "b", "c"):
        assert table.accepted(1, address, 0.0) is None
    assert len(table) == 1
    table.proved(1)
    assert table.accepted(1, "a", 0.0) is None
    assert len(table) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("sent", [b"", GREETING], ids=["bare", "half a handshake"])
async def test_an_actor_works_and_another_joins_beside_a_flood(sent):
    flood: list[sockets.socket] = []
    count = 2 * MAX_UNPROVEN
    with ipc_folder() as folder:
        keys = make_keys(folder / "keys", ["studio"])
        pair = load_client_keys(keys)
        before = len(os.listdir("/dev/fd"))
        async with Server(["tcp://127.0.0.1:*"], keys=keys) as server:
            port = int(server.endpoint.rpartition(":")[2])

            async def converse(client):
                client.send(HELLO)
                peer, message = await server.receive()
                assert message == HELLO
                server.send(peer, Stop(reason=""))
                assert await client.receive() == Stop(reason="")

            with anyio.fail_after(60):
                async with Client(server.endpoint, keys=pair) as actor:
                    await converse(actor)
                    for number in range(count):
                        stranger = sockets.create_connection(("127.0.0.1", port))
                        flood.append(stranger)
                        stranger.send(sent)
                        if number % 64 == 0:
                            await converse(actor)
                    async with Client(server.endpoint, keys=pair) as other:
                        await converse(other)
                    await converse(actor)
                ended = sum(was_ended(stranger) for stranger in flood)
        for stranger in flood:
            stranger.close()
        assert len(os.listdir("/dev/fd")) == before
    assert count - MAX_UNPROVEN <= ended <= count


def was_ended(connection):
    """Whether the other side ended a connection; what it said before is read first."""
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True
