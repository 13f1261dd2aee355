"""Requests and completions that are being sampled, and what was recorded for them so far."""

from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from actors.engine.base import GenerationRequest, GenerationResult
from actors.engine.prefill import PromptCache
from actors.engine.sampling import Draw, completion_seed, has_filter
from protocol.messages.arrays import floats_bytes, ids_bytes
from protocol.messages.parts import Completion, FinishReason, PolicySpan


class StampedDraw:
    """One draw for a whole batch, stamped with the policy that it was sampled from."""

    def __init__(self, draw: Draw, version: int, digest: str) -> None:
        self._draw: Draw | None = draw
        self.version = version
        self.digest = digest
        self._logprobs: list[float] = []
        self._kept_logmass: list[float] | None = None

    def at(self, index: int) -> tuple[float, float]:
        """Return log-prob and kept log-mass of the batch's completion `index`; waits for MLX."""
        # The first call copies the whole batch to the host, so that the others cost nothing.
        if self._draw is not None:
            kept = self._draw.kept_logmass
            mx.eval(  # pyright: ignore[reportUnknownMemberType]
                self._draw.logprobs, *([] if kept is None else [kept])
            )
            self._logprobs = _floats(self._draw.logprobs)
            self._kept_logmass = None if kept is None else _floats(kept)
            self._draw = None

        kept_logmass = 0.0 if self._kept_logmass is None else self._kept_logmass[index]
        return self._logprobs[index], kept_logmass


def _floats(array: mx.array) -> list[float]:
    return cast("list[float]", array.tolist())


@dataclass(eq=False)
class ActiveCompletion:
    """A completion that is being sampled.

    `pending` is the token that was drawn but not delivered yet: its draw and the index in it.
    """

    parent: "ActiveRequest"
    position: int  # in its group
    seed: int
    drawn: int = 0
    pending: tuple[StampedDraw, int] | None = None
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    kept_logmass: list[float] = field(default_factory=list[float])
    spans: list[PolicySpan] = field(default_factory=list[PolicySpan])

    def record(self, token: int, source: tuple[StampedDraw, int]) -> None:
        """Record a delivered token with the draw that it came from."""
        draw, index = source
        logprob, kept = draw.at(index)

        if not self.spans or self.spans[-1].version != draw.version:
            start = len(self.token_ids)
            self.spans.append(PolicySpan(start=start, version=draw.version, digest=draw.digest))
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.kept_logmass.append(kept)

    def completion(self, finish_reason: FinishReason) -> Completion:
        filtered = has_filter(self.parent.request.sampling)
        return Completion(
            token_ids=ids_bytes(self.token_ids),
            sampling_logprobs=floats_bytes(self.logprobs),
            kept_logmass=floats_bytes(self.kept_logmass) if filtered else b"",
            policy_spans=self.spans,
            finish_reason=finish_reason,
        )


@dataclass(eq=False)
class ActiveRequest:
    """A request with its completions by stage: waiting, then running, then done."""

    request: GenerationRequest
    waiting: list[int] = field(default_factory=list[int])  # positions not started yet
    running: list[ActiveCompletion] = field(default_factory=list[ActiveCompletion])
    done: dict[int, Completion] = field(default_factory=dict[int, Completion])
    prefix: PromptCache | None = None  # the prompt's cache, under the current policy
    started_at: float = 0.0

    def may_start(self, version: int) -> bool:
        """Whether completions are waiting and policy `version` may sample them."""
        pinned = self.request.pinned_version
        allowed = version >= self.request.min_policy_version and pinned in (None, version)
        return allowed and bool(self.waiting)

    def start(self, count: int, now: float) -> list[ActiveCompletion]:
        """Move up to `count` completions from waiting to running."""
        if not self.running and not self.done:
            self.started_at = now

        positions, self.waiting = self.waiting[:count], self.waiting[count:]
        started = [
            ActiveCompletion(self, i, completion_seed(self.request.seed, i)) for i in positions
        ]
        self.running.extend(started)
        return started

    def finish(self, completion: ActiveCompletion, reason: FinishReason) -> bool:
        """Move a completion from running to done; True when the group is complete."""
        self.running.remove(completion)
        self.done[completion.position] = completion.completion(reason)
        return not self.running and not self.waiting

    def result(self, now: float) -> GenerationResult:
        return GenerationResult(
            key=self.request.key,
            completions=[self.done[i] for i in sorted(self.done)],
            started_at=self.started_at,
            finished_at=now,
        )
