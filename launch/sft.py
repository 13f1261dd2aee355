"""Plain fine-tuning: `launch/sft.py recipe.toml [--section.key value …]`."""

import sys

from launch.cli import main, run_offline
from protocol.settings import SftRun

USAGE = "usage: launch/sft.py [recipe.toml] [--section.key value …]"


def body() -> int:
    """Read the recipe and see the run through."""
    return run_offline(SftRun, "sft", sys.argv[1:], USAGE)


if __name__ == "__main__":
    main(body)
