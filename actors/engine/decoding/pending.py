"""A draw that was launched and not read yet."""

# pyright: reportUnknownArgumentType=false
# (arrays of mlx become untyped ones of numpy)

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actors.engine.decoding.decoder import Drawn
from actors.engine.decoding.sampling import Draw

FREE = -1  # in place of a row: there is none


@dataclass
class PendingDraw:
    """A draw for the completions at `slots` of a batch, which are the engine's `rows`.

    `version` and `digest` are those of the policy in force when it was launched.
    """

    draw: Draw
    slots: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    version: int
    digest: str

    def leave(self, rows: Set[int]) -> None:
        """Drop what was drawn for `rows`."""
        self.rows = np.where(np.isin(self.rows, list(rows)), FREE, self.rows)

    def delivered(self) -> Drawn:
        """Return the tokens of the rows that are left; waits for MLX."""
        held = self.rows != FREE
        at = self.slots[held]
        kept = self.draw.kept_logmass
        return Drawn(
            rows=self.rows[held],
            tokens=np.array(self.draw.tokens)[at],
            logprobs=np.array(self.draw.logprobs)[at],
            kept_logmass=None if kept is None else np.array(kept)[at],
            version=self.version,
            digest=self.digest,
        )
