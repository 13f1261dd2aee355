"""How each model type of mlx-lm decodes: `python -m tests.acceptance.model_types [TYPE ...]`.

Every type is built tiny, with random weights in float32, and printed as a row of a Markdown table:
the way it decodes and why not in a faster one; by how much the log-probs of sampled tokens differ
at most between the engine and decoding alone, and between decoding alone and the learner's pass
without caches. Then the types that could not be built, and how many decode in which way.
"""

import sys
from collections import Counter
from importlib.metadata import version

from actors.engine.decoding.trials import Trial, decoding_path
from tests.actors.engine.alone import differences
from tests.architectures import ARCHITECTURES, NOT_BUILT, build, vocab_size


def main(model_types: list[str]) -> None:
    """Print the table of `model_types`."""
    print(f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}\n")
    print("| model type | decodes | engine to alone | learner to alone | why not faster |")
    print("|---|---|---|---|---|")

    ways: Counter[str] = Counter()
    for model_type in model_types:
        model = build(model_type)
        way, reason = decoding_path(Trial(model))
        engine, learner = differences(model, vocab_size(model_type))
        ways[way] += 1
        print(f"| `{model_type}` | {way} | {engine:.0e} | {learner:.0e} | {reason} |", flush=True)

    for model_type, reason in NOT_BUILT.items():
        print(f"| `{model_type}` | not tried | | | {reason} |")
    print("\n" + ", ".join(f"{count} {way}" for way, count in ways.most_common()))


if __name__ == "__main__":
    main(sys.argv[1:] or list(ARCHITECTURES))
