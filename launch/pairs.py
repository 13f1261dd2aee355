"""Make a preference dataset: `launch/pairs.py recipe.toml [--mode …] [--section.key value …]`.

Actors and reward servers answer the prompts and score the answers, as in GRPO. Mode `best_worst`
pairs the best completion of a group with its worst; `given` pairs the dataset's own answer with the
base model's. The result, which launch/preference.py reads, is `pairs.jsonl` in the run's folder or
the file `pairs.output`. A recipe of launch/grpo.py works, too: keys that only training reads are
listed and left out.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import msgspec
from msgspec import structs

from launch.cli.command_line import read_command_line
from launch.cli.run import main, record_end
from launch.processes.exit_status import FINISHED, STOPPED
from launch.processes.specs import online_processes
from launch.processes.supervisor import Supervisor, awake
from protocol.config.idle import idle
from protocol.config.settings import GrpoRun, PairsRun
from protocol.errors import ConfigError
from protocol.run_record import change_state
from protocol.transport.endpoints import ipc_folder

USAGE = "usage: launch/pairs.py [recipe.toml] [--mode best_worst|given] [--section.key value …]"


def read(argv: Sequence[str]) -> tuple[PairsRun, Path]:
    """Return the settings and the run's folder; refuse an output file that is not empty."""
    names = [word.partition("=")[0] for word in argv]
    flags = [
        word.replace("--mode", "--pairs.mode", 1) if name == "--mode" else word
        for name, word in zip(names, argv, strict=True)
    ]
    if "--run.resume" in names:
        raise ConfigError("--run.resume: pairs cannot be resumed; give a new run another run.seed")

    run, folder = read_command_line(PairsRun, flags, USAGE, also_accepts=GrpoRun)
    try:
        _check_output(run.pairs.output)
    except ConfigError:
        change_state(folder, "failed_to_start")  # so that its name stays free
        raise
    return run, folder


def _check_output(output: str) -> None:
    """Raise ConfigError if the file cannot be written, or holds something."""
    if not output:
        return

    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            size = file.tell()
    except OSError as error:
        raise ConfigError(f"pairs.output {path}: cannot be written: {error}") from error
    if size:
        raise ConfigError(f"pairs.output {path}: already holds {size} bytes; name another file")


def say(text: str) -> None:
    """Show a message."""
    sys.stderr.write(f"{text}\n")


def build(run: PairsRun, folder: Path) -> int:
    """Run collector, actors and reward servers to the end; return the collector's exit status."""
    with ipc_folder() as sockets:
        supervisor = Supervisor(folder, online_processes(run, folder, sockets), say=say)
        with awake():
            status = anyio.run(supervisor.run)
    record_end(folder, status, started=True)
    return status


def body(argv: Sequence[str] | None = None) -> int:
    """Read the recipe, make the pairs, and say how many there are."""
    run, folder = read(sys.argv[1:] if argv is None else argv)
    for line in idle(run):
        say(line)
    if run.pairs.output:
        path = str(Path(run.pairs.output).absolute())
        run = structs.replace(run, pairs=structs.replace(run.pairs, output=path))

    status = build(run, folder)
    if status not in (FINISHED, STOPPED) or not (folder / "pairs.json").exists():
        sys.stdout.write(f"logs:  {folder / 'logs'}\n")
        return status

    counts = msgspec.json.decode((folder / "pairs.json").read_bytes(), type=dict[str, int])
    made = counts.pop("pairs")
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    sys.stdout.write(f"pairs: {made} (left out: {left_out or 'none'})\n")
    sys.stdout.write(f"file:  {run.pairs.output or folder / 'pairs.jsonl'}\n")
    return status


if __name__ == "__main__":
    main(body)
