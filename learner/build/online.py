"""Puts the GRPO learner together: policy, reference, prompts, ledger, service, trainer.

launch/pairs.py's collector shares everything but the trainer: `OnlinePlan`, `new_coordinator` and
`new_service`.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

import logging
import platform
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from learner.build.common import (
    Run,
    resume_point,
    started_at,
)
from learner.build.forward import choose_forward, longest_prompt
from learner.build.grpo_run import LoadedRun, describe_with, load_run, new_trainer
from learner.build.recover import (
    Continued,
    begin_run,
    continue_run,
    drop_segments,
    journal_identity,
)
from learner.build.rehearsal import rehearsal
from learner.checkpoint import Checkpoint
from learner.data.prompts import PromptSource
from learner.ledger.ledger import Ledger
from learner.ledger.types import LedgerSettings
from learner.online.commands import Command, Reply
from learner.online.coordinator import Coordinator
from learner.online.evaluation import OnlineEvaluator
from learner.online.experience import TrainBatch
from learner.online.in_process import InProcess
from learner.online.service import LearnerService
from learner.online.source import OnlineSource
from learner.records import Records
from learner.trainer import Trainer
from protocol.config.settings import (
    GrpoRun,
    ModelSettings,
    OnlineRun,
    builtins,
    narrowed,
)
from protocol.messages.messages import Welcome
from protocol.messages.parts import RewardService, Sampling
from protocol.model.device_memory import visible_device
from protocol.model.policy import LoadedPolicy
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
    loaded = load_run(folder, done)
    settings, policy, prompts = loaded.settings, loaded.policy, loaded.prompts
    model = narrowed(settings.model, ModelSettings)
    shared = InProcess() if addresses.colocate else None
    plan = OnlinePlan(folder, addresses, settings, model, policy, prompts, loaded.total, shared)
    checkpoint = resume_point(folder, policy, loaded.reference)

    prompt = longest_prompt(settings.data, prompts)
    forward = choose_forward(settings, policy, loaded.reference, prompt)
    limits, identity = ledger_settings(plan), journal_identity(folder, settings, policy)
    if checkpoint is None:
        continued = begin_run(folder, limits, identity)
    else:
        # In one process, no policy outlives the learner.
        continued = continue_run(
            folder, checkpoint, limits, identity, prompts, snapshots=shared is None
        )
    coordinator = new_coordinator(
        plan, continued.ledger, forward.peak_bytes, settings.eval.max_completion_length
    )
    if continued.history is not None:
        coordinator.restore(continued.history)

    bridge = Bridge[Command, Reply](among=shared.bridges if shared else None)
    service = new_service(plan, coordinator, bridge)
    service.journal = continued.journal
    if settings.run.journal == "recovery":
        service.drop_old_segments = partial(drop_segments, folder, settings.run.save_total_limit)
    source = _new_source(plan, bridge, continued)
    records = Records(folder, started_at(folder))
    evaluator = _new_evaluator(loaded, source, continued)
    trainer = new_trainer(loaded, forward, source, records, evaluator)
    if checkpoint is not None:
        _restore(trainer, checkpoint, continued)

    with bridge:
        bridge.start(lambda _: service.run())
        if continued.recovered is None:
            # Before the first lease: of a new run, or of one that goes on with other settings.
            trainer.save(required=True)
        source.begin(trainer.step)
        done("preparation")
        if shared is None:
            rehearse = rehearsal(settings, prompts.epochs.longest, trainer)
        else:
            # The actor's turn is at the same time: a rehearsal would only delay it.
            rehearse, shared.welcome = None, coordinator.welcome
        yield Run(
            trainer, policy, folder, settings.model.path, rehearse, shared, source.return_batch
        )
        source.finish("the run is over")


def _restore(trainer: Trainer[TrainBatch], checkpoint: Checkpoint, continued: Continued) -> None:
    """Continue from a checkpoint, and from what the journal has after it."""
    trainer.restore(checkpoint)
    if continued.recovered is None:
        trainer.undo_records()
    else:
        trainer.catch_up(continued.recovered.version, continued.recovered.evaluated)


def _new_source(
    plan: OnlinePlan, bridge: Bridge[Command, Reply], continued: Continued
) -> OnlineSource:
    """Return the source of a run; earlier snapshots that actors do not need are deleted."""
    snapshots, recovered = plan.folder / "policy", continued.recovered
    shared = plan.in_process
    needed = "" if recovered is None or recovered.announced is None else recovered.announced.path
    for stale in snapshots.glob("policy-*"):
        if str(stale.resolve()) != needed:
            stale.unlink(missing_ok=True)  # left by a killed learner: nobody else would

    # Files are for actors elsewhere, if any can join.
    folder = snapshots if shared is None or plan.addresses.actors else None
    shelf = None if shared is None else shared.shelf
    return OnlineSource(bridge, plan.policy.model, folder, shelf, recovered)


def new_service(
    plan: OnlinePlan, coordinator: Coordinator, bridge: Bridge[Command, Reply]
) -> LearnerService:
    """Return the service of a run's sockets."""
    return LearnerService(
        coordinator,
        list(plan.addresses.actors),
        plan.addresses.snapshots,
        bridge,
        keys=plan.settings.transport.keys,
        max_message_bytes=plan.settings.transport.max_message_mb << 20,
        in_process=plan.in_process.channel.server if plan.in_process else None,
    )


def new_coordinator(
    plan: OnlinePlan, ledger: Ledger, learner_bytes: int, eval_length: int | None = None
) -> Coordinator:
    """Return the coordinator of a run's ledger.

    `learner_bytes` is this process's estimated memory, which actors leave it. `eval_length` limits
    the completions of an evaluation, in tokens; None: as in training.
    """
    train = Sampling(**builtins(plan.settings.sampling))
    evaluation = Sampling(
        num_generations=1,
        max_completion_length=eval_length or train.max_completion_length,
        temperature=0.0,
    )
    return Coordinator(
        ledger,
        plan.prompts,
        plan.prompts.evaluation,
        _welcome(plan, ledger.state.incarnation, learner_bytes, evaluation.max_completion_length),
        {"train": train, "eval": evaluation},
        plan.policy.vocab_size,
        policy_timeout_s=plan.settings.queue.policy_timeout_s,
    )


def ledger_settings(plan: OnlinePlan) -> LedgerSettings:
    """Return the ledger's limits, from the run's settings."""
    settings = plan.settings
    return LedgerSettings(
        batch_size=settings.train.batch_size,
        max_staleness=settings.queue.max_staleness,
        num_generations=settings.sampling.num_generations,
        total_batches=plan.total_batches,
        lease_s=settings.queue.lease_s,
        max_lease_s=settings.queue.max_lease_s,
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


def _new_evaluator(
    run: LoadedRun, source: OnlineSource, continued: Continued
) -> OnlineEvaluator | None:
    if not run.prompts.evaluation:
        return None
    weights = run.settings.rewards.reward_weights
    evaluator = OnlineEvaluator(source, weights, describe_with(run))
    if continued.recovered is not None:
        open_round = bool(continued.ledger.state.evals)
        evaluator.pending = open_round or bool(continued.recovered.evaluations)
    return evaluator
