"""The order in which rows are visited: a pure function of kind, seed and epoch."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, zip_longest
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from protocol.errors import ConfigError

T = TypeVar("T")
Order = Literal["shuffled", "sequential", "length_grouped", "torch_randperm"]
IndexArray: TypeAlias = npt.NDArray[np.int64]
Places: TypeAlias = tuple[T | None, ...]  # a row's examples; None where one cannot be used

MEGA_BATCHES = 50  # batches sorted together, as transformers' length-grouped sampler does
# From this many rows on torch draws 64 bits per element (aten/src/ATen/native/TensorFactories.cpp).
_TORCH_LIMIT = (2**32 - 1) // 20


def epoch_order(
    order: Order,
    count: int,
    *,
    seed: int,
    epoch: int,
    lengths: Sequence[int] = (),
    batch_size: int = 1,
    one_generator: bool = False,
) -> IndexArray:
    """Return the indices (count,) that an epoch visits.

    `lengths` (count,), in tokens, and `batch_size` matter for "length_grouped" only.
    "torch_randperm" seeds each epoch with seed + epoch (accelerate's SeedableRandomSampler, in
    TRL's offline trainers); with `one_generator` the first epoch's generator continues (TRL's
    RepeatSampler, in GRPOTrainer).
    """
    if order == "sequential":
        return np.arange(count, dtype=np.int64)

    if order == "torch_randperm":
        if one_generator:
            return torch_randperm(count, seed, earlier=epoch)
        return torch_randperm(count, seed + epoch)

    shuffled = _generator(seed, epoch).permutation(count).astype(np.int64)
    if order == "shuffled":
        return shuffled
    return _length_grouped(shuffled, np.asarray(lengths), batch_size, _generator(seed, epoch, 1))


def torch_randperm(count: int, seed: int, *, earlier: int = 0) -> npt.NDArray[np.int64]:
    """Return torch.randperm(count) on CPU, from a generator seeded with `seed`, bit for bit.

    `earlier`: how many permutations of the same length the generator made before this one.
    """
    if count >= _TORCH_LIMIT:
        raise ConfigError(
            f'data.order = "torch_randperm" serves up to {_TORCH_LIMIT} rows, got {count}; use '
            '"shuffled"'
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


def permuted(items: Sequence[T], *entropy: int) -> list[T]:
    """Return the items shuffled by a generator that `entropy` seeds."""
    return [items[place] for place in _generator(*entropy).permutation(len(items))]


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.default_rng([value % 2**64 for value in entropy])


def _length_grouped(
    shuffled: IndexArray, lengths: npt.NDArray[np.int64], batch_size: int, rng: np.random.Generator
) -> IndexArray:
    """Return batches of similar length in random order; an incomplete batch comes last."""
    span = batch_size * MEGA_BATCHES
    chunks = [shuffled[start : start + span] for start in range(0, len(shuffled), span)]
    by_length = [chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks]
    grouped = np.concatenate(by_length or [shuffled])

    whole = len(grouped) // batch_size * batch_size
    batches = grouped[:whole].reshape(-1, batch_size)
    return np.concatenate([rng.permutation(batches).reshape(-1), grouped[whole:]])


def by_place(rows: Iterable[Places[T]]) -> list[T]:
    """Return the first examples of all rows, then the second ones."""
    return [example for place in zip_longest(*rows) for example in place if example is not None]


def in_blocks(rows: Iterable[tuple[int, Places[T]]], size: int) -> list[T]:
    """Return the examples of numbered rows, ordered `by_place` within blocks of `size` numbers.

    TRL splits KTO's pairs like this, with `Dataset.map` in batches of 1,000 rows. Blocks of one row
    keep the order of the rows.
    """
    blocks = groupby(rows, lambda numbered: numbered[0] // size)
    return [
        example for _, block in blocks for example in by_place(examples for _, examples in block)
    ]


def buffered_shuffle(items: Iterator[T], size: int, *, seed: int, epoch: int) -> Iterator[T]:
    """Shuffle a stream with at most `size` items held: each draw is replaced by the next item."""
    rng = _generator(seed, epoch)
    buffer: list[T] = []

    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(rng.integers(size))
        yield buffer[place]
        buffer[place] = item

    for place in rng.permutation(len(buffer)):
        yield buffer[place]
