"""What every learner is put together from: its run, checkpoint, step and schedule."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from learner.checkpoint import Checkpoint, load_checkpoint
from learner.model.logprobs import Head
from learner.model.memory import estimate_memory, warn_if_too_large
from learner.model.reference import Reference
from learner.optim.step import Step, should_compile
from learner.trainer import Schedule, Trainer
from protocol.config.settings import AnyRun, Section
from protocol.errors import CheckpointError
from protocol.model.policy import LoadedPolicy, save_adapters
from protocol.model.snapshots import load_trainable
from protocol.run_record import read_run, write_run

log = logging.getLogger("pippin.learner")


@dataclass
class Run:
    """A learner that is ready to advance; `complete` writes what the run leaves behind."""

    trainer: Trainer[Any]
    policy: LoadedPolicy
    folder: Path
    base: str

    def complete(self) -> None:
        """Write the final adapters (or the full model) in mlx-lm's format."""
        write_result(self.folder, self.policy, self.base)


def write_result(folder: Path, policy: LoadedPolicy, base: str) -> Path:
    """Write `adapters/`, or `model/` after full fine-tuning; return the folder."""
    if policy.adapter_config.fine_tune_type == "full":
        from mlx_lm.utils import save

        target = folder / "model"
        config = dict(policy.config)
        quantised = [module for module in policy.model.modules() if "scales" in module]
        if quantised and "quantization" not in config:  # quantised at load, so not in config.json
            layer: Any = quantised[0]
            config["quantization"] = {"group_size": layer.group_size, "bits": layer.bits}
        save(target, policy.folder, policy.model, policy.tokenizer, config)
        return target
    target = folder / "adapters"
    save_adapters(target, policy.model, policy.adapter_config, base)
    return target


def resume_point(
    resume: str, policy: LoadedPolicy, reference: Reference | None
) -> Checkpoint | None:
    """Load the checkpoint to go on from and put its weights into the policy."""
    if not resume:
        return None
    folder = Path(resume)
    found = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    checkpoint = load_checkpoint(found)
    for name, ours in run_digests(policy, reference).items():
        theirs = checkpoint.state.get(name, "none")
        if theirs != ours:
            raise CheckpointError(
                f"The checkpoint in {found} was made with {name} {theirs}, this run has {ours}. "
                "Resume with the model, its dtype, adapter and reference that the run began with."
            )
    load_trainable(policy.model, checkpoint.weights, f"checkpoint of step {checkpoint.step}")
    log.info("resuming from step %d of %s", checkpoint.step, found)
    return checkpoint


def run_digests(policy: LoadedPolicy, reference: Reference | None) -> dict[str, str]:
    """Return what a checkpoint must agree with."""
    digests = {"model_digest": policy.model_digest, "tokenizer_digest": policy.tokenizer_digest}
    if reference is not None:
        digests["reference_digest"] = reference.digest
    return digests


def new_step(
    settings: Section, policy: LoadedPolicy, reference: Reference | None, updates: int
) -> Step:
    """Return the optimiser step that the settings ask for."""
    train: Any = settings.train  # pyright: ignore[reportAttributeAccessIssue]
    optimizer: Any = settings.optimizer  # pyright: ignore[reportAttributeAccessIssue]
    return Step(
        policy.model,
        optimizer,
        total_steps=updates,
        compiled=should_compile(train.compile),
        gradient_checkpointing=train.gradient_checkpointing,
        reads=[reference.model] if reference is not None else [],
    )


def report_memory(
    settings: AnyRun,
    policy: LoadedPolicy,
    reference: Reference | None,
    head: Head,
    *,
    rows: int,
    length: int,
    completion_length: int,
    shared_prompt: bool = False,
) -> None:
    """Log what a step will take of the machine's memory; arguments as of `estimate_memory`."""
    warn_if_too_large(
        estimate_memory(
            policy.model,
            policy.config,
            rows=rows,
            length=length,
            completion_length=completion_length,
            head=head,
            gradient_checkpointing=settings.train.gradient_checkpointing,
            reference=reference.model if reference is not None else None,
            shared_prompt=shared_prompt,
            length_bucket=settings.train.length_bucket,
        )
    )


def schedule_of(settings: AnyRun, total: int) -> Schedule:
    """Return when a run of `total` batches evaluates and saves."""
    return Schedule(
        max_steps=total,
        save_steps=settings.run.save_steps,
        save_total_limit=settings.run.save_total_limit,
        eval_steps=settings.eval.steps,
        eval_at_start=settings.eval.at_start,
    )


def started_at(folder: Path) -> float:
    """Return when the run began, in Unix s: the first time that it was assembled in this folder."""
    record = read_run(folder)
    if record.started_at is not None:
        return record.started_at
    now = round(time.time(), 3)
    write_run(folder, structs.replace(record, started_at=now))
    return now
