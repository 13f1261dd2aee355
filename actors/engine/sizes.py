"""The memory that a model's caches take."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, make_prompt_cache


def bytes_per_position(model: nn.Module) -> int:
    """Return the bytes of the keys and values of one position of one row, over all layers.

    Layers with a sliding window count like others. Layers whose state does not grow with the length
    (Mamba's) count nothing. Nothing is computed: one token's caches are made, but not evaluated.
    """
    caches: list[Any] = make_prompt_cache(model)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    return sum(_layer_bytes(cache) for cache in caches)


def _layer_bytes(cache: Any) -> int:  # noqa: ANN401 - mlx-lm has many kinds
    if isinstance(cache, CacheList):
        return sum(_layer_bytes(part) for part in cache.caches)
    # Room for some hundred positions is allocated at once; a quantised cache holds several arrays.
    arrays = tree_flatten([getattr(cache, "keys", None), getattr(cache, "values", None)])
    return sum(a.nbytes // a.shape[2] for _, a in arrays if isinstance(a, mx.array) and a.ndim == 4)
