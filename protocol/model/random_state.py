"""MLX's global random state: as a number, put back, and borrowed for a while."""

# pyright: reportUnknownMemberType=false
# (mlx is only partly typed)

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import numpy as np


def random_state() -> int:
    """Return the global random state of MLX on this thread as a number."""
    high, low = np.array(cast(Any, mx.random.state)[0]).tolist()
    return (high << 32) | low


def set_random_state(state: int) -> None:
    """Put the random state back to what `random_state` returned."""
    mx.random.seed(state)


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Draw from `seed` inside, and go on with the caller's random state after."""
    before = random_state()
    mx.random.seed(seed)
    try:
        yield
    finally:
        set_random_state(before)
