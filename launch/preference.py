"""Train on pairs or labelled answers: `launch/preference.py recipe.toml [--section.key value]`."""

import sys

from launch.cli.run import main, run_offline
from protocol.config.settings import PreferenceRun

USAGE = """usage: launch/preference.py [recipe.toml] [--section.key value …]

Rows hold prompt, chosen and rejected: strings, or lists of {"role": …, "content": …}, to which the
chat template is applied. Without a prompt column, the prompt is the common beginning of chosen and
rejected. KTO takes prompt, completion and label (true: good). data.columns renames columns;
data.prepare turns any other row into one of these:

    def pair(row):  # in my.py beside the recipe, which has under [data]: prepare = "my.py:pair"
        return {"prompt": [{"role": "user", "content": row["question"]}],
                "chosen": [{"role": "assistant", "content": row["good"]}],
                "rejected": [{"role": "assistant", "content": row["bad"]}]}

Plain SimPO: --objective.method simpo --objective.cpo_alpha 0 (at 1, TRL's default, CPO-SimPO).
The default learning rate suits full fine-tuning; adapters need about 1e-5 to 5e-4.
launch/compare.py puts finished runs side by side."""


def body() -> int:
    """Read the recipe and run it to the end."""
    return run_offline(PreferenceRun, sys.argv[1:], USAGE)


if __name__ == "__main__":
    main(body)
