"""Puts the GRPO learner together: policy, reference, prompts, ledger, service, trainer.

launch/pairs.py's collector shares everything but the trainer: `OnlinePlan`, `new_coordinator` and
`new_service`.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

import logging
import math
import platform
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import msgspec

from learner.build.common import (
    Run,
    new_step,
    resume_point,
    run_digests,
    schedule_of,
    started_at,
)
from learner.build.forward import Forward, choose_forward, longest_prompt
from learner.build.rehearsal import rehearsal
from learner.checkpoint import Checkpoint
from learner.data.prompts import PromptSource, open_prompts
from learner.ledger.journal import losses_since_checkpoint, read_journal
from learner.ledger.ledger import Ledger
from learner.ledger.types import LedgerSettings, ResumeReport
from learner.model.reference import Reference, make_reference
from learner.objectives.grpo import GrpoObjective
from learner.online.commands import Command, Reply
from learner.online.coordinator import Coordinator
from learner.online.evaluation import OnlineEvaluator
from learner.online.experience import CoordinatorState, PromptGroup, TrainBatch
from learner.online.in_process import InProcess
from learner.online.rollout_lines import Decoder, rollout_line
from learner.online.service import LearnerService
from learner.online.source import OnlineSource
from learner.records import Records
from learner.trainer import Trainer
from protocol.config.idle import idle
from protocol.config.load import load
from protocol.config.settings import (
    GrpoRun,
    ModelSettings,
    OnlineRun,
    builtins,
    narrowed,
)
from protocol.errors import ConfigError
from protocol.messages.messages import Welcome
from protocol.messages.parts import RewardService, Sampling
from protocol.model.device_memory import visible_device
from protocol.model.policy import LoadedPolicy, load_policy
from protocol.transport.bridge import Bridge

log = logging.getLogger("pippin.learner")


@dataclass(frozen=True)
class OnlineAddresses:
    """Where the processes of an online run reach each other, as endpoints.

    `actors`: where actors connect. `snapshots`: where policy snapshots are served. `rewards`: the
    reward services, each one endpoint or several that share the load, separated by commas. Without
    `actors`, only one in this process can join, and no socket is opened. `colocate`: there is one.
    """

    actors: Sequence[str]
    snapshots: str
    rewards: Sequence[str]
    colocate: bool = False


@dataclass(frozen=True)
class OnlinePlan:
    """What the parts of an online run are built from.

    `model` is what actors load, exactly as the learner loaded `policy`. `in_process` is shared with
    an actor in this process.
    """

    folder: Path
    addresses: OnlineAddresses
    settings: OnlineRun
    model: ModelSettings
    policy: LoadedPolicy
    prompts: PromptSource
    total_batches: int
    in_process: InProcess | None = None


@contextmanager
def assemble_online(
    folder: Path, addresses: OnlineAddresses, done: Callable[[str], None] = lambda _: None
) -> Generator[Run]:
    """Build the GRPO run of `folder`, and serve its actors inside the context.

    `done` is told of each stage that has ended, by name.
    """
    settings = load(GrpoRun, folder / "config.toml")
    for line in idle(settings):
        log.warning(line)

    mx.random.seed(settings.run.seed)  # for dropout
    policy = load_policy(settings.model, seed=settings.run.seed)
    reference = make_reference(policy, settings.model) if settings.objective.beta > 0 else None
    done("model")
    prompts = open_prompts(
        settings.data,
        policy.tokenizer,
        seed=settings.run.seed,
        epochs=None if settings.train.max_steps >= 0 else settings.train.num_train_epochs,
        batch_size=settings.train.batch_size,
        repeat_sampler=True,
    )
    done("data")
    total = total_batches(settings, prompts)
    model = narrowed(settings.model, ModelSettings)
    shared = InProcess() if addresses.colocate else None
    plan = OnlinePlan(folder, addresses, settings, model, policy, prompts, total, shared)
    checkpoint = resume_point(settings.run.resume, policy, reference)

    prompt = longest_prompt(settings.data, prompts)
    forward = choose_forward(settings, policy, reference, prompt)
    coordinator = new_coordinator(
        plan, forward.peak_bytes, checkpoint, settings.eval.max_completion_length
    )
    bridge = Bridge[Command, Reply](among=shared.bridges if shared else None)
    service = new_service(plan, coordinator, bridge)
    source = _new_source(plan, bridge)
    trainer = _new_trainer(settings, plan, reference, forward, source)
    if checkpoint is not None:
        trainer.restore(checkpoint)

    with bridge:
        bridge.start(lambda _: service.run())
        source.publish(trainer.step)
        done("preparation")
        if shared is None:
            rehearse = rehearsal(settings, prompts.epochs.longest, trainer)
        else:
            # The actor's turn is at the same time: a rehearsal would only delay it.
            rehearse, shared.welcome = None, coordinator.welcome
        yield Run(trainer, policy, folder, settings.model.path, rehearse, shared)
        source.finish("the run is over")


def _new_source(plan: OnlinePlan, bridge: Bridge[Command, Reply]) -> OnlineSource:
    """Return the source of a run whose earlier snapshots, if there are any, are deleted."""
    snapshots = plan.folder / "policy"
    for stale in snapshots.glob("policy-*"):
        stale.unlink(missing_ok=True)  # left by a killed learner: nobody else would delete them

    shared = plan.in_process
    if shared is None:
        return OnlineSource(bridge, plan.policy.model, snapshots)
    # Files are for actors elsewhere, if any can join.
    folder = snapshots if plan.addresses.actors else None
    return OnlineSource(bridge, plan.policy.model, folder, shared.shelf)


def total_batches(settings: OnlineRun, prompts: PromptSource) -> int:
    """Return the number of batches: `train.max_steps`, or fewer if the prompts end earlier.

    Raises ConfigError if it is unknown before a stream ends.
    """
    limits: list[int] = []
    if settings.train.max_steps >= 0:
        limits.append(settings.train.max_steps)
    if prompts.total is not None:
        limits.append(math.ceil(prompts.total / settings.train.batch_size))
    if not limits:
        raise ConfigError("a streamed dataset has no length: set train.max_steps")
    return min(limits)


def new_service(
    plan: OnlinePlan, coordinator: Coordinator, bridge: Bridge[Command, Reply]
) -> LearnerService:
    """Return the service of a run's sockets."""
    return LearnerService(
        coordinator,
        list(plan.addresses.actors),
        plan.addresses.snapshots,
        bridge,
        plan.folder / "ledger.jsonl",
        keys=plan.settings.transport.keys,
        max_message_bytes=plan.settings.transport.max_message_mb << 20,
        in_process=plan.in_process.channel.server if plan.in_process else None,
    )


def new_coordinator(
    plan: OnlinePlan,
    learner_bytes: int,
    checkpoint: Checkpoint | None = None,
    eval_length: int | None = None,
) -> Coordinator:
    """Return a run's coordinator, restored from `checkpoint` if there is one.

    `learner_bytes` is this process's estimated memory, which actors leave it. `eval_length` limits
    the completions of an evaluation, in tokens; None: as in training.
    """
    incarnation = uuid.uuid4().hex
    limits = _ledger_settings(plan)
    checkpointed, report = None, None
    if checkpoint is None:
        ledger = Ledger(limits, plan.folder.name, incarnation)
    else:
        checkpointed = msgspec.msgpack.decode(checkpoint.source, type=CoordinatorState)
        ledger, report = Ledger.restore(limits, checkpointed.ledger, incarnation)

    train = Sampling(**builtins(plan.settings.sampling))
    evaluation = Sampling(
        num_generations=1,
        max_completion_length=eval_length or train.max_completion_length,
        temperature=0.0,
    )
    coordinator = Coordinator(
        ledger,
        plan.prompts,
        plan.prompts.evaluation,
        _welcome(plan, incarnation, learner_bytes, evaluation.max_completion_length),
        {"train": train, "eval": evaluation},
        plan.policy.vocab_size,
    )
    if checkpointed is not None and report is not None:
        coordinator.restore(checkpointed, report)
        _report_losses(plan.folder, checkpointed, report)
    return coordinator


def _ledger_settings(plan: OnlinePlan) -> LedgerSettings:
    settings = plan.settings
    return LedgerSettings(
        batch_size=settings.train.batch_size,
        max_staleness=settings.queue.max_staleness,
        num_generations=settings.sampling.num_generations,
        total_batches=plan.total_batches,
        lease_s=settings.queue.lease_s,
        max_attempts=settings.queue.max_attempts,
        max_eval_tasks=max(4096, len(plan.prompts.evaluation)),
    )


def _welcome(plan: OnlinePlan, incarnation: str, learner_bytes: int, eval_length: int) -> Welcome:
    settings = plan.settings
    prompt = longest_prompt(settings.data, plan.prompts)
    held_out = max((each.length for each in plan.prompts.evaluation), default=0)
    longest = prompt + settings.sampling.max_completion_length
    batch = settings.train.batch_size * settings.sampling.num_generations
    return Welcome(
        run=plan.folder.name,
        incarnation=incarnation,
        model=builtins(plan.model),
        model_digest=plan.policy.model_digest,
        tokenizer_digest=plan.policy.tokenizer_digest,
        rewards=[
            RewardService(endpoints=text.split(","), timeout_s=settings.rewards.reward_timeout_s)
            for text in plan.addresses.rewards
        ],
        heartbeat_s=settings.actors.heartbeat_s,
        seed=settings.run.seed,
        in_flight_completions=(settings.queue.max_staleness + 1) * batch,
        local_actors=settings.actors.count,
        min_generations=1 if plan.prompts.evaluation else settings.sampling.num_generations,
        max_prompt=max(prompt, held_out),
        max_tokens=max(longest, held_out + eval_length if held_out else 0),
        learner_bytes=learner_bytes,
        deterministic=isinstance(settings, GrpoRun) and settings.run.deterministic,
        max_message_bytes=settings.transport.max_message_mb << 20,
        host=platform.node(),
        device=visible_device(),
    )


def _report_losses(folder: Path, checkpointed: CoordinatorState, report: ResumeReport) -> None:
    """Write lost.json: what was in progress at the checkpoint, and what happened after it."""
    events = read_journal(folder / "ledger.jsonl", checkpointed.ledger.incarnation)
    after = events[checkpointed.events :]
    losses = losses_since_checkpoint(report, checkpointed.ledger, after)
    log.warning(
        "lost when the previous learner ended: %d batches trained after the checkpoint (%d tasks), "
        "%d groups not trained yet, %d leases; %d tasks are leased again; see lost.json",
        losses.version_reached - losses.version,
        len(losses.trained_since),
        len(report.groups) + len(losses.received_since),
        len(report.leases),
        len(report.rejoined),
    )
    (folder / "lost.json").write_bytes(msgspec.json.format(msgspec.json.encode(losses)))


def _new_trainer(
    settings: GrpoRun,
    plan: OnlinePlan,
    reference: Reference | None,
    forward: Forward,
    source: OnlineSource,
) -> Trainer[TrainBatch]:
    policy, weights = plan.policy, settings.rewards.reward_weights

    def describe(item: PromptGroup, trained_at: int) -> dict[str, Any]:
        decoder = cast(Decoder, policy.tokenizer)
        return rollout_line(item, trained_at, decoder, settings.run.log_completions)

    objective = GrpoObjective(
        settings.objective,
        settings.train,
        settings.sampling,
        settings.rewards,
        policy.model,
        forward.head,
        describe,
        reference=reference.model if reference is not None else None,
        share_prompt=forward.share_prompt,
    )
    updates = plan.total_batches * settings.objective.num_iterations
    return Trainer(
        policy.model,
        source,
        objective,
        new_step(settings, policy, reference, updates),
        Records(plan.folder, started_at(plan.folder)),
        schedule_of(settings, plan.total_batches),
        OnlineEvaluator(source, weights, describe) if plan.prompts.evaluation else None,
        resume_state=run_digests(policy, reference),
    )
