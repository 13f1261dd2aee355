"""The models that the GPU benchmarks measure: Qwen3-0.6B's shape, and a tiny one for the CPU.

Weights are random, because speed and memory do not depend on them. Words stand for tokens one to
one, so that a prompt has as many tokens as words. The stop token lies outside the model's
vocabulary: it is never sampled, and every completion has its full length.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.nn as nn


@dataclass(frozen=True)
class Shape:
    """A model, and the batches that it is measured on. Lengths are in tokens."""

    hidden: int
    layers: int
    heads: int  # twice as many for queries as for keys
    head_dim: int
    vocab: int
    dtype: str
    prompt: int
    completion: int
    prompts: int  # per batch
    group: int  # completions per prompt

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return {
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": 3 * self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "head_dim": self.head_dim,
            "rms_norm_eps": 1e-6,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "eos_token_id": self.vocab,
        }


SHAPES = {
    "qwen3-0.6b": Shape(1024, 28, 16, 128, 151_936, "bfloat16", 111, 256, 8, 8),
    "tiny": Shape(64, 2, 4, 16, 512, "float32", 11, 16, 2, 4),
}


def random_model(shape: Shape) -> "nn.Module":
    """Return the model in eval mode: weights normal with deviation 0.02, and 1 for the norms."""
    import mlx.core as mx
    from mlx_lm.models.qwen3 import Model, ModelArgs

    from protocol.model.snapshots import named_arrays

    mx.random.seed(0)
    dtype = getattr(mx, shape.dtype)
    model = Model(ModelArgs.from_dict(shape.config))
    weights = [
        (name, mx.ones(value.shape, dtype) if value.ndim == 1 else _normal(value.shape, dtype))
        for name, value in named_arrays(model.parameters()).items()
    ]
    model.load_weights(weights)
    model.eval()
    return model


def _normal(shape: tuple[int, ...], dtype: Any) -> Any:
    import mlx.core as mx

    return (0.02 * mx.random.normal(shape)).astype(dtype)


def random_adapters(model: "nn.Module", rank: int = 16) -> None:
    """Give every linear layer a LoRA adapter whose B is not zero, as after some training."""
    import mlx.core as mx
    from mlx.utils import tree_map

    from protocol.config.settings import LoraSettings, ModelSettings
    from protocol.model.adapters import attach_adapters

    attach_adapters(model, ModelSettings(lora=LoraSettings(rank=rank)))
    model.update(tree_map(lambda a: _normal(a.shape, a.dtype), model.trainable_parameters()))
    model.eval()
    mx.eval(model.parameters())


def random_prompts(shape: Shape, count: int, spread: int = 0) -> list[list[int]]:
    """Return prompts of `shape.prompt` tokens, give or take `spread`."""
    rng = random.Random(1)
    lengths = [shape.prompt + rng.randint(-spread, spread) for _ in range(count)]
    return [[rng.randrange(shape.vocab) for _ in range(length)] for length in lengths]


def write_model(folder: Path, shape: Shape) -> None:
    """Write model and tokenizer as mlx-lm reads them."""
    import mlx.core as mx
    from tokenizers import Tokenizer, models, pre_tokenizers

    from protocol.model.snapshots import named_arrays

    folder.mkdir(parents=True, exist_ok=True)
    weights = named_arrays(random_model(shape).parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(shape.config))

    words = {f"w{index}": index for index in range(shape.vocab)} | {"<eos>": shape.vocab}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_rows(path: Path, shape: Shape, count: int = 512) -> None:
    """Write prompts of about `shape.prompt` tokens, one JSON object per line."""
    prompts = random_prompts(shape, count, spread=shape.prompt // 8)
    lines = [{"prompt": " ".join(f"w{token}" for token in prompt)} for prompt in prompts]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def main() -> None:
    """Write a model folder and its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    options = parser.parse_args()
    write_model(options.folder / "model", SHAPES[options.shape])
    write_rows(options.folder / "rows.jsonl", SHAPES[options.shape])


if __name__ == "__main__":
    main()
