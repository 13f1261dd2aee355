"""What the engine asks of a decoder: read prompts, take completions in, draw a token for each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from protocol.messages.parts import Sampling

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Drawn:
    """The tokens (N,) that one decode step drew for `rows` (N,), and the policy they came from.

    `logprobs` (N,) float32, nats; `kept_logmass` (N,) float32, or None where no filter was on.
    """

    rows: IntArray
    tokens: IntArray
    logprobs: FloatArray
    kept_logmass: FloatArray | None
    version: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class NewCompletion:
    """A completion that joins: its row in the engine, and what its draws depend on.

    `prefix` is what a reader returned for its prompt, which holds `position` tokens: all but
    `last_token`, the first input of decoding.
    """

    row: int
    prefix: Any
    last_token: int
    position: int
    seed: int
    sampling: Sampling


class Reader(Protocol):
    """Reads prompts into what completions start from."""

    @property
    def done(self) -> bool:
        """Whether all prompts have been read."""
        ...

    def read(self, chunk: int) -> int:
        """Read about `chunk` more tokens; return how many prompt tokens these were."""
        ...

    def prefixes(self) -> Sequence[Any]:
        """Return a prefix for each prompt."""
        ...


class Decoder(Protocol):
    """Decodes completions together. Rows are numbers that the engine gives out."""

    def together(self, lengths: Sequence[int]) -> list[int]:
        """Return which of the prompts of these lengths to read first, as one reading."""
        ...

    def reader(self, prompts: Sequence[Sequence[int]]) -> Reader:
        """Start to read prompts, given without their last tokens, under the policy in force."""
        ...

    def join(self, completions: Sequence[NewCompletion]) -> None:
        """Take completions in; the next `step` draws for them."""
        ...

    def leave(self, rows: Iterable[int]) -> None:
        """Forget rows; a token that was drawn for them is never delivered."""
        ...

    def step(self, version: int, digest: str) -> list[Drawn]:
        """Launch the next draw of every completion and deliver the one before it.

        Draws are stamped with the policy that is in force when they are launched.
        """
        ...

    def policy_changed(self) -> None:
        """Take note that the model's weights were replaced."""
        ...

    def clear(self) -> None:
        """Forget every row."""
        ...
