"""Asks the run's reward services for the names of their functions, which groups are checked by.

The services are asked, not the actors: the first actor to answer might be the one that lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import anyio
import msgspec
import zmq.asyncio

from protocol.messages.parts import RewardService
from protocol.messages.rewards import ScoreReply, ScoreRequest, unique_names
from protocol.transport.curve_keys import ClientKeys
from protocol.transport.endpoints import connected_socket, reachable, send_now

ASK_AGAIN_S = 5.0
CERTAIN_S = 10.0  # after an answer, a group with other names is its actor's fault
MAX_REPLY_BYTES = 1 << 20
_QUESTION = msgspec.json.encode(
    ScoreRequest(id="names", prompts=[], completions=[], completion_ids=[])
)


@dataclass
class RewardNames:
    """The names of the run's reward functions, None until the services have answered.

    `doubted`: a group had others, so the services should be asked again. One of them may have been
    restarted with other functions, which is no fault of the actors.
    """

    known: list[str] | None = None
    doubted: bool = False
    _learned_at: float = float("-inf")

    def learned(self, names: list[str], now: float) -> None:
        """Note the services' answer."""
        self.known, self.doubted, self._learned_at = names, False, now

    def is_certain(self, now: float) -> bool:
        """Whether the services have answered just now; if they have not, doubt the names."""
        certain = now - self._learned_at < CERTAIN_S
        self.doubted = self.doubted or not certain
        return certain


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
