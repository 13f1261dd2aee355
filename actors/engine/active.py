"""Requests that are being sampled, and which of their completions wait, run or are done."""

from dataclasses import dataclass, field
from typing import Any

from actors.engine.base import GenerationRequest, GenerationResult
from protocol.messages.parts import Completion


@dataclass(eq=False)
class ActiveRequest:
    """A request with its completions by stage: waiting, then running, then done."""

    request: GenerationRequest
    waiting: list[int] = field(default_factory=list[int])  # positions not started yet
    running: dict[int, int] = field(default_factory=dict[int, int])  # row: position
    done: dict[int, Completion] = field(default_factory=dict[int, Completion])  # by position
    prefix: Any = None  # what its prompt was read into, under the current policy
    started_at: float = 0.0

    def may_start(self, version: int) -> bool:
        """Whether completions are waiting and policy `version` may sample them."""
        pinned = self.request.pinned_version
        allowed = version >= self.request.min_policy_version and pinned in (None, version)
        return allowed and bool(self.waiting)

    def start(self, row: int, now: float) -> int:
        """Move the next waiting completion to `row`; return its position in the group."""
        if not self.running and not self.done:
            self.started_at = now
        position = self.waiting.pop(0)
        self.running[row] = position
        return position

    def finish(self, row: int, completion: Completion) -> bool:
        """Move the completion in `row` to done; True when the group is complete."""
        self.done[self.running.pop(row)] = completion
        return not self.running and not self.waiting

    def result(self, now: float) -> GenerationResult:
        """Return the group, its completions in order of position."""
        return GenerationResult(
            key=self.request.key,
            completions=[self.done[i] for i in sorted(self.done)],
            started_at=self.started_at,
            finished_at=now,
        )
