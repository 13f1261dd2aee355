"""How each row of a batch is sampled, and how many tokens it drew; gathered once per change."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from actors.engine.decoding.sampling import SamplingParameters, token_uniforms
from protocol.messages.parts import Sampling

_FREE = Sampling(num_generations=1, max_completion_length=1)


class RowSampling:
    """The seeds, draw counts and sampling parameters of the completions in each row."""

    def __init__(self, rows: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._seeds = np.zeros(rows, np.uint64)
        self._drawn = np.zeros(rows, np.int64)
        self._samplings: list[Sampling] = [_FREE] * rows
        self._gathered: tuple[bytes, SamplingParameters] | None = None  # of the last rows asked

    def start(self, row: int, seed: int, sampling: Sampling) -> None:
        """Note the completion that `row` holds from now on."""
        self._seeds[row], self._drawn[row] = seed, 0
        if self._samplings[row] != sampling:
            self._samplings[row] = sampling
            self._gathered = None

    def next(self, rows: npt.NDArray[np.int64]) -> tuple[mx.array, SamplingParameters]:
        """Return the next uniform numbers (n, 2) and the parameters of `rows` (n,)."""
        asked = rows.tobytes()
        if self._gathered is None or self._gathered[0] != asked:
            samplings = [self._samplings[int(row)] for row in rows]
            self._gathered = (asked, SamplingParameters.of(samplings, self._vocab_size))
        uniforms = token_uniforms(self._seeds[rows], self._drawn[rows])
        return mx.array(uniforms), self._gathered[1]

    def drawn(self, rows: npt.NDArray[np.int64]) -> None:
        """Note that a token was drawn for each of `rows`."""
        self._drawn[rows] += 1
