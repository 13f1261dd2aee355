"""How many rows and positions a decode step computes: few shapes, so that few are compiled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

PREFILL_TOKENS = 8192  # most prompt tokens, padding included, of the prompts that are read together
FIXED_READING_TOKENS = 192  # about as many per reading where its shape is fixed


def bucketed_length(length: int, base: int) -> int:
    """Return the least of base times 1, 2, 3, 4, 6, 8, 12, … that holds `length` positions.

    With two steps per doubling, a run sees few shapes, and a third at most is padding.
    """
    size = base
    while size < length:
        if size > base and size + size // 2 >= length:
            return size + size // 2
        size *= 2
    return size


def within_tokens(lengths: Sequence[int], most: int) -> list[int]:
    """Return the indices of the first prompts that, padded to the longest, hold `most` tokens.

    At least one is returned.
    """
    longest = 0
    for count, length in enumerate(lengths):
        longest = max(longest, length)
        if count and longest * (count + 1) > most:
            return list(range(count))
    return list(range(len(lengths)))


@dataclass(frozen=True)
class Shapes:
    """The shapes of decode steps and readings.

    `row_step`: rows are computed in multiples of this, from the first row on. `column_base`: see
    `bucketed_length`. With `fixed`, rows come in blocks, of which all rows and all positions are
    computed, and prompts are read in shapes that depend on their own length, so that no bit of a
    row depends on other rows. A block has `fixed_rows` rows, where 0 is all that there are.
    """

    row_step: int
    column_base: int
    fixed_rows: int = 0
    fixed: bool = False

    def rows(self, needed: int, available: int) -> int:
        """Return how many of the `available` rows are computed if the first `needed` must be."""
        if self.fixed:
            return available
        return min(available, -(-needed // self.row_step) * self.row_step)

    def block_rows(self, available: int) -> int:
        """Return how many of the `available` rows are in one block."""
        return min(available, self.fixed_rows) if self.fixed and self.fixed_rows else available

    def columns(self, length: int, capacity: int) -> int:
        """Return how many of the `capacity` positions are read if the first `length` must be."""
        return capacity if self.fixed else min(capacity, self.capacity(length))

    def capacity(self, length: int) -> int:
        """Return the capacity of slots for `length` positions."""
        return bucketed_length(length, self.column_base)

    def together(self, lengths: Sequence[int]) -> list[int]:
        """Return which prompts of these lengths, in order of age, are read first."""
        if not self.fixed:
            return within_tokens(lengths, PREFILL_TOKENS)

        rows, length = self.reading(lengths[0])
        alike = [i for i, other in enumerate(lengths) if self.capacity(other) == length]
        return alike[:rows]

    def reading(self, length: int) -> tuple[int, int]:
        """Return the fixed shape (rows, length) in which a prompt of this length is read."""
        padded = self.capacity(length)
        return max(1, FIXED_READING_TOKENS // padded), padded


# On a GPU a step costs nearly the same for 64 rows as for 256, but each new shape is compiled; on
# a CPU the cost follows the rows and nothing is compiled, so that fixed shapes fit closely there.
ON_GPU = Shapes(row_step=32, column_base=128)
ON_CPU = Shapes(row_step=4, column_base=32)
FIXED_ON_CPU = Shapes(row_step=4, column_base=8, fixed_rows=256, fixed=True)


def shapes_for(device: mx.Device, *, deterministic: bool) -> Shapes:
    """Return the shapes that suit `device`."""
    if device.type == mx.DeviceType.gpu:
        return replace(ON_GPU, fixed=deterministic)
    return FIXED_ON_CPU if deterministic else ON_CPU
