"""Peak memory and time of the memory-bounded head against full logits, gradient included.

    python tests/benchmarks/head_memory.py [--vocab 151936 --hidden 1024 --tokens 4096]

The head alone in float32, frozen and (chunked only) trainable: log-probs of N tokens from hidden
states, and the gradient with respect to those. Each way runs in its own process, so that none sees
another's memory. Prints one JSON line per way, then the ratios.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from launch.processes.blas import HINT, load_openblas

WAYS = ("full", "chunked", "chunked, trainable")


def main() -> None:
    """Run every way, each in a child process; with --way, measure that one here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=0, choices=(0, 4, 8))
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return

    results = [run_child(way, options) for way in WAYS]
    for result in results:
        print(json.dumps(result))
    full, chunked = results[0], results[1]
    print(
        f"extra peak {chunked['extra_peak_mb'] / full['extra_peak_mb']:.3f} of full logits, "
        f"time {chunked['seconds'] / full['seconds']:.2f}"
    )


def run_child(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure one way in a fresh interpreter."""
    command = [sys.executable, str(Path(__file__)), "--way", way]
    for name in ("vocab", "hidden", "tokens", "bits"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, float | str]:
    """Time one gradient, and take its peak memory above what was held before."""
    if not load_openblas():
        print(HINT, file=sys.stderr)
    import mlx.core as mx
    import mlx.nn as nn

    from learner.model.logprobs import completion_logprobs

    class HiddenThenHead(nn.Module):
        """A trunk that passes hidden states through, and an untied head."""

        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Identity()
            self.lm_head = nn.Linear(options.hidden, options.vocab, bias=False)

        def __call__(self, hidden: mx.array) -> mx.array:
            return self.lm_head(self.model(hidden))

    mx.random.seed(0)
    model = HiddenThenHead()
    if options.bits:
        nn.quantize(model, 64, options.bits)
    trainable = options.way.endswith("trainable")
    if not trainable:
        model.freeze()

    hidden = mx.random.normal((1, options.tokens, options.hidden))
    targets = mx.random.randint(0, options.vocab, (1, options.tokens))
    positions = mx.arange(options.tokens)[None]
    mx.eval(model.parameters(), hidden, targets, positions)

    def loss(hidden: mx.array, parameters: dict) -> mx.array:
        model.update(parameters)
        logprobs, *_ = completion_logprobs(
            model, hidden, positions, targets, head="full" if options.way == "full" else "chunked"
        )
        return -logprobs.mean()

    mx.reset_peak_memory()
    held = mx.get_active_memory()
    start = time.perf_counter()
    value, grads = mx.value_and_grad(loss, argnums=(0, 1))(hidden, model.trainable_parameters())
    mx.eval(value, grads)
    seconds = time.perf_counter() - start

    return {
        "way": options.way,
        "loss": float(value),
        "extra_peak_mb": (mx.get_peak_memory() - held) / 1e6,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
