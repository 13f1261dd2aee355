"""Time and memory of a GRPO micro-batch with the prompt computed once, against whole sequences.

    python tests/benchmarks/shared_prompt.py [--shape 256,64,8 ...] [--checkpointing] [--hidden 512
        --layers 8 --vocab 32768 --kind lora --head chunked --dtype float32 --repeats 3]

A shape is P,C,G: tokens of the prompt, tokens of each completion, number of completions. Random
weights of Qwen3's architecture; loss and gradients of one micro-batch, no update. The best of the
repeats counts, after one warm-up; the peak is what a micro-batch adds to weights and arrays.
"""

import argparse
import gc
import time
from typing import Any

from launch.processes.blas import HINT, load_openblas

SHAPES = ["64,64,8", "256,64,8", "256,256,8"]


def measure(args: argparse.Namespace, shape: str, shared: bool) -> tuple[float, float]:
    """Return the seconds and the peak bytes of a micro-batch."""
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np

    from learner.model.batches import to_device, token_batch
    from learner.model.logprobs import completion_logprobs
    from learner.model.shared_prompt import shared_prompt
    from learner.optim.step import Step, should_compile
    from protocol.config.settings import ModelSettings, OptimizerSettings
    from protocol.model.adapters import attach_adapters
    from tests.tiny import tiny_model

    prompt_length, length, group = (int(number) for number in shape.split(","))
    model = tiny_model(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        intermediate_size=3 * args.hidden,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
        vocab_size=args.vocab,
        max_position_embeddings=4096,
    )
    model.set_dtype(getattr(mx, args.dtype))
    attach_adapters(model, ModelSettings(fine_tune_type=args.kind))
    model.train()

    rng = np.random.default_rng(0)
    prompt = rng.integers(2, args.vocab, prompt_length, dtype=np.int32)
    completions = list(rng.integers(2, args.vocab, (group, length), dtype=np.int32))
    start = prompt[-1:] if shared else prompt
    tokens = token_batch([start] * group, completions, length_bucket=32)
    arrays: dict[str, Any] = {**to_device(tokens)}
    if shared:
        arrays["prompt"] = shared_prompt(prompt, 32)

    def loss(model: nn.Module, arrays: dict[str, Any]) -> tuple[mx.array, dict[str, mx.array]]:
        tokens = (arrays["input_ids"], arrays["positions"], arrays["targets"])
        logprobs, *_ = completion_logprobs(
            model, *tokens, prompt=arrays.get("prompt"), head=args.head, entropy=True
        )
        return -(logprobs * arrays["mask"]).mean(), {}

    step = Step(
        model,
        OptimizerSettings(),
        total_steps=1,
        compiled=should_compile("auto"),
        gradient_checkpointing=args.checkpointing,
    )
    mx.eval(model.parameters(), arrays)

    times: list[float] = []
    peaks: list[int] = []
    for _ in range(args.repeats + 1):
        gc.collect()
        held = mx.get_active_memory()
        mx.reset_peak_memory()

        begun = time.perf_counter()
        value, _ = step.accumulate(arrays, loss)
        mx.eval(value, step.gradients())
        times.append(time.perf_counter() - begun)
        peaks.append(mx.get_peak_memory() - held)
        step.skip()

    return min(times[1:]), max(peaks[1:])


def main() -> None:
    """Print a line per shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--kind", choices=["lora", "dora", "full"], default="lora")
    parser.add_argument("--head", choices=["chunked", "full"], default="chunked")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not load_openblas():
        print(HINT)

    print(f"{'P,C,G':>12} {'whole':>20} {'prompt once':>20} {'faster':>7} {'memory':>7}")
    for shape in args.shape:
        whole, once = measure(args, shape, False), measure(args, shape, True)
        cells = [f"{seconds:.2f} s {peak / 2**20:.0f} MiB" for seconds, peak in (whole, once)]
        ratios = f"{whole[0] / once[0]:.2f}x {once[1] / whole[1]:.2f}"
        print(f"{shape:>12} {cells[0]:>20} {cells[1]:>20} {ratios:>14}", flush=True)


if __name__ == "__main__":
    main()
