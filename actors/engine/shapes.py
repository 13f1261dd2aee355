"""How many rows and positions a decode step computes: few shapes, so that few are compiled."""

from dataclasses import dataclass

import mlx.core as mx


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


@dataclass(frozen=True)
class Shapes:
    """The shapes of decode steps.

    `row_step`: rows are computed in multiples of this, from the first row on. `column_base`: see
    `bucketed_length`. `fixed_rows`: if not 0, rows are decoded in blocks of exactly so many, with
    attention over their whole capacity, so that a row's bits do not depend on other rows.
    """

    row_step: int
    column_base: int
    fixed_rows: int = 0

    def rows(self, needed: int, available: int) -> int:
        """Return how many of the `available` rows are computed if the first `needed` must be."""
        return min(available, -(-needed // self.row_step) * self.row_step)

    def columns(self, length: int) -> int:
        """Return how many positions hold `length`."""
        return bucketed_length(length, self.column_base)


# On a GPU a step costs nearly the same for 64 rows as for 256, but each new shape is compiled; on
# a CPU the cost follows the rows and nothing is compiled.
ON_GPU = Shapes(row_step=32, column_base=128)
ON_CPU = Shapes(row_step=4, column_base=32)

# Matrix products choose kernels by their number of rows, so deterministic runs keep to one number.
DETERMINISTIC_ROWS = 16


def shapes_for(device: mx.Device, *, deterministic: bool) -> Shapes:
    """Return the shapes that suit `device`."""
    shapes = ON_GPU if device.type == mx.DeviceType.gpu else ON_CPU
    if not deterministic:
        return shapes
    return Shapes(shapes.row_step, shapes.column_base, fixed_rows=DETERMINISTIC_ROWS)
