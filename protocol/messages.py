"""Every message between two processes of a run: tagged, frozen msgspec Structs.

Two wires share this file. Between our own processes (learner and actors) messages are msgpack and
unknown fields are refused. The reward wire (`ScoreRequest`, `ScoreReply`) is JSON, has its own
version, and ignores unknown fields, so that reward servers can be written in any language.

Arrays travel as little-endian bytes with the dtype that the field's name implies: token IDs are
int32, log-probs float32. `ids_view` and `floats_view` decode them without a copy.
Added fields need defaults; a change of meaning needs a new `PROTOCOL_VERSION`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

PROTOCOL_VERSION = 1
REWARD_PROTOCOL_VERSION = 1

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
TaskKind = Literal["train", "eval"]
FinishReason = Literal["stop", "length"]


def ids_bytes(token_ids: Iterable[int] | Int32Array) -> bytes:
    """Encode token IDs as little-endian int32."""
    if not isinstance(token_ids, np.ndarray):
        token_ids = np.fromiter(token_ids, dtype=np.int32)
    return token_ids.astype("<i4", copy=False).tobytes()


def ids_view(data: bytes | memoryview) -> Int32Array:
    """Token IDs of `ids_bytes`, as a read-only view (N,) int32."""
    return np.frombuffer(data, dtype="<i4")


def floats_bytes(values: Sequence[float] | Float32Array) -> bytes:
    """Encode floats as little-endian float32."""
    return np.asarray(values, dtype="<f4").tobytes()


def floats_view(data: bytes | memoryview) -> Float32Array:
    """Values of `floats_bytes`, as a read-only view (N,) float32."""
    return np.frombuffer(data, dtype="<f4")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of the messages between our own processes."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what messages are made of."""


class TaskId(Part, frozen=True, kw_only=True, order=True):
    """A task's identity, never reused: the run, the learner's incarnation, a number."""

    run: str
    incarnation: str
    number: int


class Sampling(Part, frozen=True, kw_only=True):
    """How completions are sampled. `temperature` 0 is greedy; `top_k` 0 and None are off."""

    num_generations: int
    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None

    def __post_init__(self) -> None:
        _require(self.num_generations >= 1, "Sampling.num_generations must be at least 1")
        _require(self.max_completion_length >= 1, "Sampling.max_completion_length must be >= 1")
        _require(0 <= self.temperature < float("inf"), "Sampling.temperature must be >= 0")
        _require(0 < self.top_p <= 1, "Sampling.top_p must be in (0, 1]")
        _require(self.top_k >= 0, "Sampling.top_k must be >= 0")
        _require(self.min_p is None or 0 <= self.min_p <= 1, "Sampling.min_p must be in [0, 1]")


class PolicySpan(Part, frozen=True, kw_only=True):
    """The tokens from `start` (up to the next span) were sampled by this policy."""

    start: int
    version: int
    digest: str


class Segment(Part, frozen=True, kw_only=True):
    """A run of completion tokens, from `start`: sampled by the policy, or given (multi-turn)."""

    start: int
    sampled: bool


class Completion(Part, frozen=True, kw_only=True):
    """One sampled completion. C tokens, the stop token included.

    `token_ids`: (C,) int32. `behaviour_logprobs`: (C,) float32, nats, of the float32 distribution
    at the sampling temperature, before top-k, top-p and min-p. `kept_logmass`: (C,) float32, the
    log of the mass that those kept, or empty where none was in force.
    """

    token_ids: bytes
    behaviour_logprobs: bytes
    kept_logmass: bytes = b""
    policy_spans: list[PolicySpan]
    segments: list[Segment] = []
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        _require(n > 0 and n % 4 == 0, "Completion.token_ids must hold at least one int32")
        _require(len(self.behaviour_logprobs) == n, "behaviour_logprobs must align with token_ids")
        _require(len(self.kept_logmass) in (0, n), "kept_logmass must be empty or align")
        count = n // 4
        starts = [span.start for span in self.policy_spans]
        _require(bool(starts) and starts[0] == 0, "policy_spans must begin at token 0")
        _require(starts == sorted(set(starts)), "policy_spans must ascend")
        _require(starts[-1] < count, "policy_spans must begin inside the completion")
        parts = [segment.start for segment in self.segments]
        _require(parts == sorted(set(parts)), "segments must ascend")
        _require(not parts or (parts[0] == 0 and parts[-1] < count), "segments must lie inside")


class RewardFault(msgspec.Struct, frozen=True, kw_only=True):
    """A reward function that gave no rewards for a group, and why."""

    function: str
    kind: Literal["timeout", "exception", "contract", "unreachable", "died"]
    message: str


class RewardResult(Part, frozen=True, kw_only=True):
    """What the reward functions gave for the G completions of a group.

    `rewards`: (G, F) float32 in row-major order, NaN for None; F = len(names).
    """

    names: list[str]
    rewards: bytes
    log_extra: dict[str, list[Any]] = {}
    log_metric: dict[str, float] = {}
    faults: list[RewardFault] = []
    elapsed_s: float = 0.0


# ---- actor to learner -------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """The first word of an actor. Without digests it is an enquiry: the learner answers `Welcome`,
    and the actor says Hello again, with digests, when it has loaded its model."""

    protocol_version: int
    actor_id: str
    actor_incarnation: str
    host: str = ""
    model_digest: str = ""
    tokenizer_digest: str = ""


class Request(Message, frozen=True, kw_only=True):
    """Credit: the actor has room for this many more completions."""

    free_rows: int


class Release(Message, frozen=True, kw_only=True):
    """The actor is leaving: its leases may be given to others at once."""

    reason: str


class Group(Message, frozen=True, kw_only=True):
    """A finished task: its G completions and their rewards."""

    task: TaskId
    attempt: int
    actor_id: str
    actor_incarnation: str
    learner_incarnation: str
    completions: list[Completion]
    reward: RewardResult
    started_at: float
    finished_at: float
    generation_s: float
    reward_s: float

    def __post_init__(self) -> None:
        expected = 4 * len(self.completions) * len(self.reward.names)
        _require(bool(self.completions), "Group.completions must not be empty")
        _require(len(self.reward.rewards) == expected, "Group.reward.rewards must be (G, F)")


class Failed(Message, frozen=True, kw_only=True):
    """A task attempt that gave no group."""

    task: TaskId
    attempt: int
    reason: str


class Applied(Message, frozen=True, kw_only=True):
    """The actor now samples with this policy."""

    version: int
    digest: str


class Heartbeat(Message, frozen=True, kw_only=True):
    """Signs of life. `progress` counts decode steps of the actor's main thread; leases are renewed
    only when it moved. Rates for the display travel along."""

    progress: int
    tokens_sampled: int = 0
    tokens_per_s: float = 0.0
    groups_held: int = 0
    oldest_version: int = -1


# ---- learner to actor -------------------------------------------------------------------------


class RewardService(Part, frozen=True, kw_only=True):
    """Where rewards are had: the endpoints share the load; `timeout_s` bounds one call."""

    endpoints: list[str]
    timeout_s: float


class Welcome(Message, frozen=True, kw_only=True):
    """The learner accepts; what an actor needs to know of the run. `model` is `ModelConfig` as a
    builtin mapping, so that an actor needs no configuration of its own."""

    protocol_version: int
    run: str
    incarnation: str
    model: dict[str, Any]
    model_digest: str
    tokenizer_digest: str
    rewards: list[RewardService]
    heartbeat_s: float
    seed: int


class Refuse(Message, frozen=True, kw_only=True):
    """The learner does not accept what came. `fatal`: trying again will not help."""

    code: Literal[
        "hello_required",
        "protocol_version",
        "model",
        "tokenizer",
        "undecodable",
        "invalid",
        "stale",
    ]
    reason: str
    fatal: bool = False


class Task(Message, frozen=True, kw_only=True):
    """A lease: sample and score this prompt. `row` is the dataset row as JSON text, with `prompt`.

    `seed` does not depend on the attempt. No token is sampled by a policy older than
    `min_policy_version`; `pinned_version` (evaluation) allows that version alone.
    """

    task: TaskId
    attempt: int
    kind: TaskKind
    prompt_ids: bytes
    row: bytes
    sampling: Sampling
    seed: int
    min_policy_version: int
    pinned_version: int | None = None
    lease_s: float
    trainer_state: dict[str, Any] = {}

    def __post_init__(self) -> None:
        n = len(self.prompt_ids)
        _require(n > 0 and n % 4 == 0, "Task.prompt_ids must hold at least one int32")


class Cancel(Message, frozen=True, kw_only=True):
    """Stop work on this attempt; nothing is owed for it."""

    task: TaskId
    attempt: int


class Ack(Message, frozen=True, kw_only=True):
    """The group (or failure) of this attempt was taken; it need not be sent again."""

    task: TaskId
    attempt: int


class Policy(Message, frozen=True, kw_only=True):
    """A policy can be fetched: `path` on the learner's host, `endpoint` for everyone else."""

    version: int
    digest: str
    size: int
    path: str = ""
    endpoint: str = ""


class Stop(Message, frozen=True, kw_only=True):
    """The run is over; the actor may leave."""

    reason: str


# ---- the snapshot socket ----------------------------------------------------------------------


class Fetch(Message, frozen=True, kw_only=True):
    """Ask for part of a snapshot."""

    version: int
    digest: str
    offset: int
    length: int


class Chunk(Message, frozen=True, kw_only=True):
    """Part of a snapshot of `total` bytes. Empty `data` at `total` 0: no longer served."""

    version: int
    digest: str
    offset: int
    total: int
    data: bytes


ActorMessage = Hello | Request | Release | Group | Failed | Applied | Heartbeat
LearnerMessage = Welcome | Refuse | Task | Cancel | Ack | Policy | Stop
AnyMessage = ActorMessage | LearnerMessage | Fetch | Chunk


# ---- the reward wire (JSON; see protocol/REWARDS.md) ------------------------------------------


class RewardMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of the reward wire's messages: unknown fields are ignored."""


class ScoreRequest(RewardMessage, frozen=True, kw_only=True, tag="score"):
    """Score the N completions of one group. `columns` holds every other dataset column, each a
    list of N values. `prompts` and `completions` are strings, or lists of messages."""

    reward_protocol_version: int = REWARD_PROTOCOL_VERSION
    id: str
    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]] = {}
    trainer_state: dict[str, Any] = {}
    timeout_s: float = 60.0


class ScoreReply(RewardMessage, frozen=True, kw_only=True, tag="rewards"):
    """`rewards[f][n]` is function f's reward of completion n, or null."""

    reward_protocol_version: int = REWARD_PROTOCOL_VERSION
    id: str
    names: list[str]
    rewards: list[list[float | None]]
    log_extra: dict[str, list[Any]] = {}
    log_metric: dict[str, float] = {}
    faults: list[RewardFault] = []
    elapsed_s: float = 0.0


class ScoreProgress(RewardMessage, frozen=True, kw_only=True, tag="progress"):
    """The request is in the server's hands; `ahead` others are to be scored before it."""

    reward_protocol_version: int = REWARD_PROTOCOL_VERSION
    id: str
    ahead: int = 0


class ScoreRefusal(RewardMessage, frozen=True, kw_only=True, tag="refused"):
    """The request was not taken. `retry`: it may be, later or by another server."""

    reward_protocol_version: int = REWARD_PROTOCOL_VERSION
    id: str = ""
    reason: str
    retry: bool = False
