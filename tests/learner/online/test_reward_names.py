"""The learner asks reward services for their functions' names."""

import anyio
import msgspec
import pytest
import zmq
import zmq.asyncio

from learner.online.reward_names import reward_names
from protocol.messages.parts import RewardService
from protocol.messages.rewards import ScoreProgress, ScoreReply, ScoreRequest
from protocol.transport.endpoints import ipc_folder

pytestmark = pytest.mark.anyio


async def service(endpoint, names, *, task_status):
    """Answer the question for names, after noise and a word of progress."""
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        socket.bind(endpoint)
        task_status.started()
        while True:
            peer, data = await socket.recv_multipart()
            request = msgspec.json.decode(data, type=ScoreRequest)
            assert request.completions == []
            reply = ScoreReply(id=request.id, names=names, rewards=[[] for _ in names])
            for answer in (b"\xff{", msgspec.json.encode(ScoreProgress(id=request.id))):
                await socket.send_multipart([peer, answer])
            await socket.send_multipart([peer, msgspec.json.encode(reply)])


async def test_names_are_those_that_groups_have():
    with ipc_folder() as folder, anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            await tasks.start(service, f"ipc://{folder}/a", ["length", "exact"])
            await tasks.start(service, f"ipc://{folder}/b", ["length"])
            services = [
                RewardService(endpoints=[f"ipc://{folder}/{name}"], timeout_s=1.0) for name in "ab"
            ]
            assert await reward_names(services, None) == ["length", "exact", "length_2"]
            tasks.cancel_scope.cancel()
    assert await reward_names([], None) == []
