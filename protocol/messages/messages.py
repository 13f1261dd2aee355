"""Every message between the learner and its actors: tagged, frozen msgspec Structs.

They travel as msgpack, and unknown fields are refused. What they are made of is in
`protocol/messages/parts.py`; the reward wire has messages of its own, in
`protocol/messages/rewards.py`.
Added fields need defaults; a change of meaning needs a new `PROTOCOL_VERSION`.
"""

from typing import Any, Literal

import msgspec

from protocol.messages.parts import (
    Completion,
    RewardResult,
    RewardService,
    Sampling,
    TaskId,
    require,
)

PROTOCOL_VERSION = 2

TaskKind = Literal["train", "eval"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of the messages between our own processes."""


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

    free_completions: int


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
        require(bool(self.completions), "Group.completions must not be empty")
        require(len(self.reward.rewards) == expected, "Group.reward.rewards must be (G, F)")


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
        require(n > 0 and n % 4 == 0, "Task.prompt_ids must hold at least one int32")


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
