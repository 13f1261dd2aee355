"""Make a preference dataset: `launch/pairs.py recipe.toml [--mode …] [--section.key value …]`.

The actors and reward servers of GRPO answer the prompts. `best_worst` pairs the best completion of
a group with its worst; `given` pairs the dataset's own answer with what the base model says. The
result, `pairs.jsonl` in the run's folder or `pairs.output`, is read by launch/preference.py. A
recipe of launch/grpo.py serves; what only training reads is named.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import anyio
import msgspec
from msgspec import structs

from launch.cli.run import NOT_BEGUN, main, program, read_command_line
from launch.grpo import actor_specs, reward_services
from launch.processes.children import ChildSpec
from launch.processes.supervisor import Supervisor, awake
from protocol.config.settings import PairsRun
from protocol.config.unread import unread
from protocol.errors import ConfigError
from protocol.transport.endpoints import ipc_folder

USAGE = "usage: launch/pairs.py [recipe.toml] [--mode best_worst|given] [--section.key value …]"


def read(argv: Sequence[str]) -> tuple[PairsRun, Path]:
    """Return the settings and the run's folder; refuse an output that holds something."""
    flags = [word.replace("--mode", "--pairs.mode", 1) if _is_mode(word) else word for word in argv]
    for word in flags:
        if word.partition("=")[0] == "--run.resume":
            raise ConfigError("--run.resume: pairs cannot be resumed; start anew with run.seed")
    run, folder = read_command_line(PairsRun, flags, USAGE)
    run = cast("PairsRun", run)
    try:
        _check(run)
    except ConfigError:
        (folder / NOT_BEGUN).touch()  # so that the name is free
        raise
    return run, folder


def _check(run: PairsRun) -> None:
    if not run.pairs.output:
        return
    output = Path(run.pairs.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab") as file:
            size = file.tell()
    except OSError as error:
        raise ConfigError(f"pairs.output {output}: cannot be written: {error}") from error
    if size:
        raise ConfigError(f"pairs.output {output}: holds {size} bytes already; name another file")


def _is_mode(word: str) -> bool:
    return word == "--mode" or word.startswith("--mode=")


def say(text: str) -> None:
    """Tell the user of an event."""
    sys.stderr.write(f"{text}\n")


def build(run: PairsRun, folder: Path) -> int:
    """Start collector, actors and reward servers; return the collector's exit status."""
    with ipc_folder() as sockets:
        endpoint = f"ipc://{sockets}/learner"
        services, servers = reward_services(run, sockets)
        command = program("processes/collect.py", str(folder), "--child", "--endpoint", endpoint)
        command += ["--snapshots", f"ipc://{sockets}/snapshots"]
        command += ["--endpoint", run.transport.bind] if run.transport.bind else []
        for service in services:
            command += ["--rewards", service]
        required = {"reward server"} if servers else set[str]()
        if not run.transport.bind:
            required.add("actor")
        supervisor = Supervisor(
            ChildSpec("collect", "learner", command),
            [*servers, *actor_specs(run, endpoint)],
            folder / "logs",
            say=say,
            required=frozenset(required),
        )
        with awake():
            return anyio.run(supervisor.run)


def body(argv: Sequence[str] | None = None) -> int:
    """Read the recipe, make the pairs, say what came of it."""
    run, folder = read(sys.argv[1:] if argv is None else argv)
    for line in unread(run):
        say(line)
    if run.pairs.output:
        path = str(Path(run.pairs.output).absolute())
        run = structs.replace(run, pairs=structs.replace(run.pairs, output=path))
    status = build(run, folder)
    if status != 0:
        sys.stdout.write(f"logs:  {folder / 'logs'}\n")
        return status
    counts = msgspec.json.decode((folder / "pairs.json").read_bytes(), type=dict[str, int])
    made = counts.pop("pairs")
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    sys.stdout.write(f"pairs: {made} (left out: {left_out or 'none'})\n")
    sys.stdout.write(f"file:  {run.pairs.output or folder / 'pairs.jsonl'}\n")
    return 0


if __name__ == "__main__":
    main(body)
