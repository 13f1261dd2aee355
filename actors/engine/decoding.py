"""The decoding half of mlx-lm's `BatchGenerator`, with float32 logits."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationBatch, StopSequences

from actors.engine.active import ActiveCompletion
from actors.engine.batch_sampler import BatchSampler
from actors.engine.prefill import PromptCache


class DecodingBatch(GenerationBatch):
    """Completions that decode together; the cache of a finished one is not kept."""

    def extract_cache(self, idx: int) -> PromptCache:
        return []


class Float32Logits(nn.Module):
    """The model with its logits cast to float32, in which tokens are sampled and recorded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __call__(self, inputs: mx.array, cache: PromptCache) -> mx.array:
        return self.model(inputs, cache=cache).astype(mx.float32)


def new_batch(
    model: Float32Logits,
    completions: Sequence[ActiveCompletion],
    cache: PromptCache,
    sampler: BatchSampler,
    stop: StopSequences,
) -> DecodingBatch:
    """Make a batch from prompts' caches; this already draws each completion's first token.

    So `sampler` must expect `completions` by now.
    """
    requests = [completion.parent.request for completion in completions]
    return DecodingBatch(
        model,
        uids=list(range(len(completions))),
        inputs=mx.array([request.prompt_ids[-1] for request in requests]),
        prompt_cache=cache,
        tokens=[[] for _ in completions],
        samplers=[sampler] * len(completions),
        fallback_sampler=sampler,
        logits_processors=[[] for _ in completions],
        stop_sequences=[stop] * len(completions),
        max_tokens=[request.sampling.max_completion_length for request in requests],
    )
