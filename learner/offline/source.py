"""Batches of dataset examples, as the trainer's source."""

from collections.abc import Sequence

from learner.data.epochs import ListEpochs
from learner.data.examples import E, with_rows
from learner.data.filter import Builder
from learner.data.sets import Batches, open_sets
from protocol.config.settings import DataSettings
from protocol.errors import ConfigError


class OfflineSource(Batches[E]):
    """The trainer's `Source` of offline batches; it never waits, and publishes nothing."""

    exhausted = False

    def poll(self, timeout_s: float = 0.0) -> list[E] | None:
        """Return the next batch at once; None after the last."""
        batch = self.next_batch()
        self.exhausted = batch is None
        return batch

    def publish(self, version: int) -> None:
        """Log what became of a stream's rows after its last batch."""
        if version == self.total and self.epochs.size is None:
            self.report.log(listed=0)  # each was logged when it was read

    def metrics(self) -> dict[str, float]:
        """Return the epochs done so far; of a stream, the whole ones."""
        state = self.epochs.state()
        return {"epoch": state.epoch + (state.taken / state.size if state.size else 0.0)}

    def first_batches(self) -> list[list[E]]:
        """Return the batches of the first epoch, as far as the run goes.

        Raises ConfigError for a stream, whose batches are not known before they are read.
        """
        epochs, places = self._first_places()
        examples = [epochs.examples[place] for place in places]
        size = self.batch_size
        return [examples[start : start + size] for start in range(0, len(examples), size)]

    def replace_first(self, batches: Sequence[Sequence[E]]) -> None:
        """Replace the examples of `first_batches`, one by one, in all epochs."""
        epochs, places = self._first_places()
        examples = [example for batch in batches for example in batch]
        for place, example in zip(places, examples, strict=True):
            epochs.examples[place] = example

    def _first_places(self) -> tuple[ListEpochs[E], list[int]]:
        if not isinstance(self.epochs, ListEpochs):
            raise ConfigError(
                "data.streaming: the rows of a stream are not known before they are read; load the "
                "dataset whole, or leave objective.precompute_ref_log_probs out"
            )
        count = (self.total or 0) * self.batch_size
        return self.epochs, self.epochs.order(0)[:count].tolist()


def open_offline(
    settings: DataSettings,
    builder: Builder[E],
    *,
    seed: int,
    batch_size: int,
    epochs: float = 1.0,
    max_steps: int = -1,
) -> OfflineSource[E]:
    """Open the examples that `settings` name; `learner/data/examples.py` has the builders.

    Batches end after `max_steps` if positive, else after `epochs`. Held-out examples hold their
    rows. Raises DataError like `open_sets`, and ConfigError for a fraction of a stream's epoch.
    """
    sets = open_sets(
        settings, builder, seed=seed, batch_size=batch_size, held_out_builder=with_rows(builder)
    )
    if sets.train.size is None and max_steps <= 0 and epochs != int(epochs):
        raise ConfigError(
            f"train.num_train_epochs = {epochs} of a streamed dataset, whose length is unknown; "
            "give a whole number, or train.max_steps"
        )

    return OfflineSource(
        sets,
        batch_size=batch_size,
        num_epochs=epochs,
        max_batches=max_steps if max_steps > 0 else None,
    )
