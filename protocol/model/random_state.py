"""Saves, restores and temporarily replaces MLX's global random state."""

# pyright: reportUnknownMemberType=false
# (mlx is only partly typed)

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import numpy as np


def random_state() -> int:
    """Return MLX's global random state on this thread as a number."""
    # A seed is the two halves of the key that it makes, so the number restores the state exactly.
    high, low = np.array(cast(Any, mx.random.state)[0]).tolist()
    return (high << 32) | low


def set_random_state(state: int) -> None:
    """Restore the random state that `random_state` returned."""
    mx.random.seed(state)


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Draw from `seed` inside the block, and restore the caller's random state after it."""
    before = random_state()
    mx.random.seed(seed)
    try:
        yield
    finally:
        set_random_state(before)
