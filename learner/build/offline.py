"""Puts an offline learner together: SFT or preference losses over a dataset."""

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
from learner.data.examples import answers, pairs, sequences
from learner.interfaces import Objective
from learner.losses.preference import kto_weight_advice, needs_whole_batch
from learner.model.logprobs import Head
from learner.model.reference import Reference, make_reference
from learner.model.trials import choose_head
from learner.objectives.sft import SftObjective
from learner.offline.generated import DEFAULT_LENGTH, Answers
from learner.offline.held_out import HeldOutEvaluator
from learner.offline.reference_logprobs import Scorer, cache_folder, precompute
from learner.offline.source import OfflineSets, open_offline
from learner.records import Records
from learner.trainer import Trainer
from protocol.config.idle import idle
from protocol.config.load import load
from protocol.config.settings import OfflineRun, PreferenceRun, SftRun
from protocol.errors import ConfigError
from protocol.model.policy import LoadedPolicy, load_policy

log = logging.getLogger("pippin.learner")

DEFAULT_LIMIT = 1024  # tokens a row of a stream without data.max_length, for the memory estimate


def assemble_offline(folder: Path, kind: str, stopped: Callable[[], bool] = lambda: False) -> Run:
    """Build the offline run of `folder`: "sft" or "preference".

    Where `stopped` ends what comes before the first step, the run only saves.
    """
    path = folder / "config.toml"
    settings: OfflineRun = load(SftRun, path) if kind == "sft" else load(PreferenceRun, path)
    for line in idle(settings):
        log.warning(line)
    mx.random.seed(settings.run.seed)  # what dropout draws
    policy = load_policy(settings.model, seed=settings.run.seed)
    reference = _reference(settings, policy)
    sets = open_examples(settings, policy)
    total = sets.train.total
    if total is None:
        raise ConfigError("a streamed dataset has no length: set train.max_steps")
    _advise(settings, sets)
    answering = _answers(settings, policy, sets.evaluation)
    head = choose_head(policy.model, settings.train.head)
    _estimate_memory(settings, policy, reference, head, sets)
    digests = run_digests(policy, reference)
    checkpoint = resume_point(settings.run.resume, policy, reference)
    if reference is not None and _precompute(settings, reference, head, sets, stopped):
        reference = None  # and with it the weights that only it holds
    objective = _objective(settings, policy, reference, head)
    trainer: Trainer[Any] = Trainer(
        policy.model,
        sets.train,
        objective,
        new_step(settings, policy, reference, total),
        Records(folder, started_at(folder)),
        schedule_of(settings, total),
        HeldOutEvaluator(
            policy.model,
            objective,
            sets.evaluation,
            settings.eval.batch_size,
            answering,
        )
        if sets.evaluation
        else None,
        resume_state=digests,
    )
    trainer.stopping = stopped()
    if checkpoint is not None:
        sets.train.restore(checkpoint.source)
        trainer.restore(checkpoint)
    return Run(trainer, policy, folder, settings.model.path)


def _reference(settings: OfflineRun, policy: LoadedPolicy) -> Reference | None:
    """Make the reference where the loss has one."""
    if isinstance(settings, SftRun):
        return None
    objective = settings.objective
    if objective.reference_free or objective.method in ("cpo", "simpo", "orpo"):
        return None
    return make_reference(policy, settings.model)


def _estimate_memory(
    settings: OfflineRun,
    policy: LoadedPolicy,
    reference: Reference | None,
    head: Head,
    sets: OfflineSets[Any],
) -> None:
    """Log what a step over the longest examples takes; a stream's are as long as they may be."""
    rows, longest = settings.train.micro_batch_size, settings.data.max_length or DEFAULT_LIMIT
    if not settings.data.streaming:
        longest = max(example.length for batch in sets.train.first_batches() for example in batch)
    if isinstance(settings, PreferenceRun):
        if needs_whole_batch(settings.objective):
            rows = settings.train.batch_size
        if settings.objective.method != "kto":
            rows *= 2  # chosen and rejected
    report_memory(
        settings, policy, reference, head, rows=rows, length=longest, completion_length=longest
    )


def _advise(settings: OfflineRun, sets: OfflineSets[Any]) -> None:
    """Say where KTO's weights do not suit the answers that the run will see."""
    if isinstance(settings, SftRun) or settings.objective.method != "kto":
        return
    if settings.data.streaming:
        return
    labels = [answer.label for batch in sets.train.first_batches() for answer in batch]
    good = sum(labels)
    if advice := kto_weight_advice(good, len(labels) - good, settings.objective):
        log.warning(advice)


def _precompute(
    settings: OfflineRun,
    reference: Reference,
    head: Head,
    sets: OfflineSets[Any],
    stopped: Callable[[], bool],
) -> bool:
    """Give the examples their reference log-probs, where the settings ask for it; say whether.

    Where `stopped` ended it, not all of them have theirs.
    """
    if isinstance(settings, SftRun) or not settings.objective.precompute_ref_log_probs:
        return False
    scorer = Scorer(reference, head, settings.objective, settings.train)
    found = precompute(sets.train.first_batches(), scorer, cache_folder(), stopped)
    if found is None:
        return False
    sets.train.replace_first(found)
    held_out, size = sets.evaluation, settings.eval.batch_size
    if held_out:
        batches = [held_out[start : start + size] for start in range(0, len(held_out), size)]
        found = precompute(batches, scorer, cache_folder(), stopped)
        if found is None:
            return False
        held_out[:] = chain.from_iterable(found)
    return True


def _answers(settings: OfflineRun, policy: LoadedPolicy, held_out: Sequence[Any]) -> Answers | None:
    """Return what answers held-out prompts, where the settings ask for it; checked."""
    if not settings.eval.generate:
        return None
    length = settings.eval.max_completion_length or DEFAULT_LENGTH
    found = Answers(policy.model, policy.tokenizer, settings.eval.batch_size, length)
    found.check(held_out)
    return found


def open_examples(settings: OfflineRun, policy: LoadedPolicy) -> OfflineSets[Any]:
    """Open the examples that the run trains on and holds out."""
    build: Any
    if isinstance(settings, SftRun):
        build = sequences(
            settings.data,
            policy.tokenizer,
            completion_only_loss=settings.objective.completion_only_loss,
        )
    elif settings.objective.method == "kto":
        build = answers(settings.data, policy.tokenizer)
    else:
        build = pairs(settings.data, policy.tokenizer)
    return open_offline(
        settings.data,
        build,
        seed=settings.run.seed,
        batch_size=settings.train.batch_size,
        epochs=settings.train.num_train_epochs,
        max_steps=settings.train.max_steps,
    )


def _objective(
    settings: OfflineRun, policy: LoadedPolicy, reference: Reference | None, head: Head
) -> Objective[Any]:
    if isinstance(settings, SftRun):
        return SftObjective(settings.train, head)
    from learner.objectives.preference import PreferenceObjective

    return PreferenceObjective(
        settings.objective,
        settings.train,
        head,
        policy.model,
        reference=reference.model if reference is not None else None,
    )
