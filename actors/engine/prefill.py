"""Prompts through the model, once a group, and the caches that every completion starts from."""

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import PromptProcessingBatch
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

PromptCache = list[Any]  # one cache object a layer, of whatever kinds the model uses


def mergeable(cache: PromptCache) -> bool:
    """Whether caches of these kinds can be put together into a batch."""
    for layer in cache:
        if isinstance(layer, CacheList):
            if not mergeable(list(layer.caches)):
                return False
        # mlx-lm's batched rotating cache cannot hold on to the first tokens of a prompt.
        elif not hasattr(layer, "merge") or (isinstance(layer, RotatingKVCache) and layer.keep):
            return False
    return True


def merge(caches: Sequence[PromptCache]) -> PromptCache:
    """Return one batched cache with a row for each of `caches`, which are copied."""
    return [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]


class Prefiller:
    """Runs `prompt[:-1]`; the last prompt token is the first input of decoding."""

    def __init__(self, model: nn.Module, step_size: int) -> None:
        self._model = model
        self._step_size = step_size
        blank = make_prompt_cache(model)
        self.mergeable = mergeable(blank)
        # Right padding is exact for plain attention caches; other kinds go one prompt at a time.
        self._batchable = all(type(layer) is KVCache for layer in blank)

    def run(self, prompts: Sequence[Sequence[int]]) -> list[PromptCache]:
        """Return a cache of batch size 1 for each prompt (P tokens), holding P - 1 of them."""
        prefixes = [list(prompt[:-1]) for prompt in prompts]
        caches: list[PromptCache] = [make_prompt_cache(self._model) for _ in prompts]
        together = [i for i, prefix in enumerate(prefixes) if prefix]
        if not self._batchable or len(together) == 1:
            for i in together:
                self._alone(prefixes[i], caches[i])
        elif together:
            batch = PromptProcessingBatch(
                self._model,
                uids=list(range(len(together))),
                caches=[caches[i] for i in together],
                prefill_step_size=self._step_size,
            )
            batch.prompt([prefixes[i] for i in together])
            for row, i in enumerate(together):
                caches[i] = batch.extract_cache(row)
        return caches

    def _alone(self, prefix: list[int], cache: PromptCache) -> None:
        tokens = mx.array(prefix)[None]
        for start in range(0, len(prefix), self._step_size):
            self._model(tokens[:, start : start + self._step_size], cache=cache)
            mx.eval([layer.state for layer in cache])

    def rows(self, cache: PromptCache, count: int) -> list[PromptCache]:
        """Return `count` references to a mergeable cache, or else copies of their own."""
        return [cache if self.mergeable else copy.deepcopy(cache) for _ in range(count)]
