"""The rows of a running batch: one completion each, and what was sampled for it."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from actors.engine.base import GenerationRequest, GenerationResult
from actors.engine.prefill import PromptCache
from actors.engine.sampling import Draw, has_filter, row_seed
from protocol.messages.arrays import floats_bytes, ids_bytes
from protocol.messages.parts import Completion, FinishReason, PolicySpan


class Sampled:
    """One draw for the rows of a batch, and the policy that it came from."""

    def __init__(self, draw: Draw, version: int, digest: str) -> None:
        self._draw: Draw | None = draw
        self.version = version
        self.digest = digest
        self._logprobs: list[float] = []
        self._kept: list[float] | None = None

    def at(self, index: int) -> tuple[float, float]:
        """Return the log-prob and the kept log-mass of row `index`; waits for the device."""
        if self._draw is not None:
            kept = self._draw.kept_logmass
            mx.eval(self._draw.logprobs, *([] if kept is None else [kept]))
            self._logprobs = _floats(self._draw.logprobs)
            self._kept = None if kept is None else _floats(kept)
            self._draw = None
        return self._logprobs[index], 0.0 if self._kept is None else self._kept[index]


def _floats(array: mx.array) -> list[float]:
    return cast("list[float]", array.tolist())


@dataclass(eq=False)
class Row:
    """A completion that is being sampled. `pending`: the token drawn but not delivered yet."""

    work: "Work"
    position: int
    seed: int
    drawn: int = 0
    pending: tuple[Sampled, int] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept_logmass: list[float] = field(default_factory=list)
    spans: list[PolicySpan] = field(default_factory=list)

    def take(self, token: int, source: tuple[Sampled, int]) -> None:
        """Record a delivered token with the draw that it came from."""
        sampled, index = source
        logprob, kept = sampled.at(index)
        if not self.spans or self.spans[-1].version != sampled.version:
            self.spans.append(
                PolicySpan(
                    start=len(self.token_ids), version=sampled.version, digest=sampled.digest
                )
            )
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.kept_logmass.append(kept)

    def completion(self, finish_reason: FinishReason) -> Completion:
        """Return the finished completion."""
        filtered = has_filter(self.work.request.sampling)
        return Completion(
            token_ids=ids_bytes(self.token_ids),
            sampling_logprobs=floats_bytes(self.logprobs),
            kept_logmass=floats_bytes(self.kept_logmass) if filtered else b"",
            policy_spans=self.spans,
            finish_reason=finish_reason,
        )


@dataclass(eq=False)
class Work:
    """A request on its way: rows that wait, rows that run, completions that are done."""

    request: GenerationRequest
    waiting: list[int] = field(default_factory=list)  # positions that were not started
    running: list[Row] = field(default_factory=list)
    done: dict[int, Completion] = field(default_factory=dict)
    prefix: PromptCache | None = None  # of the policy in force
    started_at: float = 0.0

    @property
    def key(self) -> Hashable:
        """The request's key."""
        return self.request.key

    def may_start(self, version: int) -> bool:
        """Whether the policy `version` may sample for it and rows wait."""
        pinned = self.request.pinned_version
        allowed = version >= self.request.min_policy_version and pinned in (None, version)
        return allowed and bool(self.waiting)

    def start(self, count: int, now: float) -> list[Row]:
        """Move up to `count` rows from waiting to running."""
        if not self.running and not self.done:
            self.started_at = now
        positions, self.waiting = self.waiting[:count], self.waiting[count:]
        rows = [Row(self, i, row_seed(self.request.seed, i)) for i in positions]
        self.running.extend(rows)
        return rows

    def finish(self, row: Row, reason: FinishReason) -> bool:
        """Take a row's completion; True when the group is complete."""
        self.running.remove(row)
        self.done[row.position] = row.completion(reason)
        return not self.running and not self.waiting

    def result(self, now: float) -> GenerationResult:
        """Return the complete group."""
        return GenerationResult(
            key=self.key,
            completions=[self.done[i] for i in sorted(self.done)],
            started_at=self.started_at,
            finished_at=now,
        )
