"""Continuous batching on mlx-lm: every group that the actor holds shares one decoding batch.

It is built from the two halves of mlx-lm's `BatchGenerator` (`PromptProcessingBatch` for prompts,
`GenerationBatch` for decoding) rather than from that class: its sampler is not told which rows it
samples for, which keyed sampling and exact policy spans need.

Decoding is pipelined: while a token is delivered, the next one of each row has been drawn already.
A draw carries the policy it was made with, so a swap between two steps is stamped exactly.
"""

import time
from collections.abc import Callable, Hashable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationBatch, StopSequences

from actors.engine.active import Row, Work
from actors.engine.base import NO_POLICY, GenerationRequest, GenerationResult, Step
from actors.engine.batch_sampler import RowSampler
from actors.engine.prefill import Prefiller, PromptCache, merge
from protocol.errors import DataError, ModelError

CLEAR_CACHE_STEPS = 512  # as mlx-lm's BatchGenerator does
PREFILL_TOKENS = 8192  # prompt tokens, padding included, that are read in one pass


class _Lane(GenerationBatch):
    """Rows that decode together; a finished row's cache is not kept."""

    def extract_cache(self, idx: int) -> PromptCache:
        return []


class _Float32Logits(nn.Module):
    """The model with float32 logits, so that what is sampled and recorded is in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __call__(self, inputs: mx.array, cache: PromptCache) -> mx.array:
        return self.model(inputs, cache=cache).astype(mx.float32)


class MlxEngine:
    """An `Engine` over an mlx-lm model. Use it from the thread that owns MLX.

    Rows of all groups share one batch of at most `max_concurrent_completions`. Models whose caches
    mlx-lm cannot batch decode row by row, each from a copy of its group's prompt cache.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        max_concurrent_completions: int = 32,
        prefill_step_size: int = 2048,
        context_length: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if max_concurrent_completions < 1:
            raise ModelError(
                "actors.max_concurrent_completions must be at least 1, got "
                f"{max_concurrent_completions}"
            )
        self._model = model
        self._decoder = _Float32Logits(model)
        self._stop = StopSequences([[token] for token in stop_token_ids])
        self._vocab_size = vocab_size
        self._max_concurrent_completions = max_concurrent_completions
        self._context_length = context_length
        self._clock = clock
        self._prefiller = Prefiller(model, prefill_step_size)
        self._works: dict[Hashable, Work] = {}
        self._lanes: list[tuple[_Lane, list[Row]]] = []
        self._version = NO_POLICY
        self._digest = ""
        self._steps = 0
        self._sampler = RowSampler(vocab_size)  # one object: mlx-lm calls it once a step
        model.eval()

    # ---- the interface -------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Version of the policy in force, or NO_POLICY."""
        return self._version

    @property
    def free_completions(self) -> int:
        """Completions that could be added now and start at once."""
        held = sum(len(work.waiting) + len(work.running) for work in self._works.values())
        return max(0, self._max_concurrent_completions - held)

    @property
    def oldest_version(self) -> int:
        """Oldest version that sampled a token of an unfinished group; NO_POLICY without any."""
        spans = [
            spans[0].version
            for work in self._works.values()
            for spans in (
                *(row.spans for row in work.running),
                *(completion.policy_spans for completion in work.done.values()),
            )
            if spans
        ]
        return min(spans, default=NO_POLICY)

    def add(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises DataError for token IDs that cannot be used, and ModelError for a prompt that does
        not fit the context or a pinned version that has passed.
        """
        self._check(request)
        positions = list(range(request.sampling.num_generations))
        self._works[request.key] = Work(request, waiting=positions)

    def cancel(self, key: Hashable) -> bool:
        """Drop a request; its result never comes. False if it is not held."""
        work = self._works.pop(key, None)
        if work is None:
            return False
        self._lanes = [
            kept for lane, rows in self._lanes if (kept := self._without(lane, rows, work))[1]
        ]
        return True

    def wants_policy(self, version: int) -> bool:
        """Whether `set_policy` would take this version now: newer, and no pinned row forbids it."""
        pins = (work.request.pinned_version for work in self._works.values())
        return version > self._version and all(p is None or p >= version for p in pins)

    def set_policy(self, apply: Callable[[], None], version: int, digest: str) -> None:
        """Swap weights between two steps without draining: `apply` changes the model in place.

        What `apply` raises is passed on and leaves the engine at its policy.
        """
        if not self.wants_policy(version):
            raise ModelError(
                f"the engine is at policy version {self._version} and cannot take {version}: "
                "versions ascend, and rows pinned to a version must finish first"
            )
        apply()
        self._model.eval()
        self._version, self._digest = version, digest
        for work in self._works.values():
            work.prefix = None

    def reset(self) -> None:
        """Drop every request and forget the policy's version (versions begin anew)."""
        self._works.clear()
        self._lanes.clear()
        self._sampler = RowSampler(self._vocab_size)
        self._version, self._digest = NO_POLICY, ""

    def step(self) -> Step:
        """Start what can be started and decode one token of every running row."""
        prefilled = self._admit()
        finished: list[GenerationResult] = []
        tokens = 0
        for lane, rows in self._lanes:
            tokens += len(rows)
            finished.extend(self._decode(lane, rows))
        self._lanes = [(lane, rows) for lane, rows in self._lanes if rows]
        self._steps += 1
        if self._steps % CLEAR_CACHE_STEPS == 0:
            mx.clear_cache()
        return Step(finished=finished, tokens=tokens, prefilled=prefilled)

    # ---- requests ------------------------------------------------------------------------

    def _check(self, request: GenerationRequest) -> None:
        if request.key in self._works:
            raise DataError(f"request {request.key} is held already")
        ids = request.prompt_ids
        if not ids:
            raise DataError(f"request {request.key}: the prompt must hold at least one token")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            worst = min(ids) if min(ids) < 0 else max(ids)
            raise DataError(
                f"request {request.key}: prompt token IDs must lie in [0, {self._vocab_size}), "
                f"got {worst}; is the tokenizer that of the model?"
            )
        if self._context_length is not None and len(ids) >= self._context_length:
            raise ModelError(
                f"request {request.key}: the prompt must be shorter than the model's context of "
                f"{self._context_length} tokens, got {len(ids)}; set data.max_prompt_length"
            )
        pinned = request.pinned_version
        if pinned is not None and pinned < self._version:
            raise ModelError(
                f"request {request.key} is pinned to policy version {pinned}, which has passed: "
                f"the engine is at {self._version}"
            )

    def _without(self, lane: _Lane, rows: list[Row], work: Work) -> tuple[_Lane, list[Row]]:
        keep = [i for i, row in enumerate(rows) if row.work is not work]
        if len(keep) < len(rows):
            lane.filter(keep)
        return lane, [rows[i] for i in keep]

    # ---- starting rows -------------------------------------------------------------------

    def _admit(self) -> int:
        """Start waiting rows while there is room; returns the prompt tokens read."""
        room = self._max_concurrent_completions - sum(len(rows) for _, rows in self._lanes)
        chosen: list[Work] = []
        planned = longest = 0
        for work in self._works.values():
            if planned >= room:
                break
            if not work.may_start(self._version):
                continue
            longest = max(longest, len(work.request.prompt_ids))
            if chosen and longest * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            chosen.append(work)
            planned += len(work.waiting)
        if not chosen:
            return 0
        now = self._clock()
        prefilled = self._prefill(chosen)
        rows: list[Row] = []
        caches: list[PromptCache] = []
        for work in chosen:
            started = work.start(room - len(rows), now)
            assert work.prefix is not None
            rows.extend(started)
            caches.extend(self._prefiller.rows(work.prefix, len(started)))
            if not work.waiting:
                work.prefix = None
        self._launch(rows, caches)
        return prefilled

    def _prefill(self, works: list[Work]) -> int:
        """Read the prompts of groups that have no prefix cache of this policy."""
        fresh = [work for work in works if work.prefix is None]
        prompts = [work.request.prompt_ids for work in fresh]
        for work, cache in zip(fresh, self._prefiller.run(prompts), strict=True):
            work.prefix = cache
        return sum(len(prompt) for prompt in prompts)

    def _launch(self, rows: list[Row], caches: list[PromptCache]) -> None:
        """Draw the first token of new rows, and let them join the running batch."""
        if not self._prefiller.mergeable:
            for row, cache in zip(rows, caches, strict=True):
                self._lanes.append((self._lane([row], cache), [row]))
            return
        lane = self._lane(rows, merge(caches))
        if self._lanes:
            running, members = self._lanes[0]
            running.extend(lane)
            members.extend(rows)
        else:
            self._lanes.append((lane, list(rows)))

    def _lane(self, rows: list[Row], cache: PromptCache) -> _Lane:
        self._sampler.expect(rows, self._version, self._digest)
        requests = [row.work.request for row in rows]
        return _Lane(
            self._decoder,
            uids=list(range(len(rows))),
            inputs=mx.array([request.prompt_ids[-1] for request in requests]),
            prompt_cache=cache,
            tokens=[[] for _ in rows],
            samplers=[self._sampler] * len(rows),
            fallback_sampler=self._sampler,
            logits_processors=[[] for _ in rows],
            stop_sequences=[self._stop] * len(rows),
            max_tokens=[request.sampling.max_completion_length for request in requests],
        )

    # ---- decoding ------------------------------------------------------------------------

    def _decode(self, lane: _Lane, rows: list[Row]) -> list[GenerationResult]:
        """Deliver one token a row; finished rows leave `rows`."""
        sources = [row.pending for row in rows]
        self._sampler.expect(rows, self._version, self._digest)
        finished: list[GenerationResult] = []
        keep: list[Row] = []
        for row, source, response in zip(rows, sources, lane.next(), strict=True):
            assert source is not None
            row.take(response.token, source)
            if response.finish_reason is None:
                keep.append(row)
            elif row.work.finish(row, "stop" if response.finish_reason == "stop" else "length"):
                del self._works[row.work.key]
                finished.append(row.work.result(self._clock()))
        rows[:] = keep
        return finished
