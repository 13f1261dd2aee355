"""Continuous batching on mlx-lm: every group that the actor holds shares one decoding batch.

    add ──▶ waiting ──prefill──▶ decoding batch ──one token per step──▶ done ──▶ EngineStep.finished

It is built from the two halves of mlx-lm's `BatchGenerator` (`PromptProcessingBatch` for prompts,
`GenerationBatch` for decoding) rather than from that class, whose sampler is not told which
completions it samples for; keyed sampling and exact policy spans need that.

Decoding is pipelined: while a token is delivered, the next one of each completion has already been
drawn. A draw carries the policy that it was made with, so spans stay exact across a swap.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

import time
from collections.abc import Callable, Hashable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import StopSequences

from actors.engine.active import ActiveCompletion, ActiveRequest
from actors.engine.base import NO_POLICY, EngineStep, GenerationRequest, GenerationResult
from actors.engine.decoding import BatchSampler, DecodingBatch, Float32Logits
from actors.engine.prefill import Prefiller, PromptCache, merge
from protocol.errors import DataError, ModelError

CLEAR_CACHE_STEPS = 512  # as mlx-lm's BatchGenerator does
PREFILL_TOKENS = 8192  # most prompt tokens, padding included, read in one pass


class MlxEngine:
    """An `Engine`, which describes its methods, over an mlx-lm model.

    Use it from the thread that owns MLX.

    Completions of all groups share one batch of at most `max_concurrent_completions`. Where mlx-lm
    cannot batch a model's caches, each completion is a batch by itself, which starts from a copy
    of its group's prompt cache.
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
        self._decoder = Float32Logits(model)
        self._stop = StopSequences([[token] for token in stop_token_ids])
        self._vocab_size = vocab_size
        self._max_concurrent_completions = max_concurrent_completions
        self._context_length = context_length
        self._clock = clock

        self._prefiller = Prefiller(model, prefill_step_size)
        self._requests: dict[Hashable, ActiveRequest] = {}
        self._batches: list[tuple[DecodingBatch, list[ActiveCompletion]]] = []
        self._version = NO_POLICY
        self._digest = ""
        self._steps = 0
        # One object for all completions, so that mlx-lm calls it once per step.
        self._sampler = BatchSampler(vocab_size)

        model.eval()

    # ---- the interface -------------------------------------------------------------------

    @property
    def free_completions(self) -> int:
        active = self._requests.values()
        held = sum(len(request.waiting) + len(request.running) for request in active)
        return max(0, self._max_concurrent_completions - held)

    @property
    def oldest_version(self) -> int:
        versions = [
            spans[0].version
            for active in self._requests.values()
            for spans in (
                *(completion.spans for completion in active.running),
                *(completion.policy_spans for completion in active.done.values()),
            )
            if spans
        ]
        return min(versions, default=NO_POLICY)

    def add(self, request: GenerationRequest) -> None:
        self._check(request)
        positions = list(range(request.sampling.num_generations))
        self._requests[request.key] = ActiveRequest(request, waiting=positions)

    def cancel(self, key: Hashable) -> bool:
        active = self._requests.pop(key, None)
        if active is None:
            return False

        for batch, completions in self._batches:
            keep = [i for i, c in enumerate(completions) if c.parent is not active]
            if len(keep) < len(completions):
                batch.filter(keep)
                completions[:] = [completions[i] for i in keep]
        self._batches = [(batch, running) for batch, running in self._batches if running]
        return True

    def wants_policy(self, version: int) -> bool:
        pins = (active.request.pinned_version for active in self._requests.values())
        return version > self._version and all(p is None or p >= version for p in pins)

    def set_policy(self, apply: Callable[[], None], version: int, digest: str) -> None:
        if not self.wants_policy(version):
            raise ModelError(
                f"the engine is at policy version {self._version} and cannot take {version}: "
                "versions ascend, and requests pinned to a version must finish first"
            )

        apply()
        self._model.eval()
        self._version, self._digest = version, digest

        # A prefix cache belongs to one policy: waiting completions are prefilled again.
        for active in self._requests.values():
            active.prefix = None

    def reset(self) -> None:
        self._requests.clear()
        self._batches.clear()
        self._sampler = BatchSampler(self._vocab_size)
        self._version, self._digest = NO_POLICY, ""

    def step(self) -> EngineStep:
        prefilled = self._start_waiting()

        finished: list[GenerationResult] = []
        tokens = 0
        for batch, completions in self._batches:
            tokens += len(completions)
            finished += self._decode(batch, completions)
        self._batches = [(batch, running) for batch, running in self._batches if running]

        self._steps += 1
        if self._steps % CLEAR_CACHE_STEPS == 0:
            mx.clear_cache()
        return EngineStep(finished=finished, tokens=tokens, prefilled=prefilled)

    # ---- requests ------------------------------------------------------------------------

    def _check(self, request: GenerationRequest) -> None:
        if request.key in self._requests:
            raise DataError(f"request {request.key} was already added")

        ids = request.prompt_ids
        if not ids:
            raise DataError(f"request {request.key}: the prompt must hold at least one token")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            worst = min(ids) if min(ids) < 0 else max(ids)
            raise DataError(
                f"request {request.key}: prompt token IDs must lie in [0, {self._vocab_size}), "
                f"got {worst}; does the tokenizer belong to the model?"
            )
        if self._context_length is not None and len(ids) >= self._context_length:
            raise ModelError(
                f"request {request.key}: the prompt must be shorter than the model's context of "
                f"{self._context_length} tokens, got {len(ids)}; set data.max_prompt_length"
            )

        pinned = request.pinned_version
        if pinned is not None and pinned < self._version:
            raise ModelError(
                f"request {request.key} is pinned to policy version {pinned}, but the engine is "
                f"already at {self._version}"
            )

    # ---- starting completions ------------------------------------------------------------

    def _start_waiting(self) -> int:
        """Start waiting completions while there is room; returns the prompt tokens read."""
        room = self._max_concurrent_completions - sum(len(running) for _, running in self._batches)
        chosen = self._choose(room)
        if not chosen:
            return 0

        now = self._clock()
        prefilled = self._prefill(chosen)

        completions: list[ActiveCompletion] = []
        caches: list[PromptCache] = []
        for active in chosen:
            started = active.start(room - len(completions), now)
            assert active.prefix is not None
            completions.extend(started)
            caches.extend(self._prefiller.share(active.prefix, len(started)))
            if not active.waiting:
                active.prefix = None  # nothing else will start from it

        self._join(completions, caches)
        return prefilled

    def _choose(self, room: int) -> list[ActiveRequest]:
        """Return the oldest requests that may start, within `room` and one prefill pass."""
        chosen: list[ActiveRequest] = []
        planned = longest = 0
        for active in self._requests.values():
            if planned >= room:
                break
            if not active.may_start(self._version):
                continue
            longest = max(longest, len(active.request.prompt_ids))
            if chosen and longest * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            chosen.append(active)
            planned += len(active.waiting)
        return chosen

    def _prefill(self, chosen: list[ActiveRequest]) -> int:
        """Read the prompts of requests that have no prefix cache of this policy."""
        fresh = [active for active in chosen if active.prefix is None]
        prompts = [active.request.prompt_ids for active in fresh]
        for active, cache in zip(fresh, self._prefiller.run(prompts), strict=True):
            active.prefix = cache
        return sum(len(prompt) for prompt in prompts)

    def _join(self, completions: list[ActiveCompletion], caches: list[PromptCache]) -> None:
        """Draw the first token of new completions and add them to the running batch."""
        if not self._prefiller.mergeable:
            for completion, cache in zip(completions, caches, strict=True):
                self._batches.append((self._new_batch([completion], cache), [completion]))
            return

        batch = self._new_batch(completions, merge(caches))
        if self._batches:
            running, members = self._batches[0]
            running.extend(batch)
            members.extend(completions)
        else:
            self._batches.append((batch, list(completions)))

    def _new_batch(self, completions: list[ActiveCompletion], cache: PromptCache) -> DecodingBatch:
        """Make a batch from prompts' caches, which already draws the first tokens."""
        self._sampler.expect(completions, self._version, self._digest)
        count = len(completions)
        requests = [completion.parent.request for completion in completions]
        return DecodingBatch(
            self._decoder,
            uids=list(range(count)),
            inputs=mx.array([request.prompt_ids[-1] for request in requests]),
            prompt_cache=cache,
            tokens=[[] for _ in requests],
            samplers=[self._sampler] * count,
            fallback_sampler=self._sampler,
            logits_processors=[[] for _ in requests],
            stop_sequences=[self._stop] * count,
            max_tokens=[request.sampling.max_completion_length for request in requests],
        )

    # ---- decoding ------------------------------------------------------------------------

    def _decode(
        self, batch: DecodingBatch, completions: list[ActiveCompletion]
    ) -> list[GenerationResult]:
        """Deliver one token per completion; finished ones leave `completions`."""
        # `next` delivers the pending tokens and draws the ones after them, so note the draws now.
        sources = [completion.pending for completion in completions]
        self._sampler.expect(completions, self._version, self._digest)

        finished: list[GenerationResult] = []
        keep: list[ActiveCompletion] = []
        for completion, source, response in zip(completions, sources, batch.next(), strict=True):
            assert source is not None
            completion.record(response.token, source)
            if response.finish_reason is None:
                keep.append(completion)
                continue
            reason = "stop" if response.finish_reason == "stop" else "length"
            if completion.parent.finish(completion, reason):
                del self._requests[completion.parent.request.key]
                finished.append(completion.parent.result(self._clock()))

        completions[:] = keep
        return finished
