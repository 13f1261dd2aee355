"""The process that runs reward functions.

Run as `python -m actors.rewards.function_worker PIPE FUNCTION…`.

`actors/rewards/process.py` starts it, and kills it when a function hangs. Jobs arrive on standard
input and outcomes leave on standard output, one JSON message per line; what functions print goes
to standard error. Synchronous functions run on the main thread outside any event loop, as in TRL,
so that they may call `asyncio.run`. The asynchronous ones run after them, concurrently, on one
event loop that is kept between jobs. PIPE is a file descriptor: when the pipe closes, the process
is killed with all that it started (`strays.py`).
"""

import asyncio
import os
import subprocess
import sys
from typing import BinaryIO, Literal

import msgspec

from actors.rewards import strays
from actors.rewards.contract import RewardCall, RewardOutcome
from actors.rewards.loader import RewardFunction, load_rewards
from protocol.errors import RewardError
from protocol.messages.rewards import RewardFault, ScoreRequest

MAX_LINE = 64 << 20
MAX_LOGGED = 4 << 20


class ScoreJob(msgspec.Struct, frozen=True):
    """A `ScoreRequest` as JSON, and the indices of the functions that score it."""

    request: msgspec.Raw
    only: list[int]


class WorkerMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker writes: "ready" or "refused", then "started", "outcome" and "done" per job.

    `index` is the function's; -1 with "started" means all asynchronous ones.
    """

    kind: Literal["ready", "refused", "started", "outcome", "done"]
    names: list[str] = []
    index: int = 0
    message: str = ""
    outcome: RewardOutcome = RewardOutcome()


def main() -> int:
    """Load the functions, report that, and score jobs until the parent closes standard input."""
    source, sink = _private_pipes()
    _die_with_parent(int(sys.argv[1]))

    try:
        functions = load_rewards(sys.argv[2:])
    except RewardError as error:
        _write(sink, WorkerMessage("refused", message=str(error)))
        return 1

    _write(sink, WorkerMessage("ready", names=[f.name for f in functions]))

    with asyncio.Runner() as runner:
        for line in source:
            _score(msgspec.json.decode(line, type=ScoreJob), functions, runner, sink)
    return 0


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Hide the pipes to the parent from user code, which reads nothing and prints to the log."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    return source, sink


def _die_with_parent(pipe: int) -> None:
    """Start a process, out of reach of user code, that ends us all when the pipe closes."""
    subprocess.Popen([sys.executable, "-I", "-S", strays.__file__], stdin=pipe)
    os.close(pipe)


def _score(
    job: ScoreJob, functions: list[RewardFunction], runner: asyncio.Runner, sink: BinaryIO
) -> None:
    request = msgspec.json.decode(job.request, type=ScoreRequest)
    calls = [RewardCall(index, functions[index], request) for index in job.only]

    for call in calls:
        if not call.function.is_async:
            _write(sink, WorkerMessage("started", index=call.index))
            _write_outcome(sink, call, call.run())

    asynchronous = [call for call in calls if call.function.is_async]
    if asynchronous:
        _write(sink, WorkerMessage("started", index=-1))
        runner.run(_gather(asynchronous, sink))

    _write(sink, WorkerMessage("done"))


async def _gather(calls: list[RewardCall], sink: BinaryIO) -> None:
    async def finish(call: RewardCall) -> None:
        _write_outcome(sink, call, await call.run_async())

    await asyncio.gather(*(finish(call) for call in calls))


def _write_outcome(sink: BinaryIO, call: RewardCall, outcome: RewardOutcome) -> None:
    """Write one outcome; a function that logged too much is at fault."""
    logged = len(msgspec.json.encode((outcome.log_extra, outcome.log_metric), enc_hook=str))
    if logged > MAX_LOGGED:
        rule = f"at most {MAX_LOGGED} are kept; log less"
        problem = f"logged {logged} bytes for one group, but {rule}"
        fault = RewardFault(function=call.function.name, kind="contract", message=problem)
        outcome = RewardOutcome(fault=fault, where="logged")
    _write(sink, WorkerMessage("outcome", index=call.index, outcome=outcome))


def _write(sink: BinaryIO, message: WorkerMessage) -> None:
    sink.write(msgspec.json.encode(message, enc_hook=str) + b"\n")
    sink.flush()


if __name__ == "__main__":
    sys.exit(main())
