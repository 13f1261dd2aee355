"""Asynchronous GRPO: `launch/grpo.py [recipe.toml] [--section.key value …]`.

Without a recipe it runs launch/recipes/addition.toml, which needs no network. It starts a learner,
the local actors and, for reward functions named by file or module, reward servers; it restarts
those that die. Exit status 0: finished; 130: stopped on request; 1: failed; 2: refused settings.
"""

import sys
from pathlib import Path

from launch.cli.command_line import read_command_line
from launch.cli.run import main, supervise
from launch.processes.specs import online_processes
from protocol.config.settings import GrpoRun
from protocol.transport.endpoints import ipc_folder

USAGE = "usage: launch/grpo.py [recipe.toml] [--section.key value …]"
DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "addition.toml"


def body() -> int:
    """Read the recipe and run it to the end."""
    run, folder = read_command_line(GrpoRun, sys.argv[1:], USAGE, DEFAULT_RECIPE)
    with ipc_folder() as sockets:
        return supervise(folder, run, online_processes(run, folder, sockets))


if __name__ == "__main__":
    main(body)
