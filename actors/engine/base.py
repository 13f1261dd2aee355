"""The interface between the actor's worker and the engine that samples its completions.

One thread drives an engine: `add` requests, then call `step` until the groups come out.
`set_policy` may be called between any two steps. This module does not load MLX.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

from protocol.messages.parts import Completion, Sampling

NO_POLICY = -1  # an engine's version before its first policy; it samples nothing then


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt and how its completions are sampled. Example: 8 completions of one question.

    `key` names the request until its result is out. The random numbers of completion i depend on
    `seed` and i only. No token is sampled by a policy older than `min_policy_version`;
    `pinned_version` allows that version only.
    """

    key: Hashable
    prompt_ids: list[int]
    sampling: Sampling
    seed: int
    min_policy_version: int = 0
    pinned_version: int | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """The G completions of a request, in order of position. Times are wall-clock seconds."""

    key: Hashable
    completions: list[Completion]
    started_at: float
    finished_at: float

    @property
    def generation_s(self) -> float:
        """Seconds from the prefill of the first completion to the last token of the last."""
        return self.finished_at - self.started_at


@dataclass(frozen=True, kw_only=True)
class EngineStep:
    """What one step did: groups completed, completion tokens delivered, prompt tokens read."""

    finished: list[GenerationResult] = field(default_factory=list[GenerationResult])
    tokens: int = 0
    prefilled: int = 0

    @property
    def made_progress(self) -> bool:
        """Whether anything was computed."""
        return self.tokens > 0 or self.prefilled > 0


class Engine(Protocol):
    """Samples completions of many requests at once."""

    @property
    def free_completions(self) -> int:
        """How many completions could be added now and start at once."""
        ...

    def add(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises DataError for token IDs that cannot be used, and ModelError for a prompt that does
        not fit the context or a pinned version that has passed.
        """
        ...

    def cancel(self, key: Hashable) -> bool:
        """Drop a request, whose result will never come; False if there is no such request."""
        ...

    def wants_policy(self, version: int) -> bool:
        """Whether `set_policy` would take it now: it is newer and no pin forbids it."""
        ...

    def set_policy(self, apply: Callable[[], None], version: int, digest: str) -> None:
        """Swap weights between two steps without draining: `apply` changes the model in place.

        If `apply` raises, the engine keeps its policy and the exception propagates.
        """
        ...

    def step(self) -> EngineStep:
        """Start what can be started and decode one token of every running completion."""
        ...

    def reset(self) -> None:
        """Drop every request and the policy's version: a new learner counts from 0."""
        ...
