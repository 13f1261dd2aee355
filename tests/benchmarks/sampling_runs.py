"""Runs of the actor's engine, and of mlx-lm's BatchGenerator beside it, timed.

All completions have their full length, so both sample the same number of tokens.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from actors.engine.base import GenerationRequest
from actors.engine.mlx_engine import MlxEngine
from protocol.messages.parts import Sampling

Prompts = Sequence[list[int]]


@dataclass
class Timing:
    """The steps of a run: when each ended (s), and the completion tokens that it delivered.

    `held_bytes` is the most memory that MLX held between steps, buffer cache included.
    """

    times: list[float] = field(default_factory=lambda: [time.perf_counter()])
    tokens: list[int] = field(default_factory=list[int])
    held_bytes: int = 0

    def step(self, tokens: int) -> None:
        """Note the end of a step."""
        self.times.append(time.perf_counter())
        self.tokens.append(tokens)
        self.held_bytes = max(self.held_bytes, mx.get_active_memory() + mx.get_cache_memory())

    @property
    def seconds(self) -> float:
        """From the start to the end of the last step."""
        return self.times[-1] - self.times[0]

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens over the whole run."""
        return sum(self.tokens) / self.seconds

    def decode_ms(self) -> tuple[float, float]:
        """Return mean and median of the steps in which the batch was fullest, but for the first."""
        full = max(self.tokens)
        spans = zip(self.times, self.times[1:], self.tokens, strict=False)
        steps = [1000 * (end - start) for start, end, tokens in spans if tokens == full]
        steps = steps[1:] or steps  # a prefill comes before the first
        return fmean(steps), median(steps)


def make_engine(model: nn.Module, vocab: int, rows: int, **options: Any) -> MlxEngine:
    """Return an engine of `rows` completions that never stops early."""
    engine = MlxEngine(
        model, stop_token_ids=[], vocab_size=vocab, max_concurrent_completions=rows, **options
    )
    engine.set_policy(lambda: None, 0, "base")
    return engine


def requests(prompts: Prompts, group: int, tokens: int) -> Iterator[GenerationRequest]:
    """Yield a request for `group` completions of `tokens` tokens per prompt."""
    sampling = Sampling(num_generations=group, max_completion_length=tokens)
    for index, prompt in enumerate(prompts):
        yield GenerationRequest(key=index, prompt_ids=prompt, sampling=sampling, seed=index)


def run_engine(engine: MlxEngine, prompts: Prompts, group: int, tokens: int) -> Timing:
    """Add all groups at once and sample them to the end."""
    timing = Timing()
    for request in requests(prompts, group, tokens):
        engine.add(request)
    while (step := engine.step()).made_progress:
        timing.step(step.tokens)
    return timing


def run_raw(model: nn.Module, prompts: Prompts, group: int, tokens: int, rows: int) -> Timing:
    """Sample the same with a raw BatchGenerator, without recording log-probs."""
    generator = BatchGenerator(
        model, max_tokens=tokens, sampler=make_sampler(temp=1.0), completion_batch_size=rows
    )
    timing = Timing()
    generator.insert([list(prompt) for prompt in prompts for _ in range(group)])
    while responses := generator.next_generated():
        timing.step(len(responses))
    generator.close()
    return timing


def run_waves(
    engine: MlxEngine, prompts: Prompts, group: int, tokens: int, *, wave: int, waves: int
) -> Timing:
    """Keep `waves` waves of `wave` groups going, evenly apart; a finished one is replaced.

    Timed from the end of the first wave to the end of the one for which no prompts are left, so
    that the engine is full all along.
    """
    left = list(requests(prompts, group, tokens))
    timing: Timing | None = None
    joined = finished = count = 0

    while True:
        if joined < waves and count >= joined * tokens // waves:
            join(engine, left, wave)
            joined += 1
        step = engine.step()
        count += 1
        finished += len(step.finished)
        if timing is not None:
            timing.step(step.tokens)

        if finished >= wave:
            if timing is not None and not left:
                return timing
            finished -= wave
            join(engine, left, wave)
            timing = timing or Timing()


def join(engine: MlxEngine, left: list[GenerationRequest], wave: int) -> None:
    """Add the next `wave` groups."""
    for request in left[:wave]:
        engine.add(request)
    del left[:wave]


def joining_rates(
    engine: MlxEngine, prompts: Prompts, group: int, tokens: int, in_flight: int, wave: int
) -> tuple[float, float]:
    """Return the tokens/s with groups that join `wave` at a time, and all `in_flight` at once."""
    rates: list[float] = []
    for size in (wave, in_flight):
        run = run_waves(engine, prompts, group, tokens, wave=size, waves=in_flight // size)
        engine.reset()
        engine.set_policy(lambda: None, 0, "base")
        rates.append(run.tokens_per_s)
    return rates[0], rates[1]
