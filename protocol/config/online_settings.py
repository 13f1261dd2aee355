"""The sections of programs that sample: rewards, sampling, queue, actors, transport, pairs."""

from typing import Annotated, Literal

from msgspec import Meta, field

from protocol.config.fields import (
    Count,
    FunctionName,
    LocalPath,
    Positive,
    PositiveInt,
    Section,
    UpToOne,
    doc,
)


class RewardSettings(Section, frozen=True, kw_only=True):
    """Reward functions and their weights."""

    functions: Annotated[
        list[FunctionName],
        doc("Functions: `file.py:function`, `package.module:function` or `zmq://host:port`."),
    ] = field(default_factory=list[str])
    reward_weights: Annotated[list[float] | None, doc("Factor per function; none: all 1.")] = None
    reward_timeout_s: Annotated[Positive, doc("Seconds that scoring a group may take.")] = 60.0
    workers: Annotated[PositiveInt, doc("Local reward servers.")] = 1


class GrpoRewards(RewardSettings, frozen=True, kw_only=True):
    """Reward functions and their weights."""

    max_none_batches: Annotated[
        PositiveInt, doc("Stop after this many batches in a row without any reward.")
    ] = 3


class SamplingSettings(Section, frozen=True, kw_only=True):
    """How completions are sampled."""

    num_generations: Annotated[int, Meta(ge=2), doc("Completions per prompt (a group).")] = 8
    max_completion_length: Annotated[PositiveInt, doc("Most tokens of a completion.")] = 512
    temperature: Annotated[Positive, doc("Divides logits; not 0: training has to sample.")] = 1.0
    top_p: Annotated[
        float,
        Meta(gt=0, le=1),
        doc("Sample from the likeliest tokens of this total probability; 1: off."),
    ] = 1.0
    top_k: Annotated[Count, doc("Sample from this many of the likeliest tokens; 0: off.")] = 0
    min_p: Annotated[
        UpToOne | None,
        doc("Drop tokens below this share of the likeliest one's probability; none: off."),
    ] = None


class QueueSettings(Section, frozen=True, kw_only=True):
    """How far sampling may run ahead of training."""

    max_staleness: Annotated[
        Count,
        doc("Batches that a group's policy may be behind when it is trained; 0: synchronous."),
    ] = 1
    lease_s: Annotated[float, doc("Seconds without progress before prompts go to others.")] = 120.0
    max_lease_s: Annotated[
        float,
        doc("Seconds until a prompt goes to others, whatever its actor reports."),
    ] = 3600.0
    policy_timeout_s: Annotated[
        Positive,
        doc(
            "Seconds without a newer policy applied, though announced, before prompts go to others."
        ),
    ] = 300.0
    max_attempts: Annotated[PositiveInt, doc("Leases of a prompt before it is given up.")] = 3


class ActorSettings(Section, frozen=True, kw_only=True):
    """The local actors."""

    count: Annotated[Count, doc("Local actors; 0: only remote ones, by `transport.bind`.")] = 1
    max_concurrent_completions: Annotated[
        PositiveInt | Literal["auto"],
        doc(
            "Completions per actor at a time; auto: as many as the queue can hold in flight, where "
            "the memory is enough."
        ),
    ] = "auto"
    prefill_step_size: Annotated[PositiveInt, doc("Prompt tokens per forward pass.")] = 2048
    devices: Annotated[
        Annotated[list[Count], Meta(min_length=1)] | None,
        doc(
            "NVIDIA GPUs of the local actors, in turn, counted from 0; none: those after the "
            "learner's."
        ),
    ] = None
    heartbeat_s: Annotated[Positive, doc("Seconds between an actor's heartbeats.")] = 2.0
    max_restarts: Annotated[
        Count,
        doc(
            "Restarts of an actor or reward server, within `run.restart_window_s`, before the run "
            "gives it up."
        ),
    ] = 10


class GrpoActors(ActorSettings, frozen=True, kw_only=True):
    """The local actors."""

    colocate: Annotated[
        bool | Literal["auto"],
        doc(
            "Sample in the learner's process, in turns with training: the base weights are in "
            "memory once, not twice; needs `actors.count` 1. auto: with one GPU and one actor."
        ),
    ] = "auto"


class TransportSettings(Section, frozen=True, kw_only=True):
    """Connections between learner and actors."""

    bind: Annotated[
        str,
        doc(
            "`tcp://host:port` for remote actors; the ports above it serve snapshots and rewards. "
            "Empty: this machine only, by ipc."
        ),
    ] = ""
    keys: Annotated[
        LocalPath, doc("Folder of CURVE keys made by launch/keys.py; required off loopback.")
    ] = ""
    max_message_mb: Annotated[PositiveInt, doc("Largest message that is accepted, in MiB.")] = 64


class PairsSettings(Section, frozen=True, kw_only=True):
    """How pairs are chosen."""

    mode: Annotated[
        Literal["best_worst", "given"],
        doc(
            "`best_worst`: the best and the worst completion of a group. `given`: the dataset's "
            "answer and the base model's, one per prompt; needs no reward function."
        ),
    ] = "best_worst"
    answer_column: Annotated[str, doc("Column of the chosen answer in mode `given`.")] = "answer"
    output: Annotated[str, doc("JSONL file to write; empty: pairs.jsonl in the run's folder.")] = ""
