"""Decodes in slots of fixed capacity, pipelined: while a draw is read, the next one is computed.

    join ──▶ Block: slots, device tokens ──launch──▶ pending draw ──deliver──▶ Drawn

Ordinarily there is one block, which computes the rows and positions that are needed. With fixed
shapes a block serves one capacity, which depends on the request alone, and computes all its rows
and positions, so that every product that a row goes through has the same shape whatever else is
sampled. More completions than a block has rows take further blocks; an empty one costs no time.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from actors.engine.decoding.adapters import StackedAdapters
from actors.engine.decoding.decode_step import DecodeStep
from actors.engine.decoding.decoder import Drawn, NewCompletion
from actors.engine.decoding.pending import FREE, PendingDraw
from actors.engine.decoding.row_sampling import RowSampling
from actors.engine.decoding.shapes import Shapes
from actors.engine.decoding.slots import CacheShape, Prefix, PromptReader, Slots


def positions(new: NewCompletion) -> int:
    """Return how many positions a completion may take in its slot."""
    # One more than its tokens: the step after its last draw may have been launched.
    return new.position + new.sampling.max_completion_length + 1


class Block:
    """Rows that decode in one pass, each in a slot."""

    def __init__(self, slots: Slots, step: DecodeStep, shapes: Shapes, vocab_size: int) -> None:
        self.row_at = np.full(slots.rows, FREE)
        self._slots = slots
        self._step = step
        self._shapes = shapes
        self._sampling = RowSampling(slots.rows, vocab_size)
        self._position = np.zeros(slots.rows, np.int32)
        self._left = np.zeros(slots.rows, np.int64)  # draws that the completion may still need
        self._tokens = mx.zeros(0, mx.int32)  # the next inputs of the first slots
        self._entering: dict[int, int] = {}  # slot: first input
        self._pending: PendingDraw | None = None

    @property
    def capacity(self) -> int:
        """Positions per slot."""
        return self._slots.capacity

    @property
    def free(self) -> int:
        """How many slots are free."""
        return int(np.count_nonzero(self.row_at == FREE))

    def join(self, completions: Sequence[NewCompletion]) -> None:
        """Copy prompts into free slots, the lowest first; raises IndexError if there are none."""
        free = np.flatnonzero(self.row_at == FREE)
        taken = [int(free[i]) for i in range(len(completions))]
        self._slots.grow(self._shapes.capacity(max(positions(new) for new in completions)))

        by_reading: dict[int, tuple[list[int], list[Prefix]]] = {}
        for slot, new in zip(taken, completions, strict=True):
            slots, prefixes = by_reading.setdefault(id(new.prefix.keys), ([], []))
            slots.append(slot)
            prefixes.append(new.prefix)

            self.row_at[slot] = new.row
            self._position[slot] = new.position
            self._left[slot] = new.sampling.max_completion_length
            self._entering[slot] = new.last_token
            self._sampling.start(slot, new.seed, new.sampling)
        for slots, prefixes in by_reading.values():
            self._slots.copy(slots, prefixes)

    def leave(self, rows: set[int]) -> None:
        """Free the slots of `rows`."""
        for slot in np.flatnonzero(np.isin(self.row_at, list(rows))):
            self.row_at[slot] = FREE
            self._position[slot] = self._left[slot] = 0
            self._entering.pop(int(slot), None)
        if self._pending is not None:
            self._pending.leave(rows)

    def advance(self, version: int, digest: str) -> Drawn | None:
        """Launch the next draw, then wait for the one before it and return it."""
        if self._pending is None:
            self._pending = self._launch(version, digest)
        launched = self._launch(version, digest)
        pending, self._pending = self._pending, launched
        return None if pending is None else pending.delivered()

    # ---- inside --------------------------------------------------------------------------

    def _needed(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self._left > 0)

    def _launch(self, version: int, digest: str) -> PendingDraw | None:
        """Start one decode step; None if no completion needs another token."""
        needed = self._needed()
        if not needed.size:
            return None

        rows = self._shapes.rows(int(needed[-1]) + 1, self._slots.rows)
        longest = int(self._position[needed].max()) + 1
        columns = self._shapes.columns(longest, self._slots.capacity)

        uniforms, parameters = self._sampling.next(np.arange(rows))
        # A free slot writes where its next completion will, before that one does.
        position = mx.array(np.minimum(self._position[:rows], columns - 1))
        draw = self._step(self._inputs(rows), position, uniforms, parameters, self._slots, columns)
        self._tokens = draw.tokens

        self._position[needed] += 1
        self._left[needed] -= 1
        self._sampling.drawn(needed)
        return PendingDraw(draw, needed, self.row_at[needed], version, digest)

    def _inputs(self, rows: int) -> mx.array:
        """Return the inputs (rows,) of the next step: what was drawn, and what enters."""
        tokens = self._tokens
        if tokens.shape[0] > rows:
            tokens = tokens[:rows]
        elif tokens.shape[0] < rows:
            tokens = mx.concatenate([tokens, mx.zeros(rows - tokens.shape[0], tokens.dtype)])

        if self._entering:
            slots = mx.array(list(self._entering))
            tokens[slots] = mx.array(list(self._entering.values()), dtype=tokens.dtype)
            self._entering.clear()
        return tokens


class SlotDecoder:
    """A `Decoder`, which describes its methods, over slots."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[CacheShape],
        *,
        rows: int,
        vocab_size: int,
        max_tokens: int,
        shapes: Shapes,
        stacks: Sequence[StackedAdapters],
        compiled: bool,
    ) -> None:
        self._model = model
        self._layers = list(layers)
        self._rows = rows
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._shapes = shapes
        self._stacks = list(stacks)
        self._step = DecodeStep(model, layers, stacks, compiled=compiled)
        self._blocks: list[Block] = []

    def together(self, lengths: Sequence[int]) -> list[int]:
        return self._shapes.together(lengths)

    def reader(self, prompts: Sequence[Sequence[int]]) -> PromptReader:
        windows = [layer.window for layer in self._layers]
        shape = self._shapes.reading(len(prompts[0])) if self._shapes.fixed else None
        return PromptReader(self._model, prompts, windows, shape=shape)

    def join(self, completions: Sequence[NewCompletion]) -> None:
        by_block: dict[int, list[NewCompletion]] = {}
        for new in completions:
            index = self._block_for(new, by_block)
            by_block.setdefault(index, []).append(new)
        for index, joining in by_block.items():
            self._blocks[index].join(joining)

    def leave(self, rows: Iterable[int]) -> None:
        gone = set(rows)
        for block in self._blocks:
            block.leave(gone)

    def step(self, version: int, digest: str) -> list[Drawn]:
        drawn = [block.advance(version, digest) for block in self._blocks]
        return [each for each in drawn if each is not None]

    def policy_changed(self) -> None:
        for stack in self._stacks:
            stack.refresh()

    def clear(self) -> None:
        self._blocks.clear()

    # ---- inside --------------------------------------------------------------------------

    def _block_for(self, new: NewCompletion, joining: Mapping[int, Sequence[NewCompletion]]) -> int:
        """Return the index of the first block with room beside those that join; made if none is."""
        capacity = self._shapes.capacity(max(positions(new), self._max_tokens))
        for index, block in enumerate(self._blocks):
            # A block whose shape is not fixed grows to what is needed.
            fits = not self._shapes.fixed or block.capacity == capacity
            if fits and block.free > len(joining.get(index, ())):
                return index

        slots = Slots(self._layers, self._shapes.block_rows(self._rows))
        slots.grow(capacity)
        self._blocks.append(Block(slots, self._step, self._shapes, self._vocab_size))
        return len(self._blocks) - 1
