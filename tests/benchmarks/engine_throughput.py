"""Throughput of the actor's engine against mlx-lm's BatchGenerator. A program, not a test.

(a) Concurrency 32: the engine, recording log-probs, against a raw BatchGenerator over the same
    prompts (each prompt appears G times there, as it would without shared prefill).
(b) G = 8 and 256-token prompts: the engine against itself with groups of one, so that every
    completion prefills its prompt.

    python tests/benchmarks/engine_throughput.py [--repeats N] [--hidden D] [--layers L]

The two sides of a comparison take turns; the best of N runs of each counts. There are no stop
tokens, so every completion has the full length and both sides sample the same number of tokens.
"""

import argparse
import json
import time
from collections.abc import Callable

from launch.processes.blas import load_openblas

load_openblas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.models import qwen3  # noqa: E402
from mlx_lm.sample_utils import make_sampler  # noqa: E402

from actors.engine.base import GenerationRequest  # noqa: E402
from actors.engine.mlx_engine import MlxEngine  # noqa: E402
from protocol.messages.parts import Sampling  # noqa: E402

VOCAB = 8192


def build_model(hidden: int, layers: int) -> nn.Module:
    """Return a Qwen3 with random float32 weights."""
    mx.random.seed(0)
    model = qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=3 * hidden,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64,
            head_dim=32,
            rms_norm_eps=1e-6,
            vocab_size=VOCAB,
            max_position_embeddings=4096,
            rope_theta=1e6,
            tie_word_embeddings=True,
        )
    )
    mx.eval(model.parameters())
    model.eval()
    return model


def prompts_of(count: int, length: int) -> list[list[int]]:
    """Return `count` different prompts of `length` tokens."""
    mx.random.seed(1)
    return mx.random.randint(0, VOCAB, (count, length)).tolist()  # type: ignore[return-value]


def run_engine(
    model: nn.Module, prompts: list[list[int]], group: int, tokens: int, concurrency: int
) -> tuple[int, float]:
    """Sample `group` completions of each prompt; return (tokens, seconds)."""
    engine = MlxEngine(
        model, stop_token_ids=[], vocab_size=VOCAB, max_concurrent_completions=concurrency
    )
    engine.set_policy(lambda: None, 0, "base")
    sampling = Sampling(num_generations=group, max_completion_length=tokens)
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add(GenerationRequest(key=i, prompt_ids=prompt, sampling=sampling, seed=i))
    sampled = 0
    while (step := engine.step()).made_progress:
        sampled += step.tokens
    return sampled, time.perf_counter() - start


def run_raw(
    model: nn.Module, prompts: list[list[int]], group: int, tokens: int, concurrency: int
) -> tuple[int, float]:
    """Do the same with a raw BatchGenerator, without recording log-probs."""
    generator = BatchGenerator(
        model, max_tokens=tokens, sampler=make_sampler(temp=1.0), completion_batch_size=concurrency
    )
    start = time.perf_counter()
    generator.insert([list(prompt) for prompt in prompts for _ in range(group)])
    sampled = 0
    while responses := generator.next_generated():
        sampled += len(responses)
    elapsed = time.perf_counter() - start
    generator.close()
    return sampled, elapsed


def compare(
    name: str,
    ours: Callable[[], tuple[int, float]],
    other: Callable[[], tuple[int, float]],
    repeats: int,
) -> None:
    """Print tokens per second of both, the best of `repeats` turns, and their ratio."""
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):  # the first turn warms up
        for side, run in zip(rates, (ours, other), strict=True):
            tokens, elapsed = run()
            side.append(tokens / elapsed)
    best = [max(side[1:]) for side in rates]
    figures = {"ours": round(best[0], 1), "other": round(best[1], 1)}
    print(json.dumps({"comparison": name, **figures, "ratio": round(best[0] / best[1], 3)}))


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()

    model = build_model(options.hidden, options.layers)
    distinct = prompts_of(32, 16)
    compare(
        "(a) concurrency 32, 32 different prompts of 16 tokens, G = 1, 64 tokens each",
        lambda: run_engine(model, distinct, 1, 64, 32),
        lambda: run_raw(model, distinct, 1, 64, 32),
        options.repeats,
    )

    shared = prompts_of(4, 16)
    compare(
        "(a) concurrency 32, 4 prompts of 16 tokens, G = 8, 64 tokens each",
        lambda: run_engine(model, shared, 8, 64, 32),
        lambda: run_raw(model, shared, 8, 64, 32),
        options.repeats,
    )

    long = prompts_of(4, 256)
    apart = [prompt for prompt in long for _ in range(8)]
    compare(
        "(b) 4 prompts of 256 tokens, G = 8, 32 tokens each, against a prefill each",
        lambda: run_engine(model, long, 8, 32, 32),
        lambda: run_engine(model, apart, 1, 32, 32),
        options.repeats,
    )


if __name__ == "__main__":
    main()
