"""Rows that make several judged answers, as one sequence of answers in TRL's order.

TRL turns pairs into answers with `Dataset.map` in batches of 1,000 rows: of each block of the file
come all chosen answers, then all rejected ones.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby, zip_longest

from msgspec import structs

from learner.data.epochs import FeedState, StreamFeed
from learner.data.examples import UnpairedExample
from learner.data.order import permuted
from protocol.config.settings import DataSettings

BLOCK = 1000  # rows; the default batch of `Dataset.map`

Places = tuple[UnpairedExample | None, ...]


def in_places(rows: Iterable[Places]) -> list[UnpairedExample]:
    """Return the answers of a block: the first ones of all rows, then the second ones."""
    return [answer for place in zip_longest(*rows) for answer in place if answer is not None]


def in_file_blocks(rows: Iterable[Places]) -> list[UnpairedExample]:
    """Return the answers of rows in the file's order, by blocks of the file."""
    blocks = groupby(rows, lambda row: next(a.row for a in row if a is not None) // BLOCK)
    return [answer for _, block in blocks for answer in in_places(block)]


def in_blocks(rows: Sequence[Places]) -> list[UnpairedExample]:
    """Return the answers of rows in any order, by blocks of these rows."""
    blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
    return [answer for block in blocks for answer in in_places(block)]


class UnpairedFeed:
    """A feed of answers over a stream of rows, a block of rows at a time.

    Under data.order = "shuffled" the answers of a block are shuffled too, so that good and bad
    ones are mixed. Resuming tokenises the block again.
    """

    size = -1

    def __init__(self, rows: StreamFeed[Places], settings: DataSettings, *, seed: int) -> None:
        self._rows = rows
        self._shuffled = settings.order == "shuffled"
        self._seed = seed
        self._start = rows.state()
        self._block: deque[UnpairedExample] = deque()
        self._ahead: Places | None = None  # the first row of the next block
        self._given = 0
        self._over = False  # the stream's epoch is, once the block is

    def next(self) -> UnpairedExample | None:
        """Return the next answer, or None at the end of an epoch; refuse an empty stream."""
        while not self._block:
            if self._over:
                self._begin(self._rows.state())
                return None
            self._fill()
        self._given += 1
        return self._block.popleft()

    def _begin(self, state: FeedState, given: int = 0) -> None:
        self._start, self._given, self._over = state, given, False

    def _fill(self) -> None:
        state = self._rows.state()
        rows = [] if self._ahead is None else [self._ahead]
        first = state.taken - len(rows)
        self._begin(structs.replace(state, taken=first))
        self._ahead = None
        end = (first // BLOCK + 1) * BLOCK
        while (row := self._rows.next()) is not None:
            if self._rows.state().taken > end:
                self._ahead = row
                break
            rows.append(row)
        self._over = self._ahead is None
        found = in_places(rows)
        if self._shuffled:
            found = permuted(found, self._seed, state.epoch, 2, end // BLOCK)
        self._block.extend(found)

    def state(self) -> FeedState:
        """Where the next answer comes from."""
        return structs.replace(self._start, given=self._given)

    def restore(self, state: FeedState) -> None:
        """Go on from `state`; raises CheckpointError if it is of another dataset."""
        self._rows.restore(state)
        self._block.clear()
        self._ahead = None
        self._begin(state)
        if state.given:
            self._fill()
            for _ in range(state.given):
                self._block.popleft()
            self._given = state.given
