"""What `run.deterministic` costs an actor: the engine in fixed shapes against free ones.

    uv run tests/benchmarks/deterministic_cost.py [--rows 256 --prompts 128 --rounds 8]

Samples the default recipe's prompts, 8 completions each of up to 8 tokens, without a learner, both
ways in turns and in the same process (CPU, float32), with kernels that suit both. Prints each
round's process time and its ratio, and the median ratio. Process time, not the clock's, because
it is little moved by what else the machine does.
"""

# ruff: noqa: E402 (OpenBLAS comes before mlx)
import os

from launch.processes.blas import deterministic_kernels, load_openblas

os.environ.update(deterministic_kernels())
load_openblas()

import argparse
import itertools
import time
from pathlib import Path
from statistics import median

import launch.recipes
from actors.engine.base import GenerationRequest
from actors.engine.mlx_engine import MlxEngine
from launch.recipes.addition import train_rows
from protocol.config.settings import ModelSettings
from protocol.messages.parts import Sampling
from protocol.model.policy import LoadedPolicy, load_policy

GROUP = COMPLETION = 8  # completions of a prompt, and their most tokens
MODEL = Path(launch.recipes.__path__[0]).parent / "models" / "addition"


def requests(policy: LoadedPolicy, count: int) -> list[GenerationRequest]:
    """Return a request for each of the recipe's first `count` prompts."""
    sampling = Sampling(num_generations=GROUP, max_completion_length=COMPLETION)
    return [
        GenerationRequest(
            key=number,
            prompt_ids=list(
                policy.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
            ),
            sampling=sampling,
            seed=number,
        )
        for number, row in enumerate(itertools.islice(train_rows(), count))
    ]


def sample(
    policy: LoadedPolicy, waiting: list[GenerationRequest], rows: int, *, deterministic: bool
) -> tuple[float, int]:
    """Sample all requests as an actor would; return the process time in s, and the tokens."""
    engine = MlxEngine(
        policy.model,
        stop_token_ids=policy.stop_token_ids,
        vocab_size=policy.vocab_size,
        max_concurrent_completions=rows,
        max_tokens=max(len(each.prompt_ids) for each in waiting) + COMPLETION,
        deterministic=deterministic,
    )
    engine.set_policy(lambda: None, 0, "base")

    left, tokens, start = iter(waiting), 0, time.process_time()
    while True:
        for request in itertools.islice(left, engine.free_completions // GROUP):
            engine.add(request)
        step = engine.step()
        tokens += step.tokens
        if not step.made_progress:
            return time.process_time() - start, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="completions at a time")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()

    policy = load_policy(ModelSettings(path=str(MODEL)), seed=1)
    waiting = requests(policy, options.prompts)
    ratios: list[float] = []
    for number in range(options.rounds + 1):
        taken: dict[bool, tuple[float, int]] = {}
        for deterministic in (number % 2 == 0, number % 2 == 1):  # neither always comes first
            taken[deterministic] = sample(
                policy, waiting, options.rows, deterministic=deterministic
            )
        if not number:
            continue  # a first round, in which caches fill

        (fixed, tokens), (free, free_tokens) = taken[True], taken[False]
        ratios.append((fixed / tokens) / (free / free_tokens))
        print(
            f"free {free:.3f} s, {free_tokens} tokens; "
            f"fixed {fixed:.3f} s, {tokens} tokens; ratio {ratios[-1]:.3f}"
        )
    print(f"median ratio of process time per token: {median(ratios):.3f}")


if __name__ == "__main__":
    main()
