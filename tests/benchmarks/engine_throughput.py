"""Throughput of the actor's engine against mlx-lm's BatchGenerator. A program, not a test.

(a) Concurrency 32: the engine, recording log-probs, against a raw BatchGenerator over the same
    prompts (each prompt appears G times there, as it would without shared prefill); without
    adapters, and with LoRA of rank 16 on both sides.
(b) G = 8 and 256-token prompts: the engine against itself with groups of one, so that every
    completion prefills its prompt.
(c) Concurrency 64, G = 8: groups that join four at a time, evenly apart, against all at once.

    python tests/benchmarks/engine_throughput.py [--repeats N] [--hidden D] [--layers L]
        [--parts a b c]

The two sides of a comparison take turns; the best of N runs of each counts. There are no stop
tokens, so every completion has the full length and both sides sample the same number of tokens.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace

from launch.processes.blas import load_openblas

load_openblas()

import mlx.nn as nn  # noqa: E402

from tests.benchmarks.sampling_runs import (  # noqa: E402
    joining_rates,
    make_engine,
    run_engine,
    run_raw,
)
from tests.benchmarks.shapes import (  # noqa: E402
    Shape,
    random_adapters,
    random_model,
    random_prompts,
)

VOCAB = 8192
Rate = Callable[[], float]  # runs once; tokens/s


def engine_rate(
    model: nn.Module, prompts: list[list[int]], group: int, tokens: int, concurrency: int
) -> Rate:
    """Return what samples `group` completions of each prompt with the engine."""

    def run() -> float:
        engine = make_engine(model, VOCAB, concurrency)
        return run_engine(engine, prompts, group, tokens).tokens_per_s

    return run


def raw_rate(
    model: nn.Module, prompts: list[list[int]], group: int, tokens: int, concurrency: int
) -> Rate:
    """Return what does the same with a raw BatchGenerator."""
    return lambda: run_raw(model, prompts, group, tokens, concurrency).tokens_per_s


def compare(name: str, ours: Rate, other: Rate, repeats: int) -> None:
    """Print tokens per second of both, the best of `repeats` turns, and their ratio."""
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):  # the first turn warms up
        for side, run in zip(rates, (ours, other), strict=True):
            side.append(run())
    report(name, max(rates[0][1:]), max(rates[1][1:]))


def report(name: str, ours: float, other: float) -> None:
    """Print tokens per second of both, and their ratio."""
    figures = {"ours": round(ours, 1), "other": round(other, 1), "ratio": round(ours / other, 3)}
    print(json.dumps({"comparison": name, **figures}), flush=True)


def against_raw(shape: Shape, repeats: int) -> None:
    """Compare the engine with BatchGenerator: without adapters, then with them."""
    model = random_model(shape)
    distinct = random_prompts(replace(shape, prompt=16), 32)
    compare(
        "(a) concurrency 32, 32 different prompts of 16 tokens, G = 1, 64 tokens each",
        engine_rate(model, distinct, 1, 64, 32),
        raw_rate(model, distinct, 1, 64, 32),
        repeats,
    )

    shared = distinct[:4]
    name = "(a) concurrency 32, 4 prompts of 16 tokens, G = 8, 64 tokens each"
    compare(
        name, engine_rate(model, shared, 8, 64, 32), raw_rate(model, shared, 8, 64, 32), repeats
    )

    random_adapters(model)
    compare(
        f"{name}, LoRA r = 16",
        engine_rate(model, shared, 8, 64, 32),
        raw_rate(model, shared, 8, 64, 32),
        repeats,
    )


def shared_prefill(shape: Shape, repeats: int) -> None:
    """Compare a prefill per group with one per completion."""
    model = random_model(shape)
    long = random_prompts(replace(shape, prompt=256), 4)
    apart = [prompt for prompt in long for _ in range(8)]
    compare(
        "(b) 4 prompts of 256 tokens, G = 8, 32 tokens each, against a prefill each",
        engine_rate(model, long, 8, 32, 32),
        engine_rate(model, apart, 1, 32, 32),
        repeats,
    )


def joining(shape: Shape, repeats: int) -> None:
    """Compare groups that join four at a time with all at once."""
    model = random_model(shape)
    random_adapters(model)
    engine = make_engine(model, VOCAB, 64)
    prompts = random_prompts(replace(shape, prompt=16), 24)

    joining_rates(engine, prompts, 8, 8, 8, 4)  # warms up
    rates = [joining_rates(engine, prompts, 8, 64, 8, 4) for _ in range(repeats)]
    report(
        "(c) concurrency 64, G = 8, LoRA r = 16, 64 tokens each: 4 groups at a time, all at once",
        max(apart for apart, _ in rates),
        max(together for _, together in rates),
    )


PARTS = {"a": against_raw, "b": shared_prefill, "c": joining}


def main() -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()

    heads = options.hidden // 32
    shape = Shape(options.hidden, options.layers, heads, 32, VOCAB, "float32", 16, 64, 4, 8)
    for part in options.parts:
        PARTS[part](shape, options.repeats)


if __name__ == "__main__":
    main()
