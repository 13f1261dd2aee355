"""Scores finished answers with reward functions, in a reward server as in every run.

The server is started for the scoring, or runs already (`zmq://host:port`). All answers to a prompt
are scored as one group. A function that fails or times out ends the scoring, because a comparison
by some of the scores would mislead.
"""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import anyio
import msgspec
import numpy as np

from actors.rewards.client import RewardClient
from actors.rewards.server import RewardServer
from actors.worker import as_answers
from protocol.errors import PippinError, RewardError, only_leaf
from protocol.messages.arrays import floats_view
from protocol.messages.parts import RewardService
from protocol.transport.curve_keys import own_client_keys
from protocol.transport.endpoints import ipc_folder

TIMEOUT_S = 60.0
COLUMNS = ("chosen", "rejected")  # may stand beside a line's `columns`

Lines = Mapping[str, Mapping[str, Any]]  # lines of rollouts.jsonl by prompt


@dataclass(frozen=True)
class Judge:
    """A reward function and how to reach it.

    `function` is file.py:function, package.module:function, or zmq://host:port, whose functions'
    rewards are added up; `keys` is the folder that a server on another machine requires.
    `timeout_s` bounds one call.
    """

    function: str
    timeout_s: float = TIMEOUT_S
    keys: str = ""

    def scores(self, answer_sets: Mapping[str, Lines]) -> dict[str, dict[str, float]]:
        """Return the scores of each named set by prompt, without those that are None.

        The first completion of a line counts, as text or as messages. Raises RewardError, which
        names the prompt, and ChannelError for an endpoint that cannot be used.
        """
        try:
            return anyio.run(self._scores, answer_sets)
        except BaseExceptionGroup as group:
            leaf = only_leaf(group)
            raise leaf if isinstance(leaf, PippinError) else group from None

    async def _scores(self, answer_sets: Mapping[str, Lines]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {name: {} for name in answer_sets}
        prompts = dict.fromkeys(key for lines in answer_sets.values() for key in lines)
        async with AsyncExitStack() as stack:
            client = await self._client(stack)
            for key in prompts:
                entries = {n: lines[key] for n, lines in answer_sets.items() if key in lines}
                values = await self._group(client, list(entries.values()))
                for name, value in zip(entries, values, strict=True):
                    if value is not None:
                        found[name][key] = value
        return found

    async def _client(self, stack: AsyncExitStack) -> RewardClient:
        """Connect to the named server, or to one that is started for as long as `stack` lasts."""
        endpoint = f"tcp://{self.function.removeprefix('zmq://')}"
        if not self.function.startswith("zmq://"):
            endpoint = f"ipc://{stack.enter_context(ipc_folder())}/judge"
            server = await stack.enter_async_context(RewardServer([self.function], endpoint))
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            tasks.start_soon(server.run)
        service = RewardService(endpoints=[endpoint], timeout_s=self.timeout_s)
        return await stack.enter_async_context(RewardClient([service], own_client_keys(self.keys)))

    async def _group(
        self, client: RewardClient, lines: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        """Return the scores of the answers to one prompt."""
        row: dict[str, Any] = {}
        for line in lines:
            columns = line.get("columns")
            row |= columns if isinstance(columns, dict) else {}
            row |= {column: line[column] for column in COLUMNS if column in line}
        row["prompt"] = lines[0]["prompt"]

        data = msgspec.json.encode(row)
        given: list[Any] = [line["completions"][0] for line in lines]
        # A dataset's chosen answer may be a list of messages already.
        answers: list[Any] = [
            own if isinstance(own, list) else as_answers(data, [own])[0] for own in given
        ]

        result = await client.score(data, answers, [[] for _ in lines], {})
        if result.faults:
            fault = result.faults[0]
            remedy = "give --reward-timeout" if fault.kind == "timeout" else "fix the function"
            raise RewardError(
                f"--reward {self.function}: {fault.function}: {fault.kind}: {fault.message}, at "
                f"the prompt {str(row['prompt'])[-200:]!r}; {remedy}"
            )

        table = floats_view(result.rewards).reshape(len(lines), len(result.names))
        return [None if np.isnan(line).all() else float(np.nansum(line)) for line in table]
