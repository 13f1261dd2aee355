"""What `make_curves.py` trains: a small model, adapters, rows and rollouts, drawn from seeds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny_tokenizer

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 279,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "hidden_act": "silu",
    "attention_bias": False, "torch_dtype": "float32",
}  # fmt: skip
LORA = {
    "r": 4, "lora_alpha": 8, "scale": 2.0,
    "target_modules": [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ],
}  # fmt: skip
ROWS, GENERATIONS, MAX_COMPLETION_LENGTH = 32, 4, 16
_WORDS = ["the", "blue", "hello", "is", "12", "42", "sky", "tree", "red", "sum", "7", "and"]


def shapes() -> dict[str, tuple[int, int]]:
    """Return the (out, in) shape of each linear layer, by Transformers' name."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    heads = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    groups = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    kinds = {
        "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (groups, hidden),
        "self_attn.v_proj": (groups, hidden), "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    layers = range(CONFIG["num_hidden_layers"])
    return {f"model.layers.{i}.{kind}": shape for i in layers for kind, shape in kinds.items()}


def write_model(folder: Path) -> None:
    """Write the model in Transformers' format, which is mlx-lm's too."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    hidden, head = CONFIG["hidden_size"], CONFIG["head_dim"]
    tensors = {"model.embed_tokens.weight": 0.3 * rng.standard_normal((279, hidden))}
    for name, shape in shapes().items():
        tensors[f"{name}.weight"] = rng.standard_normal(shape) / shape[1] ** 0.5
    for i in range(CONFIG["num_hidden_layers"]):
        for name, size in (
            ("input_layernorm", hidden), ("post_attention_layernorm", hidden),
            ("self_attn.q_norm", head), ("self_attn.k_norm", head),
        ):  # fmt: skip
            tensors[f"model.layers.{i}.{name}.weight"] = rng.uniform(0.8, 1.2, size)
    tensors["model.norm.weight"] = rng.uniform(0.8, 1.2, hidden)
    tokenizer = tiny_tokenizer.build()
    tokenizer.save_pretrained(folder)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "config.json").write_text(json.dumps(CONFIG | special, indent=1) + "\n")
    floats = {name: array.astype(np.float32) for name, array in tensors.items()}
    save_file(floats, folder / "model.safetensors", metadata={"format": "pt"})


def initial_adapter() -> dict[str, np.ndarray]:
    """Return A (r, in) and B (out, r) float32 of every linear layer; B is not zero."""
    rng = np.random.default_rng(2)
    tensors = {}
    for name, (out, width) in shapes().items():
        a = rng.uniform(-1, 1, (LORA["r"], width)) / width**0.5
        tensors[f"{name}.lora_A.weight"] = a.astype(np.float32)
        b = 0.1 * rng.standard_normal((out, LORA["r"]))
        tensors[f"{name}.lora_B.weight"] = b.astype(np.float32)
    return tensors


def _text(rng: np.random.Generator, most: int) -> str:
    return " ".join(rng.choice(_WORDS, rng.integers(1, most + 1)))


def rows() -> list[dict[str, str]]:
    """Return rows of plain text: prompt, chosen, rejected."""
    rng = np.random.default_rng(3)
    return [
        {"prompt": f"{i} {_text(rng, 6)}", "chosen": " " + _text(rng, 6), "rejected": _text(rng, 6)}
        for i in range(ROWS)
    ]


class Rollouts:
    """Fixed completions and rewards of every row, as TRL's `rollout_func` and reward function."""

    def __init__(self, rows: list[dict[str, str]], tokenizer: Any) -> None:
        rng = np.random.default_rng(4)
        self._tokenizer = tokenizer
        self._row_of = {row["prompt"]: i for i, row in enumerate(rows)}
        self._found: dict[tuple[int, ...], tuple[int, int]] = {}
        self.completions: list[list[list[int]]] = []
        self.rewards: list[list[float]] = []
        for row in range(len(rows)):
            self.completions.append([self._completion(rng, row, k) for k in range(GENERATIONS)])
            drawn = rng.uniform(0, 1, GENERATIONS).round(2).tolist()
            # Every fifth group is of one reward: its advantages are zero.
            self.rewards.append([0.5] * GENERATIONS if row % 5 == 4 else drawn)

    def _completion(self, rng: np.random.Generator, row: int, k: int) -> list[int]:
        """Draw a completion that no other equals: ended by EOS, or cut."""
        while True:
            ids = [*self._tokenizer(" " + _text(rng, 4)).input_ids, self._tokenizer.eos_token_id]
            ids = ids[:MAX_COMPLETION_LENGTH]
            if tuple(ids) not in self._found:
                self._found[tuple(ids)] = (row, k)
                return ids

    def find(self, ids: list[int]) -> tuple[int, int]:
        """Return the row of a completion, and its number in the group."""
        return self._found[tuple(ids)]

    def generate(self, prompts: list[str], _: object) -> dict[str, Any]:
        """Return the completions of prompts, each repeated `GENERATIONS` times in a row."""
        assert all(prompts[i] == prompts[i - i % GENERATIONS] for i in range(len(prompts)))
        each = enumerate(prompts)
        return {
            "prompt_ids": [self._tokenizer(prompt).input_ids for prompt in prompts],
            "completion_ids": [
                list(self.completions[self._row_of[p]][i % GENERATIONS]) for i, p in each
            ],
            "logprobs": None,
        }

    def fixed_reward(self, completion_ids: list[list[int]], **_: object) -> list[float]:
        """Return the rewards of completions."""
        places = [self.find(ids) for ids in completion_ids]
        return [self.rewards[row][k] for row, k in places]
