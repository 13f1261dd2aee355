"""What all learners are built from: checkpoint, optimiser step, schedule."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from learner.checkpoint import Checkpoint, load_checkpoint, remove_unfinished
from learner.model.logprobs import Head
from learner.model.memory import estimate_memory, warn_if_too_large
from learner.model.reference import Reference
from learner.online.in_process import InProcess
from learner.optim.step import Step, should_compile
from learner.trainer import Schedule, Trainer
from protocol.config.settings import TrainingRun
from protocol.errors import CheckpointError
from protocol.model.adapters import save_adapters
from protocol.model.policy import LoadedPolicy
from protocol.model.snapshots import load_trainable
from protocol.run_record import read_run, write_run

log = logging.getLogger("pippin.learner")


@dataclass
class Run:
    """A learner that is ready to advance.

    `base` is the path of the base model. `rehearse` builds the kernels of a step, without any
    effect on the run: call it once while the first batch is waited for. None where that saves
    nothing. `in_process` is for an actor in the learner's process, if the settings ask for one.
    """

    trainer: Trainer[Any]
    policy: LoadedPolicy
    folder: Path
    base: str
    rehearse: Callable[[], None] | None = None
    in_process: InProcess | None = None

    def complete(self) -> None:
        """Write the result in mlx-lm's format: `adapters/`, or `model/` after full fine-tuning."""
        policy = self.policy
        if policy.adapter_config.fine_tune_type != "full":
            save_adapters(self.folder / "adapters", policy.model, policy.adapter_config, self.base)
            return

        # A model that was quantised when it was loaded does not say so in its config.json.
        config = dict(policy.config)
        quantised = [module for module in policy.model.modules() if "scales" in module]
        if quantised and "quantization" not in config:
            layer: Any = quantised[0]
            config["quantization"] = {"group_size": layer.group_size, "bits": layer.bits}

        from mlx_lm.utils import save

        save(self.folder / "model", policy.folder, policy.model, policy.tokenizer, config)


def resume_point(
    resume: str, policy: LoadedPolicy, reference: Reference | None
) -> Checkpoint | None:
    """Load the checkpoint that `run.resume` names, and put its weights into the policy.

    Raises CheckpointError if it was made with another model, tokenizer or reference.
    """
    if not resume:
        return None

    folder = Path(resume)
    found = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    remove_unfinished(found)  # this learner holds the run's lock
    checkpoint = load_checkpoint(found)

    for name, ours in run_digests(policy, reference).items():
        theirs = checkpoint.state.get(name, "none")
        if theirs != ours:
            raise CheckpointError(
                f"The checkpoint {checkpoint.path} was made with {name} {theirs}, this run has "
                f"{ours}. Resume with the model, dtype, adapter and reference that the run "
                "began with."
            )

    load_trainable(policy.model, checkpoint.weights, f"checkpoint of step {checkpoint.step}")
    log.info("resuming from step %d: %s", checkpoint.step, checkpoint.path)
    return checkpoint


def run_digests(policy: LoadedPolicy, reference: Reference | None) -> dict[str, str]:
    """Return the digests that a checkpoint and the run that resumes it must share."""
    digests = {"model_digest": policy.model_digest, "tokenizer_digest": policy.tokenizer_digest}
    if reference is not None:
        digests["reference_digest"] = reference.digest
    return digests


def new_step(
    settings: TrainingRun, policy: LoadedPolicy, reference: Reference | None, updates: int
) -> Step:
    """Return the optimiser step that the settings ask for."""
    return Step(
        policy.model,
        settings.optimizer,
        total_steps=updates,
        compiled=should_compile(settings.train.compile),
        gradient_checkpointing=settings.train.gradient_checkpointing,
        reads=[reference.model] if reference is not None else [],
    )


def report_memory(
    settings: TrainingRun,
    policy: LoadedPolicy,
    reference: Reference | None,
    head: Head,
    *,
    sequences: int,
    length: int,
    completion_length: int,
    shared_prompt: bool = False,
) -> int:
    """Log the memory that a step will need, and return it in bytes; see `estimate_memory`."""
    estimate = estimate_memory(
        policy.model,
        policy.config,
        sequences=sequences,
        length=length,
        completion_length=completion_length,
        head=head,
        gradient_checkpointing=settings.train.gradient_checkpointing,
        reference=reference.model if reference is not None else None,
        shared_prompt=shared_prompt,
        length_bucket=settings.train.length_bucket,
    )
    warn_if_too_large(estimate)
    return estimate.total


def schedule_of(settings: TrainingRun, total: int) -> Schedule:
    """Return when a run of `total` batches evaluates and saves."""
    return Schedule(
        max_steps=total,
        save_steps=settings.run.save_steps,
        save_total_limit=settings.run.save_total_limit,
        eval_steps=settings.eval.steps,
        eval_at_start=settings.eval.at_start,
    )


def started_at(folder: Path) -> float:
    """Return the Unix time at which the run was first assembled in this folder."""
    record = read_run(folder)
    if record.started_at is not None:
        return record.started_at
    now = round(time.time(), 3)
    write_run(folder, structs.replace(record, started_at=now))
    return now
