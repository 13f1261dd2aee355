"""Plain fine-tuning: `launch/sft.py recipe.toml [--section.key value …]`."""

import sys

from launch.cli.run import main, run_offline
from protocol.config.settings import SftRun

USAGE = """usage: launch/sft.py [recipe.toml] [--section.key value …]

Rows hold messages, a list of {"role": …, "content": …} around which the chat template is put, or
text; every token of them counts. Or prompt and completion, strings or lists of messages: only the
completion counts, unless objective.completion_only_loss is false; true trains of messages the last
one alone, the assistant's. data.columns renames columns.
The default learning rate suits full fine-tuning; adapters take some 1e-4 to 1e-3."""


def body() -> int:
    """Read the recipe and see the run through."""
    return run_offline(SftRun, "sft", sys.argv[1:], USAGE)


if __name__ == "__main__":
    main(body)
