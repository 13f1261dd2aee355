"""The estimate of an actor's memory beside the measured peak of its engine.

    python tests/benchmarks/actor_memory.py [--hidden 1024 --layers 28 --vocab 151936
        --dtype bfloat16]

Random weights of Qwen3's architecture with LoRA adapters, as in memory_estimate.py. Every case
samples twice as many completions as it has rows, so that groups join where others have left.
Prints a line per case: peak, estimate, their ratio.
"""

import argparse
import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from launch.processes.blas import HINT, load_openblas

if TYPE_CHECKING:
    from actors.capacity import ActorMemory


@dataclass(frozen=True)
class Case:
    """A model and what is sampled from it."""

    hidden: int = 256
    layers: int = 4
    vocab: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    rows: int = 64
    prompt: int = 111
    completion: int = 32
    group: int = 8  # completions per prompt


VARIANTS: dict[str, dict[str, int]] = {
    "64 rows": {},
    "256 rows": {"rows": 256},
    "long completions": {"completion": 128, "rows": 32},
    "long prompts": {"prompt": 1024, "rows": 32},
    "prompts longer than a chunk": {"prompt": 3000, "rows": 16},
    "one group": {"rows": 8},
    "a long group": {"rows": 8, "prompt": 4096, "completion": 2048},
    "groups of one, as in evaluation": {"group": 1, "completion": 16},
}


def measure(case: Case) -> "tuple[int, ActorMemory]":
    """Return the peak bytes of an actor's engine, above what was held before, and the estimate."""
    import mlx.core as mx

    from actors.capacity import estimate_memory
    from actors.engine.base import GenerationRequest
    from actors.engine.mlx_engine import MlxEngine
    from protocol.config.settings import ModelSettings
    from protocol.messages.parts import Sampling
    from protocol.model.adapters import attach_adapters
    from tests.benchmarks.memory_estimate import Case as Shape
    from tests.tiny import CONFIG, random_model

    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory()

    shape = Shape(hidden=case.hidden, layers=case.layers, vocab=case.vocab)
    config = {**CONFIG, **shape.config, "max_position_embeddings": 8192}
    model = random_model(config, most=10**12)
    model.set_dtype(getattr(mx, case.dtype))
    attach_adapters(model, ModelSettings())
    mx.eval(model.parameters())
    gc.collect()
    mx.reset_peak_memory()

    engine = MlxEngine(
        model, stop_token_ids=[], vocab_size=case.vocab, max_concurrent_completions=case.rows
    )
    gc.collect()
    engine.set_policy(lambda: None, 0, "base")
    sampling = Sampling(num_generations=case.group, max_completion_length=case.completion)
    for key in range(2 * case.rows // case.group):
        prompt = [(7 * key + i) % case.vocab for i in range(case.prompt)]
        engine.add(GenerationRequest(key=key, prompt_ids=prompt, sampling=sampling, seed=key))
    while engine.step().made_progress:
        pass

    estimate = estimate_memory(
        model,
        config,
        max_prompt=case.prompt,
        max_tokens=case.prompt + case.completion,
        num_generations=case.group,
        prefill_step_size=2048,
    )
    return mx.get_peak_memory() - others, estimate


def main() -> None:
    """Measure every variant of the model that the options describe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("hidden", "layers", "vocab"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Case, name))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=Case.dtype)
    base = Case(**vars(parser.parse_args()))
    if not load_openblas():
        print(HINT)

    for name, changes in VARIANTS.items():
        case = replace(base, **changes)
        peak, estimate = measure(case)
        total = estimate.total(case.rows)
        print(
            f"{name:31} peak {peak / 1e6:9.1f} MB  estimate {total / 1e6:9.1f} MB  "
            f"ratio {total / peak:.2f}  weights {estimate.weights / 1e6:.1f} "
            f"slots {case.rows * estimate.slot / 1e6:.1f} "
            f"sampling {case.rows * estimate.sampling / 1e6:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
