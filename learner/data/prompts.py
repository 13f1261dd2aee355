"""Prompts for actors: dataset rows rendered, tokenised and ordered before any is leased."""

import datetime
import decimal
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from learner.data.dataset import open_rows
from learner.data.epochs import FeedState, ListFeed, StreamFeed
from learner.data.filter import Report, Sieve, kept, read_split, require_some
from learner.data.prepare import Preparation, preparation
from learner.data.rows import RawRow
from learner.data.tokens import Json, RowError, Tokenizer, check_text, render_prompt
from protocol.config.settings import GrpoData, PromptData

log = logging.getLogger("pippin.data")


@dataclass(frozen=True)
class Prompt:
    """A prompt: its token IDs, and the row as JSON-able values, with `prompt` as it was given."""

    row_key: int
    prompt_ids: list[int]
    row: dict[str, Any]


class PromptState(msgspec.Struct, frozen=True, kw_only=True):
    """Position of a PromptSource, for a checkpoint."""

    feed: FeedState
    given: int


class PromptSource:
    """Prompts in a deterministic order, epoch after epoch, that can be resumed exactly.

    `epochs` None gives prompts without end. `report` says which rows were left out; that of a
    stream grows as it is read.
    """

    def __init__(
        self, feed: ListFeed[Prompt] | StreamFeed[Prompt], report: Report, epochs: float | None
    ) -> None:
        self.report = report
        self._feed = feed
        self._epochs = epochs
        self._given = 0

    def __len__(self) -> int:
        """Prompts an epoch; raises TypeError for a stream."""
        if self._feed.size < 0:
            raise TypeError("a streamed dataset has no length; set train.max_steps")
        return self._feed.size

    @property
    def streamed(self) -> bool:
        """Whether the number of prompts is unknown."""
        return self._feed.size < 0

    @property
    def total(self) -> int | None:
        """Prompts over all epochs; None without end or for a stream."""
        if self._epochs is None or self.streamed:
            return None
        return math.ceil(self._epochs * self._feed.size)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest prompt; None for a stream."""
        if isinstance(self._feed, StreamFeed):
            return None
        return max((len(prompt.prompt_ids) for prompt in self._feed.examples), default=0)

    def next(self) -> Prompt | None:
        """Return the next prompt, or None when all epochs are over."""
        while not self._over():
            prompt = self._feed.next()
            if prompt is not None:
                self._given += 1
                return prompt
        return None

    def at(self, position: int) -> Prompt:
        """Return the prompt at a position counted over all epochs, whatever was given so far."""
        if isinstance(self._feed, StreamFeed):
            raise TypeError("a stream has no random access; use state and restore")
        return self._feed.at(*divmod(position, self._feed.size))

    def state(self) -> PromptState:
        """Where the next prompt comes from."""
        return PromptState(feed=self._feed.state(), given=self._given)

    def restore(self, state: PromptState) -> None:
        """Go on from `state`; raises CheckpointError if it is of another dataset."""
        self._feed.restore(state.feed)
        self._given = state.given

    def _over(self) -> bool:
        if self._epochs is None:
            return False
        total = self.total
        if total is not None:
            return self._given >= total
        return self._feed.state().epoch >= math.ceil(self._epochs)


@dataclass(frozen=True)
class PromptSets:
    """Prompts to train on, and those held out, which are never trained on."""

    train: PromptSource
    evaluation: list[Prompt]


def open_prompts(
    settings: PromptData,
    tokenizer: Tokenizer,
    *,
    seed: int,
    epochs: float | None = 1.0,
    batch_size: int = 1,
    repeat_sampler: bool = False,
) -> PromptSets:
    """Open the prompts that `settings` name, tokenised; streams are tokenised as they are read.

    For `batch_size` and `repeat_sampler` see `ListFeed`. Raises DataError: see `open_rows`, and for
    rows that cannot be used where the settings refuse them, or where none is left.
    """
    rows = open_rows(settings)
    sieve = _sieve(settings, rows.name, tokenizer, preparation(settings, rows))
    evaluation = _evaluation(settings, tokenizer)
    held = settings if evaluation is None else _without_held_out(settings)
    split = read_split(rows, sieve, held, seed=seed)
    if rows.length is None:
        feed = StreamFeed(rows, sieve, settings, seed=seed, skip=split.skip)
    else:
        require_some(sieve.report)
        feed = ListFeed(
            split.train,
            settings,
            seed=seed,
            batch_size=batch_size,
            length=lambda prompt: len(prompt.prompt_ids),
            repeat_sampler=repeat_sampler,
        )
    for line in sieve.report.lines():
        log.info(line)
    source = PromptSource(feed, sieve.report, epochs)
    return PromptSets(source, split.held_out if evaluation is None else evaluation)


def _without_held_out(settings: PromptData) -> PromptData:
    return msgspec.structs.replace(settings, eval_rows=0)


def _evaluation(settings: PromptData, tokenizer: Tokenizer) -> list[Prompt] | None:
    """Prompts of `eval_path` or `eval_split`, at most `eval_rows` if set; None without either."""
    if not isinstance(settings, GrpoData) or not (settings.eval_path or settings.eval_split):
        return None
    split = settings.eval_split or ("train" if settings.eval_path else "")
    rows = open_rows(settings, path=settings.eval_path, split=split)
    sieve = _sieve(settings, rows.name, tokenizer, preparation(settings, rows))
    prompts: list[Prompt] = []
    for prompt in kept(sieve, enumerate(rows.scan(0))):
        prompts.append(prompt)
        if len(prompts) == settings.eval_rows:
            break
    require_some(sieve.report)
    return prompts


def _sieve(
    settings: PromptData, name: str, tokenizer: Tokenizer, prepare: Preparation
) -> Sieve[Prompt]:
    limit = settings.max_prompt_length

    def build(number: int, row: RawRow, report: Report) -> Prompt:
        prompt_ids = render_prompt(tokenizer, row)
        if limit is not None and len(prompt_ids) > limit:
            raise RowError(
                "prompt_too_long",
                f"the prompt has {len(prompt_ids)} tokens, data.max_prompt_length is {limit}",
            )
        return Prompt(row_key=number, prompt_ids=prompt_ids, row=json_row(row))

    return Sieve(
        prepare,
        build,
        Report(name),
        settings.on_bad_row,
        {"prompt_too_long": settings.overlong_prompts},
    )


def json_row(row: RawRow) -> dict[str, Any]:
    """Return the row as JSON-able values: dates as ISO text, numpy values as Python's.

    Raises RowError naming the column that has no such form, or holds a lone surrogate.
    """
    return {str(column): _jsonable(value, str(column)) for column, value in row.items()}


def _jsonable(value: Json, where: str) -> Json:
    match value:
        case None | bool() | int():
            return value
        case str():
            return check_text(value, where)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {
                check_text(str(k), where): _jsonable(v, f"{where}.{k}") for k, v in value.items()
            }
        case list() | tuple():
            return [_jsonable(item, f"{where}[{i}]") for i, item in enumerate(value)]
        case np.ndarray() | np.generic():
            return _jsonable(value.tolist(), where)
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal():
            return float(value)
        case datetime.timedelta():
            return value.total_seconds()
    raise RowError(
        "unsupported",
        f"column {where} holds {type(value).__name__}, which is not JSON; convert it in "
        "data.prepare, or leave the column out there",
    )
