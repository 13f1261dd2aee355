"""The sizes of a model's layers and weights, for estimates of memory."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from protocol.model.snapshots import named_arrays


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The numbers per token of a transformer's layers; 0 where the configuration does not say."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int  # of a mixture of experts: what one token uses
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "LayerShape":
        """Read a model's config.json."""
        text: dict[str, Any] = {**config, **(config.get("text_config") or {})}
        hidden = int(text.get("hidden_size", 0))
        heads = int(text.get("num_attention_heads") or 1)
        mlp = int(text.get("intermediate_size") or 4 * hidden)
        if text.get("moe_intermediate_size"):
            mlp = int(text["moe_intermediate_size"]) * int(text.get("num_experts_per_tok") or 1)

        return cls(
            layers=int(text.get("num_hidden_layers", 0)),
            hidden=hidden,
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_size=int(text.get("head_dim") or hidden // heads),
            mlp=mlp,
            vocabulary=int(text.get("vocab_size", 0)),
        )


def compute_itemsize(model: nn.Module) -> int:
    """Return the bytes per number that most weights, and so activations, have."""
    sizes: dict[int, int] = {}
    for name, array in named_arrays(model.parameters()).items():
        if mx.issubdtype(array.dtype, mx.floating) and "lora_" not in name:
            sizes[array.itemsize] = sizes.get(array.itemsize, 0) + array.size
    return max(sizes, key=lambda size: sizes[size]) if sizes else 4


def has_short_floats(model: nn.Module) -> bool:
    """Whether any array is bfloat16 or float16, whose rounding shows in comparisons."""
    types = {array.dtype for array in named_arrays(model.parameters()).values()}
    return bool(types & {mx.bfloat16, mx.float16})


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all arrays of a model, adapters included."""
    return sum(array.nbytes for array in named_arrays(model.parameters()).values())
