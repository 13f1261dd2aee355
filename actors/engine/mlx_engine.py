"""Continuous batching over one model: every group that the actor holds shares the decoder.

    add ──▶ waiting ──read prompt──▶ running, in a row ──one token per step──▶ done ──▶ finished

A group's prompt is read once, in chunks between decode steps, and every completion of the group
starts from it. Which completion a row holds is decided here; a `Decoder` computes.

Decoding is pipelined: while a token is delivered, the next one of each completion has already been
drawn. A draw carries the policy that it was made with, so spans stay exact across a swap.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from actors.engine.active import ActiveRequest
from actors.engine.base import NO_POLICY, EngineStep, GenerationRequest, GenerationResult
from actors.engine.decoding.choose_decoder import choose_decoder
from actors.engine.decoding.decoder import Drawn, NewCompletion, Reader
from actors.engine.decoding.sampling import completion_seed, has_filter
from actors.engine.transcript import Transcript
from protocol.errors import DataError, ModelError

CLEAR_CACHE_STEPS = 512  # as mlx-lm's BatchGenerator does


@dataclass
class _Reading:
    """Prompts that are being read, and the requests that wait for them."""

    reader: Reader
    requests: list[ActiveRequest]


class MlxEngine:
    """An `Engine`, which describes its methods, over an mlx-lm model.

    Use it from the thread that owns MLX. At most `max_concurrent_completions` are sampled at once.
    `max_tokens`: how many tokens the longest prompt and its completion have, where that is known.

    With `deterministic`, in float32, a completion's tokens and log-probs are the same bits whatever
    else is sampled, in all engines with the same `max_concurrent_completions` and `max_tokens`.
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
        max_tokens: int = 0,
        deterministic: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if max_concurrent_completions < 1:
            raise ModelError(
                "actors.max_concurrent_completions must be at least 1, got "
                f"{max_concurrent_completions}"
            )

        model.eval()
        self._model = model
        self._stop = np.array(sorted(set(stop_token_ids)), dtype=np.int64)
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._prefill_step_size = prefill_step_size
        self._deterministic = deterministic
        self._clock = clock

        self._decoder = choose_decoder(
            model,
            rows=max_concurrent_completions,
            vocab_size=vocab_size,
            prefill_step_size=prefill_step_size,
            max_tokens=max_tokens,
            deterministic=deterministic,
        )
        self._requests: dict[Hashable, ActiveRequest] = {}
        self._reading: _Reading | None = None
        self._rows: list[ActiveRequest | None] = [None] * max_concurrent_completions
        self._limits = np.zeros(max_concurrent_completions, np.int64)
        self._transcript = Transcript(max_concurrent_completions)
        self._version = NO_POLICY
        self._digest = ""
        self._steps = 0

    # ---- the interface -------------------------------------------------------------------

    @property
    def free_completions(self) -> int:
        waiting = sum(len(active.waiting) for active in self._requests.values())
        return max(0, self._rows.count(None) - waiting)

    def add(self, request: GenerationRequest) -> None:
        self._check(request)
        positions = list(range(request.sampling.num_generations))
        self._requests[request.key] = ActiveRequest(request, waiting=positions)

    def cancel(self, key: Hashable) -> bool:
        active = self._requests.pop(key, None)
        if active is None:
            return False

        rows = list(active.running)
        self._decoder.leave(rows)
        for row in rows:
            self._rows[row] = None
        active.waiting.clear()
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
        self._decoder.policy_changed()
        self._version, self._digest = version, digest

        # What was read belongs to one policy: waiting completions are prefilled again.
        self._reading = None
        for active in self._requests.values():
            active.prefix = None

    def reset(self) -> None:
        self._requests.clear()
        self._reading = None
        self._rows = [None] * len(self._rows)
        self._decoder.clear()
        self._version, self._digest = NO_POLICY, ""

    def step(self) -> EngineStep:
        prefilled = self._start_waiting()

        finished: list[GenerationResult] = []
        tokens = 0
        for drawn in self._decoder.step(self._version, self._digest):
            tokens += len(drawn.rows)
            finished += self._deliver(drawn)

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
        """Read prompts and start waiting completions, while there is room.

        Returns the prompt tokens read: one chunk at most, so that running rows never wait long.
        """
        chosen = self._choose()
        prefilled = 0
        while prefilled < self._prefill_step_size:
            read = self._read(chosen, self._prefill_step_size - prefilled)
            if not read:
                break
            prefilled += read

        self._join([active for active in chosen if active.prefix is not None])
        return prefilled

    def _choose(self) -> list[ActiveRequest]:
        """Return the oldest requests that may start and for which there is room."""
        room = self._rows.count(None)
        chosen: list[ActiveRequest] = []
        for active in self._requests.values():
            if room <= 0:
                break
            if active.may_start(self._version):
                chosen.append(active)
                room -= len(active.waiting)
        return chosen

    def _read(self, chosen: Sequence[ActiveRequest], chunk: int) -> int:
        """Read a chunk of the prompts of requests that have no prefix yet."""
        if self._reading is None:
            fresh = [active for active in chosen if active.prefix is None]
            if not fresh:
                return 0
            prompts = [active.request.prompt_ids[:-1] for active in fresh]
            first = self._decoder.together([len(prompt) for prompt in prompts])
            reader = self._decoder.reader([prompts[i] for i in first])
            self._reading = _Reading(reader, [fresh[i] for i in first])

        reader, requests = self._reading.reader, self._reading.requests
        prefilled = reader.read(self._prefill_step_size if self._deterministic else chunk)
        if reader.done:
            for active, prefix in zip(requests, reader.prefixes(), strict=True):
                active.prefix = prefix
            self._reading = None
            prefilled += len(requests)  # the last tokens of the prompts, which decoding reads
        return prefilled

    def _join(self, ready: Sequence[ActiveRequest]) -> None:
        """Start as many completions as there are free rows."""
        free = [row for row, active in enumerate(self._rows) if active is None]
        now = self._clock()

        joining: list[NewCompletion] = []
        for active in ready:
            while active.waiting and free:
                joining.append(self._started(active, free.pop(0), now))
            if not active.waiting:
                active.prefix = None  # nothing else will start from it
        if joining:
            self._decoder.join(joining)

    def _started(self, active: ActiveRequest, row: int, now: float) -> NewCompletion:
        request, prefix = active.request, active.prefix
        position = active.start(row, now)
        self._rows[row] = active
        self._limits[row] = request.sampling.max_completion_length
        self._transcript.start(row)
        return NewCompletion(
            row=row,
            prefix=prefix,
            last_token=request.prompt_ids[-1],
            position=len(request.prompt_ids) - 1,
            seed=completion_seed(request.seed, position),
            sampling=request.sampling,
        )

    # ---- delivery ------------------------------------------------------------------------

    def _deliver(self, drawn: Drawn) -> list[GenerationResult]:
        """Record one token per row; return the groups that are complete with it."""
        self._transcript.record(drawn)
        stopped = np.isin(drawn.tokens, self._stop)
        full = self._transcript.counts[drawn.rows] >= self._limits[drawn.rows]

        finished: list[GenerationResult] = []
        over = np.flatnonzero(stopped | full)
        for i in over:
            row = int(drawn.rows[i])
            active = self._rows[row]
            assert active is not None
            self._rows[row] = None
            completion = self._transcript.completion(
                row,
                "stop" if stopped[i] else "length",
                filtered=has_filter(active.request.sampling),
            )
            if active.finish(row, completion):
                del self._requests[active.request.key]
                finished.append(active.result(self._clock()))

        if over.size:
            self._decoder.leave(int(row) for row in drawn.rows[over])
        return finished
