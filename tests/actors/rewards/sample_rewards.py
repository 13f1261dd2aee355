"""Reward functions that the tests of the reward server load by this file's path."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_events: dict[str, asyncio.Event] = {}


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def of_column(completions, answer, **kwargs):
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def calls(completions, folder, **kwargs):
    """Leave a line a call, so that a test can count them."""
    with open(Path(folder[0]) / "calls", "a") as file:
        file.write(f"{os.getpid()}\n")
    return [1.0] * len(completions)


def mostly_none(completions, **kwargs):
    return [None] * (len(completions) - 1) + [2.0]


def all_none(completions, **kwargs):
    return [None] * len(completions)


def sleeps(completions, **kwargs):
    time.sleep(1e6)


def loops(completions, **kwargs):
    while True:
        pass


def blocks_in_c(completions, **kwargs):
    ctypes.PyDLL(None).pause()  # holds the GIL


async def async_sleeps(completions, **kwargs):
    await asyncio.sleep(1e6)


def spawns(completions, folder, **kwargs):
    """Start a process, note its ID, and hang."""
    command = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(1e6)"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    (Path(folder[0]) / "child").write_text(str(child.pid))
    time.sleep(1e6)


def leaves_one(completions, folder, **kwargs):
    """Start a process that leaves our session and our children, and note its ID.

    It holds the FIFO `held` open, if there is one.
    """
    pids, held = Path(folder[0]) / "child", Path(folder[0]) / "held"
    code = f"import os, time; held = open({str(held)!r}, 'w') if {held.exists()} else None; "
    code += f"open({str(pids)!r}, 'w').write(str(os.getpid())); time.sleep(1e6)"
    command = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}], "
    command += "start_new_session=True)"
    subprocess.run([sys.executable, "-c", command], check=True)
    while not pids.exists() or not pids.read_text():
        time.sleep(0.01)
    return [1.0] * len(completions)


def raises(completions, **kwargs):
    raise KeyError("no such thing")


def too_few(completions, **kwargs):
    return [1.0] * (len(completions) - 1)


def words(completions, **kwargs):
    return ["good"] * len(completions)


def runs_a_loop(completions, **kwargs):
    async def score():
        return [3.0] * len(completions)

    return asyncio.run(score())


async def first(completions, **kwargs):
    await _meet("first", "second")
    return [1.0] * len(completions)


async def second(completions, **kwargs):
    await _meet("second", "first")
    return [2.0] * len(completions)


async def _meet(mine, other):
    """Wait until the other function runs too."""
    _events.setdefault(mine, asyncio.Event()).set()
    await _events.setdefault(other, asyncio.Event()).wait()


def dies_once(completions, folder, **kwargs):
    """End the process at the first call, as SIGKILL from outside would."""
    mark = Path(folder[0]) / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [4.0] * len(completions)


def dies(completions, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def waits(completions, folder, **kwargs):
    """Say that it runs, and wait until the pipe `go` is written to."""
    calls(completions, folder)
    with open(Path(folder[0]) / "go", "rb") as pipe:
        pipe.read()
    return [5.0] * len(completions)


def logs(completions, log_extra, log_metric, **kwargs):
    log_extra("seen", completions)
    log_metric("accuracy", 1.0)
    log_metric("accuracy", float("nan"))
    return [0.0] * len(completions)


def logs_too(completions, log_extra, log_metric, **kwargs):
    log_extra("seen", [0] * len(completions))
    log_metric("accuracy", 0.0)
    return [0.0] * len(completions)


def logs_too_much(completions, log_extra, **kwargs):
    log_extra("book", ["x" * (5 << 20)])
    return [0.0] * len(completions)


def step(completions, trainer_state, **kwargs):
    return [float(trainer_state.global_step)] * len(completions)


def prints_and_raises(completions, **kwargs):
    for number in range(32 << 10):
        print(f"{number:06}", "x" * 1016)
    raise ValueError("after all that")
