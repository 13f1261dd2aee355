"""Asks the run's reward services for the names of their functions, which groups are checked by.

The services are asked, not the actors: the first actor to answer might be the one that lies.
"""

from collections.abc import Sequence

import anyio
import msgspec
import zmq.asyncio

from protocol.messages.parts import RewardService
from protocol.messages.rewards import ScoreReply, ScoreRequest, unique_names
from protocol.transport.curve_keys import ClientKeys
from protocol.transport.endpoints import connected_socket, reachable, send_now

ASK_AGAIN_S = 5.0
MAX_REPLY_BYTES = 1 << 20
_QUESTION = msgspec.json.encode(
    ScoreRequest(id="names", prompts=[], completions=[], completion_ids=[])
)


async def reward_names(services: Sequence[RewardService], keys: ClientKeys | None) -> list[str]:
    """Return the names of all services' functions, as groups have them; wait until all answered."""
    names: list[str] = []
    for service in services:
        names += await _names_of(service, keys)
    return unique_names(names)


async def _names_of(service: RewardService, keys: ClientKeys | None) -> list[str]:
    """Ask the service's endpoints in turn until one answers."""
    while True:
        for endpoint in service.endpoints:
            with connected_socket(
                reachable(endpoint, ""), keys, max_message_bytes=MAX_REPLY_BYTES, outbox_bound=1
            ) as socket:
                send_now(socket, [_QUESTION])
                with anyio.move_on_after(ASK_AGAIN_S):
                    return await _answer(socket)


async def _answer(socket: zmq.asyncio.Socket) -> list[str]:
    while True:
        frames = await socket.recv_multipart()
        try:
            return msgspec.json.decode(frames[-1], type=ScoreReply).names
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            continue  # a word of progress, or no reply at all: the actors say so
