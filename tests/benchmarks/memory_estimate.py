"""The memory estimate of a step and the measured peak, for LoRA, DoRA and full fine-tuning.

    python tests/benchmarks/memory_estimate.py [--hidden 1024 --layers 28 --vocab 151936
        --rows 16 --length 512 --dtype bfloat16]

Random weights of Qwen3's architecture (an MLP three times as wide as the hidden size; heads of 32,
or of 128 from hidden size 1024 on; twice as many heads for queries as for keys); every token is a
completion's. The second of two steps is measured: gradients, then update. Prints a line per case:
peak, estimate, their ratio.
"""

import argparse
import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from launch.processes.blas import HINT, bound_lookahead, load_openblas

if TYPE_CHECKING:
    from learner.model.memory import MemoryEstimate


@dataclass(frozen=True)
class Case:
    """A model and a step on it."""

    hidden: int = 256
    layers: int = 4
    vocab: int = 4096
    rows: int = 4
    length: int = 256
    prompt: int = 0  # tokens before these that all rows share, computed once
    dtype: Literal["float32", "bfloat16"] = "float32"
    kind: Literal["lora", "dora", "full"] = "lora"
    head: Literal["chunked", "full"] = "chunked"
    checkpointing: bool = False
    reference: bool = False
    bits: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The entries of the model's config.json that differ from tests/tiny.py."""
        size = 128 if self.hidden >= 1024 else 32
        heads = max(2, 2 * self.hidden // size if self.hidden >= 1024 else self.hidden // size)
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": 3 * self.hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": size,
            "vocab_size": self.vocab,
        }


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, all logits": {"head": "full"},
    "lora, checkpointing": {"checkpointing": True},
    "lora, 4 bits": {"bits": 4},
    "dora": {"kind": "dora"},
    "lora, a prompt once": {"prompt": 256},
    "lora, a prompt once, checkpointing": {"prompt": 256, "checkpointing": True},
    "full": {"kind": "full"},
    "full, all logits": {"kind": "full", "head": "full"},
    "full, checkpointing": {"kind": "full", "checkpointing": True},
    "full, reference": {"kind": "full", "reference": True},
}


def measure(case: Case) -> "tuple[int, MemoryEstimate]":
    """Return the peak bytes of a step, above what was held before it, and the estimate."""
    import mlx.core as mx
    import mlx.nn as nn

    from learner.model.logprobs import completion_logprobs
    from learner.model.memory import estimate_memory
    from learner.model.reference import view
    from learner.model.shared_prompt import shared_prompt
    from learner.optim.step import Step, should_compile
    from protocol.config.settings import ModelSettings, OptimizerSettings
    from protocol.model.adapters import attach_adapters
    from tests.tiny import CONFIG, random_model

    gc.collect()
    others = mx.get_active_memory()

    model = random_model({**CONFIG, **case.config}, most=10**12)
    model.set_dtype(getattr(mx, case.dtype))
    if case.bits:
        nn.quantize(model, 32, case.bits)
    attach_adapters(model, ModelSettings(fine_tune_type=case.kind))
    reference = view(model, bypass_adapters=case.kind != "full") if case.reference else None

    ids = mx.random.randint(0, case.vocab, (case.rows, case.length))
    positions = mx.broadcast_to(mx.arange(case.length)[None], ids.shape)
    before = shared_prompt([2] * (case.prompt + 1), 1) if case.prompt else None
    mx.eval(model.parameters(), ids)

    def loss(model: nn.Module, arrays: dict[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
        ids, positions = arrays["ids"], arrays["positions"]
        logprobs, *_ = completion_logprobs(
            model, ids, positions, ids, prompt=before, head=case.head
        )
        return -logprobs.mean(), {}

    step = Step(
        model,
        OptimizerSettings(),
        total_steps=2,
        compiled=should_compile("auto"),
        gradient_checkpointing=case.checkpointing,
        reads=[reference] if reference is not None else [],
    )
    for _ in range(2):
        mx.reset_peak_memory()
        step.accumulate({"ids": ids, "positions": positions}, loss)
        step.apply()

    estimate = estimate_memory(
        model,
        {**CONFIG, **case.config},
        sequences=case.rows,
        length=case.prompt + case.length,
        completion_length=case.length,
        shared_prompt=case.prompt > 0,
        head=case.head,
        gradient_checkpointing=case.checkpointing,
        reference=reference,
    )
    return mx.get_peak_memory() - others, estimate


def main() -> None:
    """Measure every variant of the model and batch that the options describe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("hidden", "layers", "vocab", "rows", "length"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Case, name))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=Case.dtype)
    shape = Case(**vars(parser.parse_args()))
    bound_lookahead()
    if not load_openblas():
        print(HINT)

    for name, changes in VARIANTS.items():
        peak, estimate = measure(replace(shape, **changes))
        print(
            f"{name:34} peak {peak / 1e6:9.1f} MB  estimate {estimate.total / 1e6:9.1f} MB  "
            f"ratio {estimate.total / peak:.2f}  "
            + " ".join(f"{part} {size / 1e6:.1f}" for part, size in estimate.parts.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
