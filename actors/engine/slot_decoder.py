"""Decodes in slots of fixed capacity, pipelined: while a draw is read, the next one is computed.

    join ──▶ Block: slots, device tokens ──launch──▶ pending draw ──deliver──▶ Drawn

Ordinarily there is one block for all rows. A deterministic engine decodes in blocks of a fixed
number of rows and a capacity that depends on the request alone, so that every product a row goes
through has the same shape whatever else is sampled.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

from collections.abc import Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from actors.engine.adapters import StackedAdapters
from actors.engine.decode_step import DecodeStep
from actors.engine.decoder import NewCompletion
from actors.engine.pending import FREE, PendingDraw
from actors.engine.row_sampling import RowSampling
from actors.engine.shapes import Shapes
from actors.engine.slots import LayerShape, Prefix, PromptReader, Slots
from actors.engine.transcript import Drawn


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
        return int((self.row_at == FREE).sum())

    @property
    def idle(self) -> bool:
        """Whether nothing is to be launched or delivered."""
        return self._pending is None and not self._needed().size

    def join(self, completions: Sequence[NewCompletion]) -> None:
        """Copy prompts into free slots, the lowest first; raises IndexError if there are none."""
        free = np.flatnonzero(self.row_at == FREE)
        taken = [int(free[i]) for i in range(len(completions))]
        needed = max(new.position + new.sampling.max_completion_length for new in completions)
        self._slots.grow(self._shapes.columns(needed + 1))

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

        rows, columns = self._slots.rows, self._slots.capacity
        if not self._shapes.fixed_rows:
            rows = self._shapes.rows(int(needed[-1]) + 1, rows)
            columns = min(columns, self._shapes.columns(int(self._position[needed].max()) + 1))

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
        layers: Sequence[LayerShape],
        *,
        rows: int,
        vocab_size: int,
        shapes: Shapes,
        stacks: Sequence[StackedAdapters],
        compiled: bool,
    ) -> None:
        self._model = model
        self._layers = list(layers)
        self._rows = rows
        self._vocab_size = vocab_size
        self._shapes = shapes
        self._stacks = list(stacks)
        self._step = DecodeStep(model, layers, stacks, compiled=compiled)
        self._blocks: list[Block] = []

    def reader(self, prompts: Sequence[Sequence[int]]) -> PromptReader:
        return PromptReader(self._model, prompts, [layer.window for layer in self._layers])

    def join(self, completions: Sequence[NewCompletion]) -> None:
        if not self._shapes.fixed_rows:
            if not self._blocks:
                self._blocks.append(self._block(self._rows))
            self._blocks[0].join(completions)
            return

        for new in completions:
            needed = new.position + new.sampling.max_completion_length + 1
            self._fixed_block(self._shapes.columns(needed)).join([new])

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

    def _block(self, rows: int) -> Block:
        return Block(Slots(self._layers, rows), self._step, self._shapes, self._vocab_size)

    def _fixed_block(self, capacity: int) -> Block:
        """Return a block of this capacity with a free slot; empty ones of others make room."""
        for block in self._blocks:
            if block.capacity == capacity and block.free:
                return block

        idle = [block for block in self._blocks if block.idle and block.free == len(block.row_at)]
        self._blocks = [block for block in self._blocks if block not in idle]
        self._blocks.append(self._block(self._shapes.fixed_rows))
        return self._blocks[-1]
