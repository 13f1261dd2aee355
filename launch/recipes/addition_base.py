"""Make the untrained model that `addition_sft.toml` trains: `addition_base.py FOLDER [--seed N]`.

A Qwen3-architecture model of 624,448 parameters with random weights, and a byte-level tokenizer of
our own with ChatML's special tokens: 256 bytes and 6 specials.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (mlx, mlx-lm and tokenizers are only partly typed)

import argparse
import json
from pathlib import Path
from typing import cast

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-06,
    "vocab_size": 262,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "bos_token_id": None,
    "torch_dtype": "float32",
}
SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|reserved_0|>",
    "<|reserved_1|>",
    "<|reserved_2|>",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges: token ID = place in the byte alphabet."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 258, "pad_token_id": 256}) + "\n"
    )


def write_weights(folder: Path, seed: int) -> None:
    """Write random weights: normal, 0.02, and 1 for the norms, as Qwen3 starts."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.qwen3 import Model, ModelArgs

    keys = iter(mx.random.split(mx.random.key(seed), 64))
    model = Model(ModelArgs.from_dict(CONFIG))
    weights = {
        name: mx.ones_like(value)
        if name.endswith("norm.weight")
        else 0.02 * mx.random.normal(value.shape, key=next(keys))
        for name, value in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def main() -> None:
    """Write configuration, tokenizer and weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    write_tokenizer(args.folder)
    write_weights(args.folder, args.seed)


if __name__ == "__main__":
    main()
