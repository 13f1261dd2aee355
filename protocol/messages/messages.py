"""Every message between the learner and its actors, as tagged, frozen msgspec Structs.

    actor                                                          learner
      │── Hello: who I am, what I loaded ───────────────────────────────▶│
      │◀───────────────── Welcome: the run's terms; or Refuse: why not ──│
      │                                                                  │
      │◀─────────────────────── Policy: a snapshot that can be fetched ──│
      │── Fetch, to the snapshot socket ────────────────────────────────▶│
      │◀────────────────────────────────── Chunk: part of the snapshot ──│
      │── Applied: I now sample with this policy ───────────────────────▶│
      │                                                                  │
      │── Request: room for N more completions ─────────────────────────▶│
      │◀────────────────── Task: a lease, to sample and score a prompt ──│
      │── Heartbeat: progress, which renews the leases ─────────────────▶│
      │◀────────────────────────────── Cancel: stop work on this lease ──│
      │── Group: completions and rewards; or Failed: why not ───────────▶│
      │◀───────────────────────────────── Ack: it is stored, forget it ──│
      │                                                                  │
      │◀──────────────────────────────────────── Stop: the run is over ──│
      │── Release: I am leaving, my leases are free ────────────────────▶│

Messages travel as msgpack; unknown fields are refused. Their parts are in
`protocol/messages/parts.py`; the reward wire has its own messages, in
`protocol/messages/rewards.py`. New fields need defaults; a change of meaning needs a new
`PROTOCOL_VERSION`.
"""

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import structs

from protocol.messages.limits import COMPLETIONS, CREDIT, MESSAGE_BYTES, Count, Name, printable
from protocol.messages.parts import (
    Completion,
    MemoryUse,
    RewardResult,
    RewardService,
    Sampling,
    TaskId,
    require_valid,
)

PROTOCOL_VERSION = 4

TaskKind = Literal["train", "eval"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of the messages between Pippin's own processes."""


class WithReason(Message, frozen=True, kw_only=True):
    """Base of the messages that give a reason: text of the sender's, cut and made printable."""

    reason: str

    def __post_init__(self) -> None:
        structs.force_setattr(self, "reason", printable(self.reason))


# ---- actor to learner -------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """Actor → learner: introduces the actor, and what it loaded.

    Without digests it only asks for the terms: the learner answers `Welcome`, and the actor sends
    Hello again, with digests, once it has loaded its model. A restarted actor keeps its
    `actor_id` and has a new `actor_incarnation`. `capacity` says how many completions it samples
    at a time and why, for the user.

    Example: Hello(protocol_version=4, actor_id="studio-412", actor_incarnation="9f3c", ...)
    """

    protocol_version: int
    actor_id: Name
    actor_incarnation: Name
    host: Name = ""
    model_digest: Name = ""
    tokenizer_digest: Name = ""
    capacity: str = ""

    def __post_init__(self) -> None:
        structs.force_setattr(self, "capacity", printable(self.capacity))


class Request(Message, frozen=True, kw_only=True):
    """Actor → learner: credit; the actor has room for this many more completions.

    Example: with 8 completions per prompt, Request(free_completions=32) asks for four tasks.
    """

    free_completions: Annotated[int, msgspec.Meta(ge=0, le=CREDIT)]


class Release(WithReason, frozen=True, kw_only=True):
    """Actor → learner: the actor is leaving, and its leases can go to others at once."""


class Group(Message, frozen=True, kw_only=True):
    """Actor → learner: a finished task, with its G completions and their rewards.

    It is sent again until the learner acknowledges it. Times are wall-clock seconds.
    """

    task: TaskId
    attempt: int
    actor_id: Name
    actor_incarnation: Name
    learner_incarnation: Name
    completions: Annotated[list[Completion], msgspec.Meta(max_length=COMPLETIONS)]
    reward: RewardResult
    started_at: float
    finished_at: float
    generation_s: float
    reward_s: float

    def __post_init__(self) -> None:
        expected = 4 * len(self.completions) * len(self.reward.names)
        require_valid(bool(self.completions), "Group.completions must not be empty")
        require_valid(len(self.reward.rewards) == expected, "Group.reward.rewards must be (G, F)")
        times = self.started_at, self.finished_at, self.generation_s, self.reward_s
        require_valid(all(map(math.isfinite, times)), "the times of a Group must be finite")


class Failed(WithReason, frozen=True, kw_only=True):
    """Actor → learner: this attempt at a task gave no group; `reason` says why."""

    task: TaskId
    attempt: int


class Applied(Message, frozen=True, kw_only=True):
    """Actor → learner: the actor now samples with this policy."""

    version: int
    digest: Name


class Heartbeat(Message, frozen=True, kw_only=True):
    """Actor → learner: a sign of life, every few seconds, with rates for the display.

    `progress` counts turns of the actor's main loop. Leases are renewed only when it has grown, and
    tokens were sampled or prompt tokens read, or nothing can be sampled. `groups_held` counts
    leases in any stage: sampling, scoring, or waiting for an `Ack`; `groups_sampling` those in the
    first that the actor's policy may sample.
    """

    progress: int
    tokens_sampled: Count = 0
    tokens_read: Count = 0
    tokens_per_s: float = 0.0
    groups_held: Count = 0
    groups_sampling: Count = 0
    memory: MemoryUse = MemoryUse()


# ---- learner to actor -------------------------------------------------------------------------


class Welcome(Message, frozen=True, kw_only=True):
    """Learner → actor: the actor is accepted; what it needs to know about the run.

    `model` holds the fields of `protocol.config.settings.ModelSettings`, so that an actor needs no
    configuration of its own.

    The rest is what an actor chooses its number of concurrent completions by. The queue holds at
    most `in_flight_completions`, over `local_actors` that the launcher starts (0: all actors are
    remote), and a prompt has at least `min_generations` completions. `max_prompt` are the tokens of
    the longest prompt, `max_tokens` those of the longest prompt and completion together; of a
    stream, both are guesses. `learner_bytes` is the learner's estimated peak, on `device` (its
    CUDA_VISIBLE_DEVICES) of `host`. In a `deterministic` run, all actors sample in the same shapes.
    The learner accepts messages of at most `max_message_bytes`.
    """

    run: str
    incarnation: str
    model: dict[str, Any]
    model_digest: str
    tokenizer_digest: str
    rewards: list[RewardService]
    heartbeat_s: float
    seed: int
    in_flight_completions: int = 0
    local_actors: int = 0
    min_generations: int = 1
    max_prompt: int = 0
    max_tokens: int = 0
    learner_bytes: int = 0
    deterministic: bool = False
    max_message_bytes: int = MESSAGE_BYTES
    host: str = ""
    device: str = ""


class Refuse(WithReason, frozen=True, kw_only=True):
    """Learner → actor: something that the actor sent was not accepted.

    `fatal` means that trying again will not help.

    Example: Refuse(code="model", reason="the learner has digest 1a2b, got 3c4d", fatal=True)
    """

    code: Literal[
        "hello_required",
        "protocol_version",
        "model",
        "tokenizer",
        "undecodable",
        "invalid",
        "stale",
        "key",
        "turned_away",
    ]
    fatal: bool = False


class Task(Message, frozen=True, kw_only=True):
    """Learner → actor: a lease; sample this prompt and score its completions.

    `prompt_ids` are (P,) int32; `row` is the dataset row as JSON text, with its `prompt`. `seed` is
    the same for every attempt. No token is sampled by a policy older than `min_policy_version`;
    `pinned_version` (evaluation) allows that version only. The lease expires after `lease_s`
    without progress, and the task is leased again as the next attempt.
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
        require_valid(n > 0 and n % 4 == 0, "Task.prompt_ids must hold at least one int32")


class Cancel(Message, frozen=True, kw_only=True):
    """Learner → actor: stop working on this attempt; no answer is expected."""

    task: TaskId
    attempt: int


class Ack(Message, frozen=True, kw_only=True):
    """Learner → actor: this attempt's group (or failure) is stored and need not be sent again."""

    task: TaskId
    attempt: int


class Policy(Message, frozen=True, kw_only=True):
    """Learner → actor: a policy can be fetched, from `path` on the learner's host, else `endpoint`.

    `size` is the snapshot's in bytes. An actor in the learner's process takes the policy from its
    `PolicyShelf`; without other actors there is no snapshot: no path, no endpoint, size 0.
    """

    version: int
    digest: str
    size: int
    path: str = ""
    endpoint: str = ""


class Stop(WithReason, frozen=True, kw_only=True):
    """Learner → actor: the run is over, and the actor may leave."""


# ---- the snapshot socket ----------------------------------------------------------------------


class Fetch(Message, frozen=True, kw_only=True):
    """Actor → snapshot socket: asks for `length` bytes of a snapshot, from `offset`."""

    version: int
    digest: Name
    offset: int
    length: int


class Chunk(Message, frozen=True, kw_only=True):
    """Snapshot socket → actor: part of a snapshot of `total` bytes.

    `total` 0 (with empty `data`) means that the snapshot is no longer served.
    """

    version: int
    digest: str
    offset: int
    total: int
    data: bytes


ActorMessage = Hello | Request | Release | Group | Failed | Applied | Heartbeat
LearnerMessage = Welcome | Refuse | Task | Cancel | Ack | Policy | Stop
AnyMessage = ActorMessage | LearnerMessage | Fetch | Chunk
