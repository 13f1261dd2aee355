"""Server and Client over real sockets: delivery, refusals, and peers that misbehave alone."""

import socket as sockets

import anyio
import msgspec
import pytest
import zmq
import zmq.asyncio

from protocol.errors import ChannelError, WireError
from protocol.messages.messages import Hello, Policy, Refuse, Release, Stop
from protocol.transport.channel import Client, Server
from protocol.transport.curve_keys import load_client_keys, make_keys
from protocol.transport.endpoints import check_endpoint, ipc_folder, is_loopback

pytestmark = pytest.mark.anyio
HELLO = Hello(protocol_version=4, actor_id="a", actor_incarnation="i")


async def greet(server, client, name="a"):
    """Have the server learn the client's routing ID."""
    hello = Hello(protocol_version=4, actor_id=name, actor_incarnation="i")
    assert client.send(hello)
    with anyio.fail_after(5):
        peer, message = await server.receive()
    assert message == hello
    return peer


async def reply(client):
    """Receive within five seconds."""
    with anyio.fail_after(5):
        return await client.receive()


async def test_messages_go_both_ways_over_ipc_and_tcp_at_once(folder):
    both = [f"ipc://{folder}/s", "tcp://127.0.0.1:*"]
    async with Server(both) as server:
        assert server.endpoints[0] == both[0]
        assert int(server.endpoints[1].rpartition(":")[2]) > 0
        for endpoint in server.endpoints:
            async with Client(endpoint) as client:
                peer = await greet(server, client)
                assert server.send(peer, Stop(reason=endpoint))
                assert await reply(client) == Stop(reason=endpoint)
        assert server.take_gone() == []


async def test_two_actors_with_one_name_are_two_peers(folder):
    async with (
        Server([f"ipc://{folder}/s"]) as server,
        Client(server.endpoint) as first,
        Client(server.endpoint) as second,
    ):
        assert await greet(server, first) != await greet(server, second)


async def test_bad_frames_are_refused_counted_and_a_sign_of_life(folder):
    async with Server([f"ipc://{folder}/s"], max_message_bytes=1000) as server:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as raw:
            raw.linger = 0
            raw.connect(server.endpoint)
            for frames in (
                [b"\xc1"],
                [b"", b"GET / HTTP/1.1"],
                [b"\x81\xa4type\xa3Nay"],
                [b"\x81\xa4type\xa5Hello"],
                [b"\x00" * 1001],
            ):
                await raw.send_multipart(frames)
            async with Client(server.endpoint) as client, anyio.create_task_group() as tasks:
                tasks.start_soon(_expect_refusals, raw, 5)
                while sum(server.refusals.values()) < 5:
                    client.send(HELLO)
                    with anyio.fail_after(5):
                        await server.receive()
    assert dict(server.refusals) == {
        "undecodable": 2,
        "unknown": 1,
        "invalid": 1,
        "oversized": 1,
    }


async def _expect_refusals(raw, count):
    with anyio.fail_after(5):
        for _ in range(count):
            refusal = Refuse(**_fields(await raw.recv()))
            assert refusal.code in ("undecodable", "invalid")
            assert not refusal.fatal


def _fields(data):
    fields = msgspec.msgpack.decode(data)
    assert fields.pop("type") == "Refuse"
    return fields


async def test_refusals_to_one_peer_are_limited(folder):
    async with (
        Server([f"ipc://{folder}/s"]) as server,
        Client(server.endpoint) as client,
    ):
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as raw:
            raw.linger = 0
            raw.connect(server.endpoint)
            for _ in range(500):
                await raw.send(b"\xc1")
            while server.refusals["undecodable"] < 500:
                client.send(HELLO)
                await server.receive()
            answers = 0
            while await raw.poll(200):
                await raw.recv()
                answers += 1
    assert 8 <= answers <= 12


async def test_a_message_above_the_limit_is_refused_by_its_sender(folder):
    async with (
        Server([f"ipc://{folder}/s"], max_message_bytes=500) as server,
        Client(server.endpoint, max_message_bytes=500) as client,
    ):
        with pytest.raises(WireError, match="at most 500 bytes") as caught:
            client.send(Release(reason="x" * 500))
        assert caught.value.kind == "oversized"
        await greet(server, client)


async def test_a_gigantic_frame_ends_that_connection_only(folder):
    async with (
        Server([f"ipc://{folder}/s"], max_message_bytes=1000) as server,
        Client(server.endpoint) as client,
    ):
        peer = await greet(server, client)
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as raw:
            raw.linger = 0
            raw.connect(server.endpoint)
            await raw.send(bytes(1 << 20))
            client.send(HELLO)
            with anyio.fail_after(5):
                assert await server.receive() == (peer, HELLO)
    assert not server.refusals


async def test_a_peer_that_left_is_gone_and_the_other_is_not(folder):
    async with Server([f"ipc://{folder}/s"]) as server, Client(server.endpoint) as stays:
        there = await greet(server, stays)
        async with Client(server.endpoint) as leaves:
            away = await greet(server, leaves)
        with anyio.fail_after(5):
            while server.send(away, Stop(reason="")):
                await greet(server, stays)
        assert server.take_gone() == [away]
        assert server.take_gone() == []
        assert server.send(there, Stop(reason="you"))
        assert await reply(stays) == Stop(reason="you")
        assert not server.send(b"nobody", Stop(reason=""))


async def test_a_full_outbox_drops_that_peer_alone(folder):
    async with (
        Server([f"ipc://{folder}/s"], outbox_bound=4) as server,
        Client(server.endpoint) as slow,
        Client(server.endpoint) as quick,
    ):
        stuck = await greet(server, slow)
        other = await greet(server, quick)
        big = Policy(version=1, digest="d", size=1, path="x" * (1 << 20))
        sent = 0
        with anyio.fail_after(20):
            while server.send(stuck, big):
                sent += 1
                await anyio.sleep(0.002)
        assert 4 <= sent < 64  # its outbox, what the client holds, and the kernel's buffers
        assert server.take_gone() == [stuck]
        assert server.send(other, Stop(reason="on"))
        assert await reply(quick) == Stop(reason="on")


async def test_a_client_finds_a_restarted_server(folder):
    endpoint = f"ipc://{folder}/s"
    async with Client(endpoint) as client:
        async with Server([endpoint]) as server:
            await greet(server, client)
        async with Server([endpoint]) as server:
            second = await greet(server, client)
            assert server.send(second, Stop(reason="again"))
            assert await reply(client) == Stop(reason="again")


async def test_a_clients_outbox_is_bounded_while_the_server_is_away(folder):
    async with Client(f"ipc://{folder}/nobody", outbox_bound=3) as client:
        assert [client.send(HELLO) for _ in range(5)] == [True, True, True, False, False]


async def test_a_client_names_a_server_that_speaks_otherwise(folder):
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as other:
        other.linger = 0
        other.bind(f"ipc://{folder}/s")
        async with Client(f"ipc://{folder}/s") as client:
            client.send(HELLO)
            peer, _ = await other.recv_multipart()
            await other.send_multipart([peer, b"{}"])
            with pytest.raises(ChannelError, match="check the endpoint and both versions"):
                await reply(client)


async def test_an_endpoint_in_use_is_named(folder):
    endpoint = f"ipc://{folder}/s"
    async with Server([endpoint]):
        with pytest.raises(ChannelError, match=f"{endpoint}.*in use"):
            await Server([endpoint]).__aenter__()
    with sockets.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ChannelError, match=f":{port}: .*in use"):
            await Server([f"tcp://127.0.0.1:{port}"]).__aenter__()


async def test_a_stale_socket_file_is_taken_over(folder):
    path = folder / "s"
    with sockets.socket(sockets.AF_UNIX) as dead:
        dead.bind(str(path))
    async with Server([f"ipc://{path}"]) as server, Client(server.endpoint) as client:
        await greet(server, client)


async def test_another_protocol_on_the_port_is_survived():
    async with Server(["tcp://127.0.0.1:*"]) as server, Client(server.endpoint) as client:
        port = int(server.endpoint.rpartition(":")[2])
        async with await anyio.connect_tcp("127.0.0.1", port) as web:
            await web.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"\xff" * 2000)
            await greet(server, client)


def test_endpoints_that_cannot_be_used_are_refused():
    path = "/tmp/" + "x" * 98
    check_endpoint(f"ipc://{path}", keys=False)
    with pytest.raises(ChannelError, match="at most 103 bytes, got 104"):
        check_endpoint(f"ipc://{path}y", keys=False)
    with pytest.raises(ChannelError, match="CURVE keys are required"):
        check_endpoint("tcp://0.0.0.0:5555", keys=False)
    check_endpoint("tcp://0.0.0.0:5555", keys=True)
    for wrong in ("", "ipc://", "udp://x:1", "tcp://127.0.0.1", "tcp://127.0.0.1:70000", "5555"):
        with pytest.raises(ChannelError, match="required"):
            check_endpoint(wrong, keys=True)


def test_loopback():
    inside = ["tcp://127.0.0.1:1", "tcp://localhost:*", "tcp://[::1]:5", "tcp://127.9.9.9:1"]
    outside = ["tcp://*:1", "tcp://0.0.0.0:1", "tcp://192.168.1.2:1", "tcp://host.example:1"]
    assert [is_loopback(e) for e in inside] == [True] * 4
    assert [is_loopback(e) for e in outside] == [False] * 4


def test_the_socket_folder_is_private_and_removed():
    with ipc_folder() as path:
        assert path.stat().st_mode & 0o777 == 0o700
        assert len(f"{path}/learner.sock") < 60
        (path / "left").touch()
    assert not path.exists()


async def test_only_holders_of_keys_in_the_folder_are_admitted(folder):
    keys = make_keys(folder / "keys", ["a"])
    stranger = make_keys(folder / "stranger", ["a"])
    (stranger / "server.public").write_bytes((keys / "server.public").read_bytes())
    endpoints = ["tcp://127.0.0.1:*", f"ipc://{folder}/s"]
    async with Server(endpoints, keys=keys) as server:
        tcp, ipc = server.endpoints
        async with (
            Client(tcp, keys=load_client_keys(stranger)) as wrong,
            Client(tcp) as plain,
            Client(ipc) as local,
            Client(tcp, keys=load_client_keys(keys)) as right,
        ):
            wrong.send(Release(reason="wrong key"))
            plain.send(Release(reason="no key"))
            await greet(server, local, "local")
            peer = await greet(server, right)
            assert server.send(peer, Stop(reason=""))
            assert await reply(right) == Stop(reason="")
            with anyio.move_on_after(0.3) as waited:
                await server.receive()
            assert waited.cancelled_caught


async def refused(server, impostor, right):
    """Return the refusal of an impostor, while the server reads what `right` goes on saying."""
    found: list[Refuse] = []

    async def listen(tasks):
        answer = await impostor.receive()
        assert isinstance(answer, Refuse)
        found.append(answer)
        tasks.cancel_scope.cancel()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen, tasks)
            while True:
                impostor.send(HELLO)
                right.send(Release(reason="right"))
                assert (await server.receive())[1] == Release(reason="right")
                await anyio.sleep(0.01)
    return found[0]


async def test_an_impostor_is_refused_over_tcp_and_over_ipc(folder):
    keys = make_keys(folder / "keys", ["a", "b"])
    endpoints = [f"ipc://{folder}/s", "tcp://127.0.0.1:*"]
    async with (
        Server(endpoints, keys=keys) as server,
        Client(server.endpoints[0]) as local,
        Client(server.endpoints[1], keys=load_client_keys(keys, "b")) as other,
        Client(server.endpoints[1], keys=load_client_keys(keys, "a")) as right,
    ):
        for impostor, problem in ((other, "required 'b', got 'a'"), (local, "came without")):
            refusal = await refused(server, impostor, right)
            assert (refusal.code, refusal.fatal) == ("key", True)
            assert problem in refusal.reason
    assert set(server.refusals) == {"key"}


async def test_a_peer_that_goes_on_after_a_fatal_refusal_is_disconnected(folder):
    keys = make_keys(folder / "keys", ["a", "b"])
    async with (
        Server(["tcp://127.0.0.1:*"], keys=keys) as server,
        Client(server.endpoint, keys=load_client_keys(keys, "a")) as right,
        Client(server.endpoint, keys=load_client_keys(keys, "b")) as impostor,
    ):
        assert (await refused(server, impostor, right)).fatal
        with anyio.fail_after(10):
            while not server.refusals["shut"]:
                impostor.send(Release(reason="still here"))
                right.send(HELLO)
                while (await server.receive())[1] != HELLO:
                    pass
                await anyio.sleep(0.01)
        await greet(server, right)


async def test_a_key_that_is_added_lets_its_actor_in_and_one_that_is_removed_shuts_it_out(folder):
    keys = make_keys(folder / "keys", ["a"])
    async with (
        Server(["tcp://127.0.0.1:*"], keys=keys) as server,
        Client(server.endpoint, keys=load_client_keys(keys, "a")) as actor,
    ):
        await greet(server, actor)
        make_keys(keys, ["b"])
        (keys / "a.public").unlink()
        async with Client(server.endpoint, keys=load_client_keys(keys, "b")) as other:
            await greet(server, other, "b")
            refusal = await refused(server, actor, other)
    assert (refusal.code, refusal.fatal) == ("key", True)
    assert "no longer admitted" in refusal.reason
