"""The decoder for models whose caches cannot be slots: mlx-lm's batched caches, or one by one.

A batch's caches grow, and are copied when completions join or leave. Where mlx-lm cannot batch a
model's caches, or a trial found that it batches them wrongly, each completion is a batch by itself.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

from collections.abc import Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from actors.engine.decoding.decoder import Drawn, NewCompletion
from actors.engine.decoding.pending import PendingDraw
from actors.engine.decoding.prefill import Prefiller, PromptCache, merge
from actors.engine.decoding.row_sampling import RowSampling
from actors.engine.decoding.sampling import draw
from actors.engine.decoding.shapes import PREFILL_TOKENS, within_tokens


class _Batch:
    """Completions that decode in one pass, over caches that mlx-lm joins."""

    def __init__(self, model: nn.Module, sampling: RowSampling) -> None:
        self.rows: list[int] = []
        self._model = model
        self._sampling = sampling
        self._cache: PromptCache = []
        self._inputs = mx.zeros(0, mx.int32)
        self._pending: PendingDraw | None = None

    def join(self, completions: Sequence[NewCompletion], cache: PromptCache) -> None:
        inputs = mx.array([new.last_token for new in completions], dtype=mx.int32)
        if self.rows:
            for layer, joining in zip(self._cache, cache, strict=True):
                layer.extend(joining)
            self._inputs = mx.concatenate([self._inputs, inputs])
        else:
            self._cache, self._inputs = cache, inputs
        self.rows += [new.row for new in completions]

    def leave(self, gone: set[int]) -> None:
        keep = [i for i, row in enumerate(self.rows) if row not in gone]
        if self._pending is not None:
            self._pending.leave(gone)
        if len(keep) == len(self.rows):
            return

        if keep:
            for layer in self._cache:
                layer.filter(keep)
            self._inputs = self._inputs[mx.array(keep)]
        self.rows = [self.rows[i] for i in keep]

    def advance(self, version: int, digest: str) -> Drawn:
        """Launch the next draw, then wait for the one before it and return it."""
        pending = self._pending or self._launch(version, digest)
        self._pending = self._launch(version, digest)
        return pending.delivered()

    def _launch(self, version: int, digest: str) -> PendingDraw:
        rows = np.array(self.rows)
        logits = self._model(self._inputs[:, None], cache=self._cache)[:, -1].astype(mx.float32)
        uniforms, parameters = self._sampling.next(rows)
        drawn = draw(logits, uniforms, parameters)
        drawn.start()
        self._inputs = drawn.tokens.astype(mx.int32)
        self._sampling.drawn(rows)
        return PendingDraw(drawn, np.arange(len(rows)), rows, version, digest)


class BatchDecoder:
    """A `Decoder`, which describes its methods, over mlx-lm's caches.

    `alone`: each completion is a batch by itself.
    """

    def __init__(
        self, model: nn.Module, *, rows: int, vocab_size: int, prefill_step_size: int, alone: bool
    ) -> None:
        self._model = model
        self._prefiller = Prefiller(model, prefill_step_size, alone=alone)
        self._sampling = RowSampling(rows, vocab_size)
        self._batches: list[_Batch] = []

    def together(self, lengths: Sequence[int]) -> list[int]:
        return within_tokens(lengths, PREFILL_TOKENS)

    def reader(self, prompts: Sequence[Sequence[int]]) -> "WholeReader":
        return WholeReader(self._prefiller, prompts)

    def join(self, completions: Sequence[NewCompletion]) -> None:
        for new in completions:
            self._sampling.start(new.row, new.seed, new.sampling)

        if self._prefiller.alone:
            for new in completions:
                self._batches.append(_Batch(self._model, self._sampling))
                self._batches[-1].join([new], self._prefiller.copied(new.prefix))
            return
        if not self._batches:
            self._batches.append(_Batch(self._model, self._sampling))
        self._batches[0].join(completions, merge([new.prefix for new in completions]))

    def leave(self, rows: Iterable[int]) -> None:
        gone = set(rows)
        for batch in self._batches:
            batch.leave(gone)
        self._batches = [batch for batch in self._batches if batch.rows]

    def step(self, version: int, digest: str) -> list[Drawn]:
        return [batch.advance(version, digest) for batch in self._batches]

    def policy_changed(self) -> None:
        """Nothing that is kept here depends on the weights but prefixes, which the engine drops."""

    def clear(self) -> None:
        self._batches.clear()


class WholeReader:
    """Reads prompts in one go, each into a cache of its own."""

    def __init__(self, prefiller: Prefiller, prompts: Sequence[Sequence[int]]) -> None:
        self._prefiller = prefiller
        self._prompts = prompts
        self._caches: list[PromptCache] | None = None

    @property
    def done(self) -> bool:
        return self._caches is not None

    def read(self, chunk: int) -> int:
        """Read all of the prompts, in passes of the prefiller's size."""
        self._caches = self._prefiller.run(self._prompts)
        return sum(len(prompt) for prompt in self._prompts)

    def prefixes(self) -> Sequence[PromptCache]:
        assert self._caches is not None
        return self._caches
