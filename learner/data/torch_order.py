"""torch.randperm in numpy, for parity: data.order = "torch_randperm" visits rows as TRL does."""

import numpy as np
import numpy.typing as npt

from protocol.errors import ConfigError

# From here on torch draws 64 bits per element (aten/src/ATen/native/TensorFactories.cpp).
_LIMIT = (2**32 - 1) // 20


def torch_randperm(count: int, seed: int, *, earlier: int = 0) -> npt.NDArray[np.int64]:
    """`torch.randperm(count, generator=torch.Generator().manual_seed(seed))` on CPU, bit for bit.

    `earlier`: how many permutations of the same length the generator made before this one.
    """
    if count >= _LIMIT:
        raise ConfigError(
            f'data.order = "torch_randperm" serves up to {_LIMIT} rows, got {count}; use "shuffled"'
        )

    bits = np.random.RandomState(seed % 2**32)  # MT19937, seeded by the same recurrence as torch
    draws = np.zeros(0, np.int64)
    for _ in range(earlier + 1):
        draws = bits.randint(0, 2**32, size=max(count - 1, 0), dtype=np.uint32).astype(np.int64)

    # Fisher-Yates from the front, with torch's modulo (and so with its bias).
    targets = np.arange(max(count - 1, 0)) + draws % np.arange(count, 1, -1)
    order = list(range(count))
    for index, target in enumerate(targets.tolist()):
        order[index], order[target] = order[target], order[index]
    return np.asarray(order, dtype=np.int64)
