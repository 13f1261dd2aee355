"""The process that runs reward functions.

Run as `python -m actors.rewards.function_worker PIPE FUNCTION…`.

Started and, where a function hangs, killed by `actors/rewards/process.py`. Jobs come and outcomes
go over standard input and output, one JSON message per line; what functions print goes to standard
error. Synchronous functions run on the main thread outside any event loop, as in TRL, so that one
may call `asyncio.run`; the asynchronous ones run after them, concurrently, on a loop that lasts.
PIPE is a descriptor at whose end the process group is killed.
"""

import asyncio
import os
import subprocess
import sys
from typing import BinaryIO, Literal

import msgspec

from actors.rewards.contract import Call, Outcome
from actors.rewards.loader import RewardFunction, load_rewards
from protocol.errors import RewardError
from protocol.messages.rewards import RewardFault, ScoreRequest

MAX_LINE = 64 << 20
MAX_LOGGED = 4 << 20


class Job(msgspec.Struct, frozen=True):
    """A `ScoreRequest` as JSON, and the functions that are to score it, by index."""

    request: msgspec.Raw
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
    log_metric: dict[str, list[float]] = {}


def main() -> int:
    """Load the functions, say so, and score jobs until the parent closes the pipe."""
    source, sink = _private_pipes()
    _die_with_parent(int(sys.argv[1]))
    try:
        functions = load_rewards(sys.argv[2:])
    except RewardError as error:
        _say(sink, Note("refused", message=str(error)))
        return 1
    _say(sink, Note("ready", names=[f.name for f in functions]))
    with asyncio.Runner() as runner:
        for line in source:
            _score(msgspec.json.decode(line, type=Job), functions, runner, sink)
    return 0


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes to the parent from user code: its input is empty, its prints are the log."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    return source, sink


def _die_with_parent(pipe: int) -> None:
    """Have the group killed when the pipe ends, by a process that no user code can block."""
    subprocess.Popen(["/bin/sh", "-c", "read -r _; kill -KILL 0"], stdin=pipe)
    os.close(pipe)


def _score(
    job: Job, functions: list[RewardFunction], runner: asyncio.Runner, sink: BinaryIO
) -> None:
    request = msgspec.json.decode(job.request, type=ScoreRequest)
    calls = [Call(index, functions[index], request) for index in job.only]
    for call in calls:
        if not call.function.is_async:
            _say(sink, Note("started", index=call.index))
            _say(sink, _note(call.function, call.run()))
    waiting = [call for call in calls if call.function.is_async]
    if waiting:
        _say(sink, Note("started", index=-1))
        runner.run(_gather(waiting, sink))
    _say(sink, Note("done"))


async def _gather(calls: list[Call], sink: BinaryIO) -> None:
    async def finish(call: Call) -> None:
        _say(sink, _note(call.function, await call.run_async()))

    await asyncio.gather(*(finish(call) for call in calls))


def _note(function: RewardFunction, outcome: Outcome) -> Note:
    fault = None
    if outcome.kind is not None:
        fault = RewardFault(function=function.name, kind=outcome.kind, message=outcome.message)
    note = Note(
        "outcome",
        index=outcome.function,
        rewards=outcome.rewards,
        fault=fault,
        where=outcome.where,
        traceback=outcome.traceback,
        log_extra=outcome.log_extra,
        log_metric=outcome.log_metric,
    )
    logged = len(msgspec.json.encode((note.log_extra, note.log_metric), enc_hook=str))
    if logged <= MAX_LOGGED:
        return note
    message = f"logged {logged} bytes for one group; at most {MAX_LOGGED} are taken, log less"
    fault = RewardFault(function=function.name, kind="contract", message=message)
    return Note("outcome", index=outcome.function, fault=fault, where="logged")


def _say(sink: BinaryIO, note: Note) -> None:
    sink.write(msgspec.json.encode(note, enc_hook=str) + b"\n")
    sink.flush()


if __name__ == "__main__":
    sys.exit(main())
