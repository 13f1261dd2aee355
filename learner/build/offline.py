"""Puts an offline learner together, for SFT or preference training on a dataset.

What distinguishes the methods is in `learner/objectives/methods.py`.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx

from learner.build.common import (
    Run,
    new_step,
    report_memory,
    resume_point,
    run_digests,
    schedule_of,
    started_at,
)
from learner.checkpoint import restoring
from learner.model.logprobs import Head
from learner.model.reference import Reference, make_reference
from learner.model.trials import choose_head
from learner.objectives.methods import method_of
from learner.offline.generated import DEFAULT_LENGTH, Answers
from learner.offline.held_out import HeldOutEvaluator
from learner.offline.reference_logprobs import Scorer, cache_folder, precompute
from learner.offline.source import OfflineSource, open_offline
from learner.records import Records
from learner.trainer import Trainer
from protocol.config.idle import idle
from protocol.config.load import load
from protocol.config.settings import OfflineRun, PreferenceRun, SftRun
from protocol.errors import ConfigError
from protocol.model.policy import LoadedPolicy, load_policy

log = logging.getLogger("pippin.learner")

DEFAULT_LIMIT = 1024  # tokens per row of a stream without data.max_length, to estimate memory


def assemble_offline(
    folder: Path,
    kind: str,
    stopped: Callable[[], bool] = lambda: False,
    done: Callable[[str], None] = lambda _: None,
) -> Run:
    """Build the offline run of `folder`: "sft" or "preference".

    If `stopped` interrupts what comes before the first step, the run only saves. `done` is told of
    each stage that has ended, by name.
    """
    path = folder / "config.toml"
    settings: OfflineRun = load(SftRun, path) if kind == "sft" else load(PreferenceRun, path)
    for line in idle(settings):
        log.warning(line)
    mx.random.seed(settings.run.seed)  # for dropout

    policy = load_policy(settings.model, seed=settings.run.seed)
    method = method_of(settings)
    reference = None
    if isinstance(settings, PreferenceRun) and method.needs_reference(settings):
        reference = make_reference(policy, settings.model)
    done("model")
    source = open_examples(settings, policy)
    done("data")
    total = source.total
    if total is None:
        raise ConfigError("a streamed dataset has no length: set train.max_steps")

    first = [] if settings.data.streaming else list(chain.from_iterable(source.first_batches()))
    if advice := method.advice(settings, first):
        log.warning(advice)
    answers = answering(settings, policy, source.evaluation) if settings.eval.generate else None
    head = choose_head(policy.model, settings.train.head)
    _report_memory(settings, policy, reference, head, first)
    digests = run_digests(policy, reference)
    checkpoint = resume_point(folder, policy, reference)
    if reference is not None and _precompute(settings, reference, head, source, stopped):
        reference = None  # frees the weights that only it holds

    reference_model = None if reference is None else reference.model
    objective = method.objective(settings, policy.model, head, reference_model)
    size = settings.eval.batch_size
    evaluator = HeldOutEvaluator(policy.model, objective, source.evaluation, size, answers)
    trainer: Trainer[Any] = Trainer(
        policy.model,
        source,
        objective,
        new_step(settings, policy, reference, total),
        Records(folder, started_at(folder)),
        schedule_of(settings, total),
        evaluator if source.evaluation else None,
        resume_state=digests,
    )

    trainer.stopping = stopped()
    if checkpoint is not None:
        with restoring(checkpoint) as position:
            source.restore(position)
        trainer.restore(checkpoint)
        trainer.undo_records()
    done("preparation")
    return Run(trainer, policy, folder, settings.model.path)


def open_examples(settings: OfflineRun, policy: LoadedPolicy) -> OfflineSource[Any]:
    """Open the examples that the run trains on and holds out."""
    return open_offline(
        settings.data,
        method_of(settings).builder(settings, policy.tokenizer),
        seed=settings.run.seed,
        batch_size=settings.train.batch_size,
        epochs=settings.train.num_train_epochs,
        max_steps=settings.train.max_steps,
    )


def answering(settings: OfflineRun, policy: LoadedPolicy, held_out: Sequence[Any]) -> Answers:
    """Return what answers held-out prompts; raises ConfigError where none has a prompt."""
    length = settings.eval.max_completion_length or DEFAULT_LENGTH
    found = Answers(policy.model, policy.tokenizer, settings.eval.batch_size, length)
    found.check(held_out)
    return found


def _report_memory(
    settings: OfflineRun,
    policy: LoadedPolicy,
    reference: Reference | None,
    head: Head,
    examples: list[Any],
) -> None:
    """Log the memory of a step over the longest of `examples`; without any, the longest allowed."""
    limit = settings.data.max_length or DEFAULT_LIMIT
    longest = max((example.length for example in examples), default=limit)

    method, train = method_of(settings), settings.train
    count = train.batch_size if method.needs_whole_batch(settings) else train.micro_batch_size
    report_memory(
        settings,
        policy,
        reference,
        head,
        sequences=count * method.sequences,
        length=longest,
        completion_length=longest,
    )


def _precompute(
    settings: OfflineRun,
    reference: Reference,
    head: Head,
    source: OfflineSource[Any],
    stopped: Callable[[], bool],
) -> bool:
    """Precompute reference log-probs if the settings ask for it; return whether all are there."""
    layout = method_of(settings).reference_layout(settings)
    if layout is None:
        return False
    scorer = Scorer(reference, head, layout)

    found = precompute(source.first_batches(), scorer, cache_folder(), stopped)
    if found is None:
        return False
    source.replace_first(found)

    held_out, size = source.evaluation, settings.eval.batch_size
    batches = [held_out[start : start + size] for start in range(0, len(held_out), size)]
    found = precompute(batches, scorer, cache_folder(), stopped) if batches else []
    if found is None:
        return False
    held_out[:] = chain.from_iterable(found)
    return True
