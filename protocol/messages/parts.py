"""The parts of which messages are made; each is checked when it is built or decoded.

Arrays in them are bytes, encoded by `protocol/messages/arrays.py`.
"""

import math
from typing import Annotated, Literal

import msgspec

from protocol.messages.limits import (
    FUNCTIONS,
    LOG_EXTRA_BYTES,
    LOG_METRICS,
    SPANS,
    Name,
)
from protocol.messages.rewards import RewardFault

FinishReason = Literal["stop", "length"]


def require_valid(condition: bool, message: str) -> None:
    """Raise ValueError, which msgspec reports as an invalid message, unless `condition` holds."""
    if not condition:
        raise ValueError(message)


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the parts of messages."""


class TaskId(Part, frozen=True, kw_only=True, order=True):
    """Identifies a task: the run, the learner's incarnation, a number. Never reused."""

    run: Name
    incarnation: Name
    number: int


class Sampling(Part, frozen=True, kw_only=True):
    """How completions are sampled; a `temperature` of 0 is greedy, `top_k` 0 and None are off."""

    num_generations: int
    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None

    def __post_init__(self) -> None:
        require_valid(self.num_generations >= 1, "Sampling.num_generations must be at least 1")
        require_valid(
            self.max_completion_length >= 1, "Sampling.max_completion_length must be >= 1"
        )
        require_valid(0 <= self.temperature < float("inf"), "Sampling.temperature must be >= 0")
        require_valid(0 < self.top_p <= 1, "Sampling.top_p must be in (0, 1]")
        require_valid(self.top_k >= 0, "Sampling.top_k must be >= 0")
        require_valid(
            self.min_p is None or 0 <= self.min_p <= 1, "Sampling.min_p must be in [0, 1]"
        )


class PolicySpan(Part, frozen=True, kw_only=True):
    """The tokens from `start` to the next span were sampled by this policy.

    Example: spans [(0, 3, …), (17, 4, …)] say that version 4 took over at token 17.
    """

    start: int
    version: int
    digest: Name


class Segment(Part, frozen=True, kw_only=True):
    """A run of completion tokens, from `start`: sampled by the policy, or given (multi-turn)."""

    start: int
    sampled: bool


class Completion(Part, frozen=True, kw_only=True):
    """One sampled completion of C tokens, the stop token included.

    `token_ids`: (C,) int32. `sampling_logprobs`: (C,) float32, nats, of the float32 distribution
    at the sampling temperature, before top-k, top-p and min-p. `kept_logmass`: (C,) float32, the
    log of the mass that these filters kept, or empty where none was on. No `segments` means that
    every token was sampled.
    """

    token_ids: bytes
    sampling_logprobs: bytes
    kept_logmass: bytes = b""
    policy_spans: Annotated[list[PolicySpan], msgspec.Meta(max_length=SPANS)]
    segments: Annotated[list[Segment], msgspec.Meta(max_length=SPANS)] = []
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        n = len(self.token_ids)  # bytes, 4 per token
        require_valid(n > 0 and n % 4 == 0, "Completion.token_ids must hold at least one int32")
        require_valid(
            len(self.sampling_logprobs) == n, "sampling_logprobs must align with token_ids"
        )
        require_valid(len(self.kept_logmass) in (0, n), "kept_logmass must be empty or align")
        # The learner decodes tens of thousands a second, and most are of one policy, all sampled.
        if len(self.policy_spans) == 1 and not self.segments:
            require_valid(self.policy_spans[0].start == 0, "policy_spans must begin at token 0")
            return

        count = n // 4
        starts = [span.start for span in self.policy_spans]
        require_valid(bool(starts) and starts[0] == 0, "policy_spans must begin at token 0")
        require_valid(starts == sorted(set(starts)), "policy_spans must ascend")
        require_valid(starts[-1] < count, "policy_spans must begin inside the completion")

        parts = [segment.start for segment in self.segments]
        require_valid(parts == sorted(set(parts)), "segments must ascend")
        require_valid(
            not parts or (parts[0] == 0 and parts[-1] < count), "segments must lie inside"
        )


class RewardResult(Part, frozen=True, kw_only=True):
    """The rewards of a group's G completions by F functions, and what these functions logged.

    `rewards`: (G, F) float32 in row-major order, NaN for None; F = len(names). `log_extra` is a
    JSON object on one line: as values it could take seventy times its size.
    """

    names: Annotated[list[Name], msgspec.Meta(max_length=FUNCTIONS)]
    rewards: bytes
    log_extra: Annotated[bytes, msgspec.Meta(max_length=LOG_EXTRA_BYTES)] = b"{}"
    log_metric: Annotated[dict[Name, float], msgspec.Meta(max_length=LOG_METRICS)] = {}
    faults: Annotated[list[RewardFault], msgspec.Meta(max_length=FUNCTIONS)] = []
    elapsed_s: float = 0.0

    def __post_init__(self) -> None:
        numbers = self.log_metric.values()
        require_valid(all(map(math.isfinite, numbers)), "RewardResult.log_metric must be finite")


class RewardService(Part, frozen=True, kw_only=True):
    """A reward service: its endpoints share the load; `timeout_s` bounds one call."""

    endpoints: list[str]
    timeout_s: float


class MemoryUse(Part, frozen=True, kw_only=True):
    """Memory that MLX holds in a process: in arrays now, in arrays at most so far, in its cache."""

    active_bytes: int = 0
    peak_bytes: int = 0
    cache_bytes: int = 0

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the three in GB (10⁹ bytes), such as `<prefix>peak_gb`."""
        return {
            f"{prefix}active_gb": self.active_bytes / 1e9,
            f"{prefix}peak_gb": self.peak_bytes / 1e9,
            f"{prefix}cache_gb": self.cache_bytes / 1e9,
        }

    def __add__(self, other: "MemoryUse") -> "MemoryUse":
        return MemoryUse(
            active_bytes=self.active_bytes + other.active_bytes,
            peak_bytes=self.peak_bytes + other.peak_bytes,
            cache_bytes=self.cache_bytes + other.cache_bytes,
        )
