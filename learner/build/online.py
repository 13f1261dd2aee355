"""Puts the learner of GRPO together: policy, reference, prompts, ledger, service, trainer."""

import argparse
import logging
import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import msgspec

from learner.build.common import (
    Run,
    new_step,
    report_memory,
    resume_point,
    run_digests,
    schedule_of,
    started_at,
)
from learner.checkpoint import Checkpoint
from learner.data.prompts import PromptSets, open_prompts
from learner.ledger.journal import read_journal, since
from learner.ledger.ledger import Ledger
from learner.ledger.types import LedgerSettings, LostReport
from learner.model.logprobs import Head, choose_head
from learner.model.reference import Reference, make_reference
from learner.model.trials import choose_shared_prompt
from learner.objectives.grpo import GrpoObjective
from learner.online.actors import Terms
from learner.online.coordinator import Coordinator
from learner.online.evaluation import OnlineEvaluator
from learner.online.experience import CoordinatorState, TrainedGroup
from learner.online.rollout_lines import Decoder, describe
from learner.online.service import Service
from learner.online.source import OnlineSource
from learner.optim.step import should_compile
from learner.records import Records
from learner.trainer import Trainer
from protocol.config.load import load
from protocol.config.settings import GrpoRun, TrainSettings, builtins
from protocol.config.unread import unread
from protocol.errors import ConfigError
from protocol.messages.messages import PROTOCOL_VERSION, Welcome
from protocol.messages.parts import RewardService, Sampling
from protocol.model.policy import LoadedPolicy, load_policy
from protocol.transport.bridge import Bridge

log = logging.getLogger("pippin.learner")


@contextmanager
def assemble_online(args: argparse.Namespace) -> Iterator[Run]:
    """Build the GRPO run of `args.run_dir`, and serve its actors inside the context."""
    settings = load(GrpoRun, args.run_dir / "config.toml")
    for line in unread(settings):
        log.warning(line)
    mx.random.seed(settings.run.seed)  # what dropout draws
    policy = load_policy(settings.model, seed=settings.run.seed)
    reference = make_reference(policy, settings.model) if settings.objective.beta > 0 else None
    epochs = None if settings.train.max_steps >= 0 else settings.train.num_train_epochs
    prompts = open_prompts(
        settings.data,
        policy.tokenizer,
        seed=settings.run.seed,
        epochs=epochs,
        batch_size=settings.train.batch_size,
        repeat_sampler=True,
    )
    total = total_batches(settings, prompts)
    checkpoint = resume_point(settings.run.resume, policy, reference)
    coordinator = new_coordinator(args, settings, policy, prompts, total, checkpoint)
    bridge: Bridge[Any, Any] = Bridge()
    for stale in (args.run_dir / "policy").glob("policy-*"):
        stale.unlink(missing_ok=True)  # of a learner that was killed: nobody would delete them
    source = OnlineSource(bridge, policy.model, args.run_dir / "policy")
    service = new_service(args, settings, coordinator, bridge)
    trainer = _trainer(args, settings, policy, reference, prompts, source, total)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    with bridge:
        bridge.start(lambda _: service.run())
        source.stepped(trainer.step)
        yield Run(trainer, policy, args.run_dir, settings.model.path)
        source.finish("the run is over")


def total_batches(settings: GrpoRun, prompts: PromptSets) -> int:
    """Return the run's batches: `train.max_steps`, or fewer where the prompts end before.

    Raises ConfigError where only the end of a stream would tell.
    """
    limits: list[int] = []
    if settings.train.max_steps >= 0:
        limits.append(settings.train.max_steps)
    if prompts.train.total is not None:
        limits.append(math.ceil(prompts.train.total / settings.train.batch_size))
    if not limits:
        raise ConfigError("a streamed dataset has no length: set train.max_steps")
    return min(limits)


def new_service(
    args: argparse.Namespace, settings: GrpoRun, coordinator: Coordinator, bridge: Bridge[Any, Any]
) -> Service:
    """Return the service of a run's sockets."""
    return Service(
        coordinator,
        list(args.endpoint),
        args.snapshots,
        bridge,
        args.run_dir / "ledger.jsonl",
        keys=settings.transport.keys,
        max_message_bytes=settings.transport.max_message_mb << 20,
    )


def new_coordinator(
    args: argparse.Namespace,
    settings: GrpoRun,
    policy: LoadedPolicy,
    prompts: PromptSets,
    total: int,
    checkpoint: Checkpoint | None,
) -> Coordinator:
    """Return the coordinator of a run of `total` batches, as `checkpoint`, if any, left it."""
    incarnation = uuid.uuid4().hex
    limits = LedgerSettings(
        batch_size=settings.train.batch_size,
        max_staleness=settings.queue.max_staleness,
        num_generations=settings.sampling.num_generations,
        total_batches=total,
        lease_s=settings.queue.lease_s,
        max_attempts=settings.queue.max_attempts,
        max_eval_tasks=max(4096, len(prompts.evaluation)),
    )
    terms = _terms(args, settings, policy, incarnation)
    if checkpoint is None:
        ledger = Ledger(limits, args.run_dir.name, incarnation)
        return Coordinator(ledger, prompts.train, prompts.evaluation, terms)
    state = msgspec.msgpack.decode(checkpoint.source, type=CoordinatorState)
    ledger, lost = Ledger.restore(limits, state.ledger, incarnation)
    coordinator = Coordinator(ledger, prompts.train, prompts.evaluation, terms)
    coordinator.adopt(state, lost)
    _report_lost(args.run_dir, state, lost)
    return coordinator


def _report_lost(folder: Path, state: CoordinatorState, report: LostReport) -> None:
    """Write lost.json: what was under way at the checkpoint, and what came after it."""
    old = state.ledger.incarnation
    events = read_journal(folder / "ledger.jsonl", old)[state.events :]
    lost = since(report, state.ledger.run, old, state.ledger.version, events)
    log.warning(
        "lost with the learner before: %d batches trained after the checkpoint (%d tasks), %d "
        "groups not trained yet, %d leases; %d tasks are leased again; see lost.json",
        lost.version_reached - lost.version,
        len(lost.trained_since),
        len(report.groups) + len(lost.received_since),
        len(report.leases),
        len(report.rejoined),
    )
    (folder / "lost.json").write_bytes(msgspec.json.format(msgspec.json.encode(lost)))


def _terms(
    args: argparse.Namespace, settings: GrpoRun, policy: LoadedPolicy, incarnation: str
) -> Terms:
    train = Sampling(**builtins(settings.sampling))
    length = settings.eval.max_completion_length or train.max_completion_length
    services = [
        RewardService(endpoints=text.split(","), timeout_s=settings.rewards.reward_timeout_s)
        for text in args.rewards
    ]
    welcome = Welcome(
        protocol_version=PROTOCOL_VERSION,
        run=args.run_dir.name,
        incarnation=incarnation,
        model=builtins(settings.model),
        model_digest=policy.model_digest,
        tokenizer_digest=policy.tokenizer_digest,
        rewards=services,
        heartbeat_s=settings.actors.heartbeat_s,
        seed=settings.run.seed,
    )
    return Terms(
        welcome=welcome,
        train=train,
        evaluate=Sampling(num_generations=1, max_completion_length=length, temperature=0.0),
        seed=settings.run.seed,
        lease_s=settings.queue.lease_s,
        vocab_size=policy.vocab_size,
    )


def _trainer(
    args: argparse.Namespace,
    settings: GrpoRun,
    policy: LoadedPolicy,
    reference: Reference | None,
    prompts: PromptSets,
    source: OnlineSource,
    total: int,
) -> Trainer[Any]:
    settings_objective, train = settings.objective, settings.train
    head = choose_head(policy.model, train.head)
    share_prompt = _shares_prompt(train, policy, reference, head)
    longest = settings.sampling.max_completion_length
    report_memory(
        settings,
        policy,
        reference,
        head,
        rows=train.micro_batch_size * settings.sampling.num_generations,
        length=longest + _longest_prompt(settings, prompts),
        completion_length=longest,
        shared_prompt=share_prompt,
    )

    def line(item: TrainedGroup, trained_at: int) -> dict[str, Any]:
        return describe(
            item, trained_at, cast(Decoder, policy.tokenizer), settings.run.log_completions
        )

    objective = GrpoObjective(
        settings_objective,
        train,
        settings.sampling,
        settings.rewards,
        policy.model,
        head,
        line,
        reference=reference.model if reference is not None else None,
        share_prompt=share_prompt,
    )
    evaluator = OnlineEvaluator(
        source, settings.rewards.reward_weights, line, len(prompts.evaluation)
    )
    return Trainer(
        policy.model,
        source,
        objective,
        new_step(settings, policy, reference, total * settings_objective.num_iterations),
        Records(args.run_dir, started_at(args.run_dir)),
        schedule_of(settings, total),
        evaluator if prompts.evaluation else None,
        resume_state=run_digests(policy, reference),
    )


def _shares_prompt(
    train: TrainSettings, policy: LoadedPolicy, reference: Reference | None, head: Head
) -> bool:
    """Return whether a micro-batch, which must be one group, computes its prompt once."""
    return train.micro_batch_size == 1 and choose_shared_prompt(
        [policy.model] if reference is None else [policy.model, reference.model],
        train.shared_prompt,
        head=head,
        gradient_checkpointing=train.gradient_checkpointing,
        compiled=should_compile(train.compile),
    )


def _longest_prompt(settings: GrpoRun, prompts: PromptSets) -> int:
    """Return the tokens of the longest prompt; a stream's limit, or 512 where it sets none."""
    longest = prompts.train.longest
    return longest if longest is not None else settings.data.max_prompt_length or 512
