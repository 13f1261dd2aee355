"""The process that runs reward functions: `python -m actors.reward_worker FUNCTION…`.

Started and, where a function hangs, killed by `actors/reward_server.py`. Requests come and
outcomes go over standard input and output, a JSON message a line; what functions print goes to
standard error. The process ends when its parent does.
"""

import asyncio
import ctypes
import os
import queue
import signal
import sys
import threading
from typing import BinaryIO, Literal

import msgspec

from actors.reward_loader import RewardFunction, load_rewards
from actors.rewards import Call, Outcome
from protocol.errors import RewardError
from protocol.messages import RewardFault, ScoreRequest

PR_SET_PDEATHSIG = 1


class Job(msgspec.Struct, frozen=True):
    """A request, and the functions that are to score it."""

    request: ScoreRequest
    only: list[int]


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker says. `started`: index of the function (-1: the asynchronous ones)."""

    kind: Literal["ready", "refused", "started", "outcome", "done"]
    names: list[str] = []
    index: int = 0
    message: str = ""
    rewards: list[float | None] | None = None
    fault: RewardFault | None = None
    where: str = ""  # where a fault arose: its kind, for showing it once
    traceback: str = ""
    log_extra: dict[str, list[object]] = {}
    log_metric: dict[str, float] = {}


def main() -> int:
    """Load the functions, say so, and score jobs until the parent closes the pipe."""
    source, sink = _private_pipes()
    _die_with_parent()
    try:
        functions = load_rewards(sys.argv[1:])
    except RewardError as error:
        _say(sink, Note("refused", message=str(error)))
        return 1
    _say(sink, Note("ready", names=[f.name for f in functions]))
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(source, jobs), daemon=True).start()
    asyncio.run(_serve(functions, jobs, sink))
    return 0


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes to the parent from user code: its input is empty, its prints are the log."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    return source, sink


def _die_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _read(source: BinaryIO, jobs: queue.SimpleQueue[bytes]) -> None:
    for line in source:
        jobs.put(line)
    os._exit(0)


async def _serve(
    functions: list[RewardFunction], jobs: queue.SimpleQueue[bytes], sink: BinaryIO
) -> None:
    while True:
        line = await asyncio.to_thread(jobs.get)
        job = msgspec.json.decode(line, type=Job)
        calls = [Call(index, functions[index], job.request) for index in job.only]
        for call in calls:
            if not call.function.is_async:
                _say(sink, Note("started", index=call.index))
                _say(sink, _note(call.function, call.run()))
        waiting = [call for call in calls if call.function.is_async]
        if waiting:
            _say(sink, Note("started", index=-1))
            await asyncio.gather(*(_finish(call, sink) for call in waiting))
        _say(sink, Note("done"))


async def _finish(call: Call, sink: BinaryIO) -> None:
    _say(sink, _note(call.function, await call.run_async()))


def _note(function: RewardFunction, outcome: Outcome) -> Note:
    fault = None
    if outcome.kind is not None:
        fault = RewardFault(function=function.name, kind=outcome.kind, message=outcome.message)
    return Note(
        "outcome",
        index=outcome.function,
        rewards=outcome.rewards,
        fault=fault,
        where=outcome.where,
        traceback=outcome.traceback,
        log_extra=outcome.log_extra,
        log_metric={
            name: sum(values) / len(values) for name, values in outcome.log_metric.items() if values
        },
    )


def _say(sink: BinaryIO, note: Note) -> None:
    sink.write(msgspec.json.encode(note, enc_hook=str) + b"\n")
    sink.flush()


if __name__ == "__main__":
    sys.exit(main())
