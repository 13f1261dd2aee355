"""The sampler that mlx-lm calls once a step, told which rows it samples for."""

import mlx.core as mx
import numpy as np

from actors.engine.active import Row, Sampled
from actors.engine.sampling import RowParameters, draw, token_keys


class RowSampler:
    """Draws the next tokens of the rows named last; each row's `pending` is its draw."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: list[Row] = []
        self._policy = (-1, "")
        self._parameters: tuple[list[Row], RowParameters, np.ndarray] | None = None

    def expect(self, rows: list[Row], version: int, digest: str) -> None:
        """Say whom the next call is for, and under which policy."""
        self._rows = rows
        self._policy = (version, digest)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Draw the next tokens (B,) of the B rows from log-probs (B, V)."""
        rows = self._rows
        parameters, seeds = self._row_parameters(rows)
        keys = token_keys(seeds, np.array([row.drawn for row in rows]))
        drawn = draw(logprobs, keys, parameters)
        kept = [] if drawn.kept_logmass is None else [drawn.kept_logmass]
        mx.async_eval(drawn.tokens, drawn.logprobs, *kept)
        sampled = Sampled(drawn, *self._policy)
        for i, row in enumerate(rows):
            row.pending = (sampled, i)
            row.drawn += 1
        return drawn.tokens

    def _row_parameters(self, rows: list[Row]) -> tuple[RowParameters, np.ndarray]:
        """Return the rows' parameters and seeds, made anew only when the rows change."""
        if self._parameters is None or self._parameters[0] != rows:
            parameters = RowParameters.of(
                [row.work.request.sampling for row in rows], self._vocab_size
            )
            seeds = np.array([row.seed for row in rows], dtype=np.uint64)
            self._parameters = (list(rows), parameters, seeds)
        return self._parameters[1], self._parameters[2]
