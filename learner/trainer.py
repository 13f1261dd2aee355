"""The loop: a source yields batches, an objective turns them into arrays, the updater steps.

The trainer knows neither where batches come from nor what is optimised. It owns no process: a
program calls `advance` until `done`, and waits on the source in between.
"""

# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from statistics import fmean
from typing import Any, Generic, TypeVar

import mlx.nn as nn

from learner.checkpoint import Checkpoint, save_checkpoint
from learner.interfaces import Evaluator, Objective, Prepared, Source
from learner.losses.metrics import finish_metrics, merge_metrics, number
from learner.optim.step import Step
from learner.records import Records
from protocol.errors import CheckpointError
from protocol.model.device_memory import memory_use
from protocol.model.random_state import random_state, seeded, set_random_state
from protocol.model.snapshots import trainable
from protocol.run_record import (
    CheckpointFailed,
    CheckpointSaved,
    EvaluationFinished,
    EvaluationStarted,
)

BatchT = TypeVar("BatchT")

log = logging.getLogger("pippin.learner")
TELL_S = 15.0  # between two words on how far catching up has come


@dataclass
class Schedule:
    """When the trainer stops, saves and evaluates, in batches.

    `max_steps` None: until the source is exhausted.
    """

    max_steps: int | None
    save_steps: int
    save_total_limit: int
    eval_steps: int
    eval_at_start: bool


@dataclass
class Trainer(Generic[BatchT]):
    """One run's loop. `step` counts batches consumed, which is the policy's version.

    After a recovery it trains again on what came after the checkpoint, up to the step that was
    reached before. What these steps recorded is on disk already, and is not written twice.
    """

    model: nn.Module
    source: Source[BatchT]
    objective: Objective[BatchT, Any]
    updater: Step
    records: Records
    schedule: Schedule
    evaluator: Evaluator | None = None
    step: int = 0
    num_tokens: float = 0.0
    resume_state: Mapping[str, Any] = field(default_factory=dict[str, Any])
    last_metrics: dict[str, float] = field(default_factory=dict[str, float])
    done: bool = False
    stopping: bool = False
    best: dict[str, float] = field(default_factory=dict[str, float])
    _evaluated: int = -1
    _reached: int = 0
    _recorded: int = 0
    _recorded_evaluation: int = -1
    _save_failed: bool = False
    _idle_since: float = field(default_factory=time.monotonic)
    _told_at: float = field(default_factory=time.monotonic)

    def advance(self, timeout_s: float = 0.0) -> bool:
        """Do the next piece of work, waiting at most `timeout_s`; return whether there was any."""
        if self.done:
            return False

        first = self.step == 0 and self.schedule.eval_at_start and self._evaluated < 0
        if first and not self.stopping:
            self._start_eval()
        best_now = self._take_eval()
        if self._complete() or (self.stopping and not self.catching_up):
            return self._finish(timeout_s)
        if best_now and self.step > 0:
            self.save(required=False)

        batch = self.source.poll(timeout_s)
        if batch is None:
            return False
        self._train(batch)
        self._idle_since = time.monotonic()
        return True

    @property
    def catching_up(self) -> bool:
        """Whether the steps under way were taken before, by an earlier process of the run.

        The ledger is ahead of the weights then, so no checkpoint can be made.
        """
        return self.step < self._reached

    def _complete(self) -> bool:
        limit = self.schedule.max_steps
        return self.source.exhausted or (limit is not None and self.step >= limit)

    def _train(self, batch: BatchT) -> None:
        """Train on a batch, publish the new policy, and record what was measured."""
        started, wall = time.monotonic(), time.time()
        prepared = self.objective.prepare(batch)
        ready = time.monotonic()
        learned = self._update(prepared)
        finished = time.monotonic()

        self.step += 1
        metrics = {**prepared.metrics, **learned, **self.source.metrics()}
        self.num_tokens += metrics.get("batch_tokens", 0.0)
        self.source.publish(self.step)
        published = time.monotonic()

        waiting = started - self._idle_since
        total = max(1e-9, published - self._idle_since)
        metrics |= {
            "num_tokens": self.num_tokens,
            "step_time": published - started,
            "time/waiting_s": waiting,
            "time/prepare_s": ready - started,
            "time/update_s": finished - ready,
            "time/publish_s": published - finished,
            "learner/waiting_share": waiting / total,
            "train_started_at": wall,
            "train_finished_at": wall + (finished - started),
        }
        metrics |= memory_use().metrics("memory/")

        self.last_metrics = metrics
        if self.catching_up and time.monotonic() - self._told_at > TELL_S:
            self._told_at = time.monotonic()
            log.info("caught up with step %d of %d", self.step, self._reached)
        if self.step > self._recorded:
            # The line of metrics comes last: a step that has one is recorded completely.
            self.records.rollouts(prepared.rollouts)
            self.records.metrics(self.step, metrics)
        self._intervals()

    def _update(self, prepared: Prepared[Any]) -> dict[str, float]:
        """Take the batch's optimiser steps; with `num_iterations`, metrics are their mean."""
        if not prepared.step:
            return self._skip()

        passes: list[dict[str, float]] = []
        try:
            for index in range(self.objective.num_iterations):
                if index and prepared.refresh is not None:
                    self.model.eval()
                    prepared.refresh()
                passes.append(self._pass(prepared))
        finally:
            self.model.eval()

        means = {name: fmean(each[name] for each in passes) for name in passes[0]}
        return {**means, "learning_rate": passes[-1]["learning_rate"]}

    def _skip(self) -> dict[str, float]:
        """Move the learning-rate schedule on as the batch's steps would have."""
        updates = [self.updater.skip() for _ in range(self.objective.num_iterations)]
        return {
            "learning_rate": updates[-1].learning_rate,
            "loss": 0.0,
            "grad_norm": 0.0,
            "optimizer_skipped": 1.0,
        }

    def _pass(self, prepared: Prepared[Any]) -> dict[str, float]:
        """Take one optimiser step on the batch."""
        # For dropout. The kernels that mlx-lm uses in eval mode have no gradient.
        self.model.train()
        parts = [self.updater.accumulate(arrays, self.objective.loss) for arrays in prepared.micro]
        update = self.updater.apply()

        # Numbers are read after the last micro-batch, because reading waits for the device.
        metrics = finish_metrics(reduce(merge_metrics, (metrics for _, metrics in parts)))
        return {
            "learning_rate": update.learning_rate,
            "loss": sum(number(loss) for loss, _ in parts),
            "grad_norm": update.grad_norm,
            "optimizer_skipped": float(not update.applied),
            **metrics,
        }

    def _intervals(self) -> None:
        every = self.schedule.eval_steps
        best_now = False
        if every > 0 and self.step % every == 0:
            self._start_eval()
            best_now = self._take_eval()
        due = self.schedule.save_steps > 0 and self.step % self.schedule.save_steps == 0
        # Not to train all of it once more if this process is killed, too.
        due = due or self.step == self._reached
        if due or (best_now and not self._complete()):
            self.save(required=False)

    def _start_eval(self) -> None:
        if self.evaluator is None or self.evaluator.pending or self.step <= self._evaluated:
            return
        if self.catching_up:  # actors no longer have that policy
            return
        self._evaluated = self.step
        self.records.event(EvaluationStarted(step=self.step))
        self.evaluator.start(self.step)

    def _take_eval(self) -> bool:
        """Record a finished evaluation; return whether it is the current policy's and the best."""
        result = self.evaluator.poll() if self.evaluator is not None else None
        if result is None:
            return False
        version, metrics, rollouts = result
        if version > self._recorded_evaluation:
            # Before the metrics, so that whoever has read those knows that the evaluation is over.
            self.records.event(EvaluationFinished(step=version))
            self.records.rollouts(rollouts)
            self.records.metrics(version, metrics)
        return self._keep_best(version, metrics) and version == self.step

    def _keep_best(self, version: int, metrics: dict[str, float]) -> bool:
        """Remember the best evaluation of a trained policy; return whether it is this one.

        The best has the highest reward or accuracy, with ties broken by the lowest loss; without
        either, the lowest loss. Step 0 is not ranked, because it has no checkpoint.
        """
        merits = ("eval/reward", 1), ("eval/rewards/accuracies", 1), ("eval/loss", -1)
        found = [sign * metrics[name] for name, sign in merits if name in metrics]
        if version == 0 or not found or not math.isfinite(found[0]):
            return False
        rank = {"value": found[0], "tie": found[-1]}
        if tuple(rank.values()) <= tuple(self.best.get(key, -math.inf) for key in rank):
            return False
        self.best = {**rank, "step": float(version)}
        return True

    def _finish(self, timeout_s: float) -> bool:
        """Evaluate and save the last policy."""
        if self.evaluator is not None and not self.stopping:
            if self.evaluator.pending:
                self.source.poll(timeout_s)
                return False
            if self._evaluated < self.step:
                self._start_eval()
                return True
        self.save(required=True)
        self.done = True
        return True

    def save(self, *, required: bool) -> None:
        """Write a checkpoint; unless it is `required`, a failure is only recorded."""
        if self.catching_up:
            return

        # What ended before the state was taken is not in the journal after it.
        source = self.source.state()
        self._take_eval()
        checkpoint = Checkpoint(
            step=self.step,
            weights=trainable(self.model),
            optimizer=self.updater.state(),
            source=source,
            state={
                **self.resume_state,
                "num_tokens": self.num_tokens,
                "evaluated": self._evaluated,
                "best": self.best,
                "random": random_state(),
            },
        )

        try:
            # The step under evaluation may turn out to be the best.
            also = {int(self.best.get("step", -1)), self._evaluated}
            folder, keep = self.records.folder / "checkpoints", self.schedule.save_total_limit
            path = save_checkpoint(folder, checkpoint, keep=keep, also=also)
            relative = str(path.relative_to(self.records.folder))
            again, self._save_failed = self._save_failed, False
            self.records.event(CheckpointSaved(step=self.step, path=relative, again=again))
        except CheckpointError as error:
            if required:
                raise
            self._save_failed = True
            self.records.event(CheckpointFailed(step=self.step, reason=str(error)))

    def rehearse(self, batch: BatchT) -> None:
        """Build the kernels of a step over a batch like this one; nothing of the run changes."""
        with seeded(0):
            prepared = self.objective.prepare(batch)
            self.model.train()
            try:
                self.updater.rehearse(prepared.micro, self.objective.loss)
            finally:
                self.model.eval()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint whose tensors are already in the model.

        `undo_records` or `catch_up` follows, as what came after it is lost or taken again.
        """
        self.step = self._reached = self._recorded = checkpoint.step
        self.num_tokens = float(checkpoint.state.get("num_tokens", 0.0))
        self._evaluated = int(checkpoint.state.get("evaluated", -1))
        self.best = dict(checkpoint.state.get("best", {}))
        self.updater.load_state(checkpoint.optimizer)
        set_random_state(int(checkpoint.state["random"]))

    def undo_records(self) -> None:
        """Move aside what was recorded after the checkpoint, because it will be recorded again."""
        self.records.undo(self.step, self._evaluated)

    def catch_up(self, reached: int, evaluated: int | None) -> None:
        """Train again on the steps up to `reached`, whose batches the source has.

        `evaluated` is the newest version whose evaluation was begun, if any was since.
        """
        step, evaluation = self.records.newest()
        self._reached = reached
        self._recorded, self._recorded_evaluation = min(step, reached), evaluation
        self.records.undo(self._recorded, evaluation)
        if evaluated is not None:
            self._evaluated = max(self._evaluated, evaluated)
        if self.evaluator is None or not self.evaluator.pending:
            self._evaluated = min(self._evaluated, evaluation)  # what was begun since is lost
