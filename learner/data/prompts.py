"""Prompts for actors: dataset rows, rendered and tokenised before they are leased."""

from dataclasses import dataclass
from typing import Any

from learner.data.filter import Builder, Report
from learner.data.rows import Row, RowError, json_row
from learner.data.sets import Batches, Sets, open_sets
from learner.data.tokens import Tokenizer, render_prompt
from protocol.config.settings import PromptData


@dataclass(frozen=True)
class Prompt:
    """A prompt's token IDs, and its row as JSON values, with `prompt` as in the dataset."""

    row_key: int
    prompt_ids: list[int]
    row: dict[str, Any]

    @property
    def length(self) -> int:
        return len(self.prompt_ids)


class PromptSource(Batches[Prompt]):
    """Prompts one at a time, endlessly if `num_epochs` is None."""

    def __init__(self, sets: Sets[Prompt], num_epochs: float | None) -> None:
        super().__init__(sets, batch_size=1, num_epochs=num_epochs)

    def next(self) -> Prompt | None:
        """Return the next prompt, or None after the last epoch."""
        batch = self.next_batch()
        return batch[0] if batch else None


def open_prompts(
    settings: PromptData,
    tokenizer: Tokenizer,
    *,
    seed: int,
    epochs: float | None = 1.0,
    batch_size: int = 1,
    repeat_sampler: bool = False,
) -> PromptSource:
    """Open the prompts that `settings` name; see `open_sets`."""
    sets = open_sets(
        settings,
        prompts(settings, tokenizer),
        seed=seed,
        batch_size=batch_size,
        repeat_sampler=repeat_sampler,
    )
    return PromptSource(sets, epochs)


def prompts(settings: PromptData, tokenizer: Tokenizer) -> Builder[Prompt]:
    """Build prompts; rows keep their other columns, which reward functions may read."""
    limit = settings.max_prompt_length

    def build(number: int, row: Row, _: Report) -> tuple[Prompt]:
        prompt_ids = render_prompt(tokenizer, row)
        if limit is not None and len(prompt_ids) > limit:
            raise RowError(
                "prompt_too_long",
                f"the prompt has {len(prompt_ids)} tokens, data.max_prompt_length is {limit}",
            )
        return (Prompt(row_key=number, prompt_ids=prompt_ids, row=json_row(row)),)

    return Builder(
        build, policies={"prompt_too_long": ("overlong_prompts", settings.overlong_prompts)}
    )
