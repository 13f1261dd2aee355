"""The interface between an actor's work and whatever samples its completions.

Nothing here loads MLX. An engine is driven by one thread: `add` requests, call `step` until the
groups come out. `set_policy` may be called between any two steps.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

from protocol.messages.parts import Completion, Sampling

NO_POLICY = -1  # the version of an engine that was given no policy; nothing is sampled with it


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt and how its completions are sampled. Example: 8 completions of one question.

    `key` names the request until its result is out. Completion i draws from a stream of random
    numbers that depends on `seed` and i alone. No token is sampled by a policy older than
    `min_policy_version`; `pinned_version` allows that version alone.
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
class Step:
    """What one step did: groups that became complete, tokens delivered, prompt tokens read."""

    finished: list[GenerationResult] = field(default_factory=list)
    tokens: int = 0
    prefilled: int = 0

    @property
    def progressed(self) -> bool:
        """Whether anything was computed."""
        return self.tokens > 0 or self.prefilled > 0


class Engine(Protocol):
    """Samples completions of many requests at once."""

    @property
    def version(self) -> int:
        """Version of the policy in force, or NO_POLICY."""
        ...

    @property
    def free_completions(self) -> int:
        """Completions that could be added now and start at once."""
        ...

    @property
    def oldest_version(self) -> int:
        """Oldest version that sampled a token of an unfinished group; NO_POLICY without any."""
        ...

    def add(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises DataError for token IDs that cannot be used, and ModelError for a prompt that does
        not fit the context or a pinned version that has passed.
        """
        ...

    def cancel(self, key: Hashable) -> bool:
        """Drop a request; its result never comes. False if it is not held."""
        ...

    def wants_policy(self, version: int) -> bool:
        """Whether `set_policy` would take this version now: newer, and no pinned row forbids it."""
        ...

    def set_policy(self, apply: Callable[[], None], version: int, digest: str) -> None:
        """Swap weights between two steps without draining: `apply` changes the model in place."""
        ...

    def step(self) -> Step:
        """Start what can be started and decode one token of every running row."""
        ...

    def reset(self) -> None:
        """Drop every request and forget the policy's version (versions begin anew)."""
        ...
