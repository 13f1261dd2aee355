"""Examples epoch after epoch, with exact resume: the interface, and its version for lists.

For streams see `streams.py`.
"""

import hashlib
from typing import Generic, Protocol, TypeVar

import msgspec

from learner.data.order import IndexArray, Order, epoch_order
from protocol.config.settings import DataSettings
from protocol.errors import CheckpointError, DataError


class HasLength(Protocol):
    """A prompt, or an example of any kind; `length`: tokens of its longest side."""

    @property
    def length(self) -> int: ...


T = TypeVar("T", bound=HasLength)
T_co = TypeVar("T_co", bound=HasLength, covariant=True)


class EpochState(msgspec.Struct, frozen=True, kw_only=True):
    """The position of an iteration, and checks against resuming it over other data.

    The next example is in `epoch`. For a list, `taken` examples of that epoch came before it. For a
    stream, `taken` rows were read before its block, and `given` examples of the block came before
    it. `size`: examples per epoch, None for a stream. `digest`: of all examples in file order, ""
    for a stream. `order`: everything that decides the order, in words.
    """

    epoch: int
    taken: int
    given: int = 0
    size: int | None = None
    digest: str = ""
    order: str

    def require_order(self, order: str) -> None:
        """Refuse another order: some rows would be trained on twice, and others never."""
        if self.order != order:
            raise CheckpointError(
                f"the checkpoint was made in the middle of rows in this order: {self.order}; this "
                f"run's is: {order}; resume with the same data.order and the settings that decide "
                "it"
            )


class EpochIterator(Protocol[T_co]):
    """Examples epoch after epoch.

    `size`: examples per epoch; `longest`: tokens of the longest one; both None for a stream.
    `next` returns None once at the end of each epoch. `restore` continues from a state, and raises
    CheckpointError if it belongs to other data.
    """

    @property
    def size(self) -> int | None: ...
    @property
    def longest(self) -> int | None: ...
    def next(self) -> T_co | None: ...
    def state(self) -> EpochState: ...
    def restore(self, state: EpochState) -> None: ...


class ListEpochs(Generic[T]):
    """Epochs over examples in memory; see `EpochIterator`.

    `batch_size` matters for the order "length_grouped", and for "torch_randperm" with
    `repeat_sampler`: as in TRL's RepeatSampler (GRPO), one generator serves all epochs, and
    examples that do not fill a batch are left out.
    """

    def __init__(
        self,
        examples: list[T],
        settings: DataSettings,
        *,
        seed: int,
        batch_size: int,
        repeat_sampler: bool = False,
    ) -> None:
        self.examples = examples
        self.size = len(examples)
        self._repeat_sampler = repeat_sampler and settings.order == "torch_randperm"
        if self._repeat_sampler:
            self.size -= len(examples) % batch_size
            if not self.size:
                raise DataError(
                    f'data.order = "torch_randperm" leaves out rows that do not fill a batch, as '
                    f"TRL does: {len(examples)} rows are fewer than train.batch_size = "
                    f'{batch_size}; lower it, or use "shuffled"'
                )

        self._kind: Order = settings.order
        self._seed = seed
        self._batch_size = batch_size
        self._lengths = [example.length for example in examples]
        digest = hashlib.sha256()
        for example in examples:
            digest.update(msgspec.msgpack.encode(example))
        self._digest = digest.hexdigest()
        self._order_words = f"{settings.order}, run.seed {seed}"
        if settings.order == "length_grouped" or self._repeat_sampler:
            self._order_words += f", train.batch_size {batch_size}"

        self._epoch = 0
        self._taken = 0
        self._orders: dict[int, IndexArray] = {}  # of the latest epoch only

    @property
    def longest(self) -> int:
        return max(self._lengths, default=0)

    def order(self, epoch: int) -> IndexArray:
        """Return the indices into `examples` (size,) that an epoch visits."""
        if epoch not in self._orders:
            order = epoch_order(
                self._kind,
                len(self.examples),
                seed=self._seed,
                epoch=epoch,
                lengths=self._lengths,
                batch_size=self._batch_size,
                one_generator=self._repeat_sampler,
            )
            self._orders = {epoch: order[: self.size]}
        return self._orders[epoch]

    def next(self) -> T | None:
        if self._taken == self.size:
            self._epoch, self._taken = self._epoch + 1, 0
            return None
        self._taken += 1
        return self.examples[int(self.order(self._epoch)[self._taken - 1])]

    def state(self) -> EpochState:
        return EpochState(
            epoch=self._epoch,
            taken=self._taken,
            size=self.size,
            digest=self._digest,
            order=self._order_words,
        )

    def restore(self, state: EpochState) -> None:
        if state.size != self.size:
            had = "a stream" if state.size is None else f"{state.size} usable rows"
            raise CheckpointError(
                f"the checkpoint was made with {had}, the dataset now has {self.size}; resume with "
                "the same data and data settings"
            )
        if state.digest != self._digest:
            raise CheckpointError(
                f"the checkpoint was made with {state.size} other rows, or with these in another "
                "order or truncated differently; resume with the same data and data settings"
            )
        state.require_order(self._order_words)
        self._epoch, self._taken = state.epoch, state.taken
