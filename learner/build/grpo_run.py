"""What training a GRPO run and replaying it share: its model, prompts, objective and trainer."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from learner.build.common import new_step, run_digests, schedule_of
from learner.build.forward import Forward
from learner.data.prompts import PromptSource, open_prompts
from learner.interfaces import Evaluator, Source
from learner.model.reference import Reference, make_reference
from learner.objectives.grpo import GrpoObjective
from learner.online.experience import PromptGroup, TrainBatch
from learner.online.rollout_lines import Decoder, rollout_line
from learner.records import Records
from learner.trainer import Trainer
from protocol.config.idle import idle
from protocol.config.load import load
from protocol.config.settings import GrpoRun, OnlineRun
from protocol.errors import ConfigError
from protocol.model.policy import LoadedPolicy, load_policy

log = logging.getLogger("pippin.learner")


@dataclass(frozen=True)
class LoadedRun:
    """A run's settings, and what was loaded for them; `total` is its number of batches."""

    settings: GrpoRun
    policy: LoadedPolicy
    reference: Reference | None
    prompts: PromptSource
    total: int


def load_run(folder: Path, done: Callable[[str], None] = lambda _: None) -> LoadedRun:
    """Load the GRPO run of `folder`; `done` is told of each stage that has ended, by name."""
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
    return LoadedRun(settings, policy, reference, prompts, total)


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


def describe_with(run: LoadedRun) -> Callable[[PromptGroup, int], dict[str, Any]]:
    """Return a function that makes the rollouts.jsonl line of a group for a version."""

    def describe(item: PromptGroup, trained_at: int) -> dict[str, Any]:
        decoder = cast(Decoder, run.policy.tokenizer)
        return rollout_line(item, trained_at, decoder, run.settings.run.log_completions)

    return describe


def new_trainer(
    run: LoadedRun,
    forward: Forward,
    source: Source[TrainBatch],
    records: Records,
    evaluator: Evaluator | None = None,
) -> Trainer[TrainBatch]:
    """Return the trainer of a run over `source`."""
    settings, policy, reference = run.settings, run.policy, run.reference
    objective = GrpoObjective(
        settings.objective,
        settings.train,
        settings.sampling,
        settings.rewards,
        policy.model,
        forward.head,
        describe_with(run),
        reference=reference.model if reference is not None else None,
        share_prompt=forward.share_prompt,
    )
    updates = run.total * settings.objective.num_iterations
    return Trainer(
        policy.model,
        source,
        objective,
        new_step(settings, policy, reference, updates),
        records,
        schedule_of(settings, run.total),
        evaluator,
        resume_state=run_digests(policy, reference),
    )
