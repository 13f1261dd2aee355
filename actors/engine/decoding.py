"""The decoding half of mlx-lm's `BatchGenerator`, with float32 logits and a keyed sampler."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.generate import GenerationBatch

from actors.engine.active import ActiveCompletion, StampedDraw
from actors.engine.base import NO_POLICY
from actors.engine.prefill import PromptCache
from actors.engine.sampling import SamplingParameters, draw, token_uniforms


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


class BatchSampler:
    """Draws the next token of every completion named in the last `expect`.

    mlx-lm calls a sampler with log-probs alone, so `expect` says beforehand whose they are. Each
    completion's `pending` is its draw.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._expected: list[ActiveCompletion] = []
        self._policy = (NO_POLICY, "")
        self._columns_of: list[ActiveCompletion] = []
        self._columns: tuple[SamplingParameters, npt.NDArray[np.uint64]] | None = None

    def expect(self, completions: list[ActiveCompletion], version: int, digest: str) -> None:
        """Set the completions that the next call samples for, and the policy that it samples."""
        self._expected = completions
        self._policy = (version, digest)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Draw the next tokens (B,) of the B expected completions from log-probs (B, V)."""
        completions = self._expected
        parameters, seeds = self._parameters(completions)
        indices = np.array([completion.drawn for completion in completions])

        drawn = draw(logprobs, mx.array(token_uniforms(seeds, indices)), parameters)
        kept = [] if drawn.kept_logmass is None else [drawn.kept_logmass]
        mx.async_eval(drawn.tokens, drawn.logprobs, *kept)

        stamped = StampedDraw(drawn, *self._policy)
        for i, completion in enumerate(completions):
            completion.pending = (stamped, i)
            completion.drawn += 1
        return drawn.tokens

    def _parameters(
        self, completions: list[ActiveCompletion]
    ) -> tuple[SamplingParameters, npt.NDArray[np.uint64]]:
        """Return sampling parameters and seeds, rebuilt only when the completions change."""
        if self._columns is None or self._columns_of != completions:
            samplings = [completion.parent.request.sampling for completion in completions]
            seeds = np.array([completion.seed for completion in completions], dtype=np.uint64)
            self._columns = SamplingParameters.of(samplings, self._vocab_size), seeds
            self._columns_of = list(completions)
        return self._columns
