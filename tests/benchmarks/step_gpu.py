"""Time and peak memory of a whole LoRA step at Qwen3-0.6B's shape, against naive compiled MLX.

    python tests/benchmarks/step_gpu.py [--rows 16 --length 512 --repeats 10]

Random weights in bfloat16 (speed does not depend on them), rank 16 on every linear layer, one
micro-batch of full sequences, compiled. "naive" is cross-entropy over all logits with mlx-lm's
layers (their adapters are float32) and MLX's AdamW; `--bounded 1` gives it our look-ahead. Each way
runs in its own process and prints one JSON line; the ratios follow.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launch.processes.blas import bound_lookahead, load_openblas

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

WAYS = ("naive", "naive, bfloat16 adapters", "full", "chunked", "chunked, checkpointing")


def main() -> None:
    """Run every way, each in a child process; with --way, measure that one here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=0, help="tokens; 0: the learner's own")
    parser.add_argument("--bounded", type=int, default=0, help="1: naive with our look-ahead too")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return

    results = {way: run_child(way, options) for way in WAYS}
    for result in results.values():
        print(json.dumps(result))
    naive = results["naive"]
    for way in WAYS[1:]:
        print(
            f"{way}: memory {results[way]['peak_gb'] / naive['peak_gb']:.3f} of naive, "
            f"time {results[way]['ms'] / naive['ms']:.3f}"
        )


def run_child(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure one way in a fresh interpreter."""
    command = [sys.executable, str(Path(__file__)), "--way", way]
    for name in ("rows", "length", "layers", "hidden", "vocab", "chunk", "bounded", "repeats"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def build_model(options: argparse.Namespace) -> "nn.Module":
    """Make the model with new adapters."""
    import mlx.core as mx
    from mlx_lm.models.qwen3 import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from protocol.config.settings import ModelSettings
    from protocol.model.adapters import attach_adapters

    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="qwen3",
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            intermediate_size=3 * options.hidden,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            rms_norm_eps=1e-6,
            vocab_size=options.vocab,
            max_position_embeddings=4096,
            rope_theta=1e6,
            tie_word_embeddings=True,
        )
    )
    model.set_dtype(mx.bfloat16)

    if options.way == "naive":
        model.freeze()
        linear_to_lora_layers(model, -1, {"rank": 16, "scale": 2.0, "dropout": 0.0})
    else:
        attach_adapters(model, ModelSettings())
    mx.eval(model.parameters())
    return model


def naive_step(model: "nn.Module", arrays: dict[str, "mx.array"]) -> Callable[[], None]:
    """Compile the step that one would write with only mlx-lm and MLX."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    adam = optim.AdamW(learning_rate=1e-6, weight_decay=0.0, bias_correction=True)
    adam.init(model.trainable_parameters())
    state = [model.state, adam.state]

    def loss(model: "nn.Module", ids: mx.array, targets: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(ids).astype(mx.float32), targets).mean()

    def compiled(ids: mx.array, targets: mx.array) -> mx.array:
        value, grads = nn.value_and_grad(model, loss)(model, ids, targets)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        adam.update(model, grads)
        return value

    step = mx.compile(compiled, inputs=state, outputs=state)

    def run() -> None:
        mx.eval(step(arrays["input_ids"], arrays["targets"]), state)

    return run


def our_step(model: "nn.Module", arrays: dict[str, "mx.array"], way: str) -> Callable[[], None]:
    """Return the learner's step, with the head and checkpointing that `way` names."""
    import mlx.core as mx

    from learner.model.logprobs import completion_logprobs
    from learner.optim.step import Step
    from protocol.config.settings import OptimizerSettings

    step = Step(
        model,
        OptimizerSettings(),
        total_steps=1000,
        compiled=True,
        gradient_checkpointing=way.endswith("checkpointing"),
    )

    def loss(model: "nn.Module", arrays: dict[str, mx.array]) -> tuple[mx.array, dict]:
        logprobs, *_ = completion_logprobs(
            model,
            arrays["input_ids"],
            arrays["positions"],
            arrays["targets"],
            head="full" if way == "full" else "chunked",
        )
        return -logprobs.mean(), {}

    def run() -> None:
        step.accumulate(arrays, loss)
        step.apply()
        mx.synchronize()

    return run


def measure(options: argparse.Namespace) -> dict[str, float | str]:
    """Return the median time of a step and the peak memory, after one warm-up."""
    load_openblas()
    if not options.way.startswith("naive") or options.bounded:
        bound_lookahead()

    import mlx.core as mx

    from learner.model import chunked

    chunked.CHUNK = options.chunk or chunked.CHUNK
    model = build_model(options)
    shape = (options.rows, options.length)
    arrays = {
        "input_ids": mx.random.randint(0, options.vocab, shape),
        "targets": mx.random.randint(0, options.vocab, shape),
        "positions": mx.broadcast_to(mx.arange(options.length)[None], shape),
    }
    mx.eval(arrays)

    naive = options.way.startswith("naive")
    run = naive_step(model, arrays) if naive else our_step(model, arrays, options.way)
    run()
    mx.clear_cache()
    mx.reset_peak_memory()

    times: list[float] = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)

    return {
        "way": options.way,
        "ms": 1000 * sorted(times)[len(times) // 2],
        "peak_gb": mx.get_peak_memory() / 1e9,
    }


if __name__ == "__main__":
    main()
