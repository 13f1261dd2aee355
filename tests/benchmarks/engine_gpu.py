"""The engine alone at Qwen3-0.6B's shape: time of a decode step and memory, beside BatchGenerator.

    python tests/benchmarks/engine_gpu.py [--parts engine raw joins] [--rows 64 256]
        [--deterministic] [--shape tiny]

LoRA of rank 16 with random A and B, prompts of 111 tokens, 8 completions of 256 tokens each.
"engine" draws by keys and records log-probs; "raw" is mlx-lm's BatchGenerator over the same model
and prompts, without either. "joins" compares groups that join four at a time, evenly apart, with
all at once, at the smallest of `--rows`. Each measurement runs in a process of its own and prints a
line of JSON; memory is what MLX held at most, its buffer cache included, and its peak.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.processes.blas import load_openblas
from tests.benchmarks.shapes import SHAPES, Shape, random_adapters, random_model, random_prompts

PARTS = ("engine", "raw", "joins")
WAVE = 4  # groups that join together


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one part at one number of rows, after a run that warms up."""
    load_openblas()

    import mlx.core as mx

    from tests.benchmarks import sampling_runs as runs

    shape, rows, part = SHAPES[options.shape], options.rows[0], options.parts[0]
    model = random_model(shape)
    random_adapters(model)
    model_gb = mx.get_active_memory() / 1e9
    mx.clear_cache()
    mx.reset_peak_memory()

    groups = rows // shape.group
    extra = {"deterministic": True} if options.deterministic else {}
    if part == "joins":
        return joins(model, shape, rows, extra)

    prompts = random_prompts(shape, groups)
    done: list[runs.Timing] = []
    for _ in range(2):  # the first run compiles, and fills the buffer cache as a long run does
        if part == "engine":
            engine = runs.make_engine(model, shape.vocab, rows, **extra)
            done.append(runs.run_engine(engine, prompts, shape.group, shape.completion))
        else:
            done.append(runs.run_raw(model, prompts, shape.group, shape.completion, rows))

    mean, median = done[1].decode_ms()
    return {
        "ms_per_step": round(mean, 3),
        "ms_per_step_median": round(median, 3),
        "tokens_per_s": round(done[1].tokens_per_s, 1),
        "first_run_s": round(done[0].seconds, 2),
        "second_run_s": round(done[1].seconds, 2),
        "model_gb": round(model_gb, 3),
        "held_gb": round(max(run.held_bytes for run in done) / 1e9, 3),
        "peak_gb": round(mx.get_peak_memory() / 1e9, 3),
        "cache_gb": round(mx.get_cache_memory() / 1e9, 3),
    }


def joins(model: Any, shape: Shape, rows: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Compare groups that join `WAVE` at a time with all at once."""
    from tests.benchmarks import sampling_runs as runs

    engine = runs.make_engine(model, shape.vocab, rows, **extra)
    in_flight = rows // shape.group
    prompts = random_prompts(shape, 3 * in_flight)
    short = max(2, shape.completion // 8)
    runs.joining_rates(engine, prompts, shape.group, short, in_flight, WAVE)  # compiles

    apart, together = runs.joining_rates(
        engine, prompts, shape.group, shape.completion, in_flight, WAVE
    )
    return {
        "tokens_per_s_apart": round(apart, 1),
        "tokens_per_s_together": round(together, 1),
        "ratio": round(apart / together, 3),
    }


def run_child(options: argparse.Namespace, part: str, rows: int) -> None:
    """Measure in a fresh interpreter, which prints its figures."""
    command = [sys.executable, str(Path(__file__)), "--here", "--shape", options.shape]
    command += ["--deterministic"] * options.deterministic
    subprocess.run([*command, "--parts", part, "--rows", str(rows)], check=True)


def main() -> None:
    """Measure every part asked for, each in a child process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--deterministic", action="store_true", help="the engine's fixed shapes")
    parser.add_argument("--here", action="store_true", help="measure one part in this process")
    options = parser.parse_args()
    if options.here:
        asked = {"part": options.parts[0], "rows": options.rows[0], "shape": options.shape}
        print(json.dumps({**asked, **measure(options)}), flush=True)
        return

    for part in options.parts:
        for rows in options.rows if part != "joins" else [min(options.rows)]:
            run_child(options, part, rows)


if __name__ == "__main__":
    main()
