"""Supervised fine-tuning: `launch/sft.py recipe.toml [--section.key value …]`."""

import sys

from launch.cli.run import main, run_offline
from protocol.config.settings import SftRun

USAGE = """usage: launch/sft.py [recipe.toml] [--section.key value …]

Rows hold messages, a list of {"role": …, "content": …} to which the chat template is applied, or
text; every token is trained on. Or they hold prompt and completion, strings or lists of messages:
only the completion is trained on, unless objective.completion_only_loss is false. With true, only
the last message of a list, the assistant's, is trained on. data.columns renames columns.
The default learning rate suits full fine-tuning; adapters need about 1e-4 to 1e-3."""


def body() -> int:
    """Read the recipe and run it to the end."""
    return run_offline(SftRun, sys.argv[1:], USAGE)


if __name__ == "__main__":
    main(body)
