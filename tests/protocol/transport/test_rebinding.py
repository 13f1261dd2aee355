"""A learner that is started again binds the addresses of the one that was killed."""

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from protocol.messages.messages import Hello
from protocol.transport.channel import Client, Server

pytestmark = pytest.mark.anyio
HELLO = Hello(protocol_version=3, actor_id="a", actor_incarnation="i")
OWNER = """
import sys
import anyio
from protocol.transport.channel import Server

async def main():
    async with Server(sys.argv[1:]) as server:
        print(*server.endpoints, flush=True)
        while True:
            await server.receive()
            print("heard", flush=True)

anyio.run(main)
"""


async def test_a_killed_owner_leaves_addresses_that_can_be_bound_again(folder: Path):
    both = [f"ipc://{folder}/s", "tcp://127.0.0.1:*"]
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", OWNER, *both], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        bound = owner.stdout.readline().split()
        async with Client(bound[0]) as local, Client(bound[1]) as remote:
            for client in (local, remote):
                assert client.send(HELLO)
                assert await anyio.to_thread.run_sync(owner.stdout.readline) == "heard\n"
            owner.kill()
            owner.wait()
            assert (folder / "s").exists()

            async with Server(bound) as server:
                assert server.endpoints == bound
                with anyio.fail_after(30):  # those who stayed connect to it by themselves
                    for client in (local, remote):
                        assert await heard_again(client, server) == HELLO


async def heard_again(client: Client, server: Server) -> object:
    """Say hello, as often as it takes: what was sent to the dead is lost."""
    while True:
        client.send(HELLO)
        with anyio.move_on_after(0.2):
            return (await server.receive())[1]
