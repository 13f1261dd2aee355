"""Reads each prompt once per group, into the cache that every completion of it starts from."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import PromptProcessingBatch
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

PromptCache = list[Any]  # one cache object per layer, of the kinds that the model uses


def mergeable(cache: PromptCache) -> bool:
    """Whether mlx-lm can join caches of these kinds into one batch."""
    for layer in cache:
        if isinstance(layer, CacheList):
            if not mergeable(list(layer.caches)):
                return False
        # mlx-lm's batched rotating cache cannot hold on to the first tokens of a prompt.
        elif not hasattr(layer, "merge") or (isinstance(layer, RotatingKVCache) and layer.keep):
            return False
    return True


def merge(caches: Sequence[PromptCache]) -> PromptCache:
    """Copy `caches`, each of batch size 1, into one cache of batch size `len(caches)`."""
    return [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]


class Prefiller:
    """Reads prompts into mlx-lm's own caches.

    `alone`: completions do not share a batch, because that was asked for or mlx-lm cannot join
    caches of the model's kinds.
    """

    def __init__(self, model: nn.Module, step_size: int, *, alone: bool) -> None:
        self._model = model
        self._step_size = step_size
        empty = make_prompt_cache(model)
        self.alone = alone or not mergeable(empty)
        # Right padding is exact for plain attention caches; other kinds go one prompt at a time.
        self._batchable = not alone and all(type(layer) is KVCache for layer in empty)

    def run(self, prompts: Sequence[Sequence[int]]) -> list[PromptCache]:
        """Return a cache of batch size 1 for each prompt."""
        caches: list[PromptCache] = [make_prompt_cache(self._model) for _ in prompts]
        filled = [i for i, prompt in enumerate(prompts) if prompt]

        if not self._batchable or len(filled) == 1:
            for i in filled:
                self._run_one(prompts[i], caches[i])
        elif filled:
            batch = PromptProcessingBatch(
                self._model,
                uids=list(range(len(filled))),
                caches=[caches[i] for i in filled],
                prefill_step_size=self._step_size,
            )
            batch.prompt([list(prompts[i]) for i in filled])
            for index, i in enumerate(filled):
                caches[i] = batch.extract_cache(index)

        return caches

    def _run_one(self, prompt: Sequence[int], cache: PromptCache) -> None:
        tokens = mx.array(list(prompt))[None]
        for start in range(0, len(prompt), self._step_size):
            self._model(tokens[:, start : start + self._step_size], cache=cache)
            mx.eval([layer.state for layer in cache])

    @staticmethod
    def copied(cache: PromptCache) -> PromptCache:
        """Return a copy that a completion may write to."""
        return copy.deepcopy(cache)
