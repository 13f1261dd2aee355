"""The learner process: `launch/processes/learn.py RUN_DIR [--endpoint …] [--snapshots …] [...]`.

Started by the launcher, which wrote RUN_DIR/config.toml and run.json. MLX stays on this main
thread; sockets are served by an I/O thread. With `actors.colocate` this process samples, too.
Exit status: that of `exit_status.py`.
"""

import argparse
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.processes.learner_program import run_learner
from launch.processes.run_lock import hold_run_folder
from launch.processes.stages import Stages
from launch.processes.start import Lifeline
from launch.run_folder.create import CONFIG
from launch.run_folder.resume import accept_settings
from protocol.config.load import load
from protocol.config.settings import GrpoRun
from protocol.errors import RewardError
from protocol.run_record import State, WorkDone, change_state, read_run, record_event

if TYPE_CHECKING:
    from learner.build.common import Run
    from learner.trainer import Trainer

log = logging.getLogger("pippin.learner")
POLL_S = 0.2

Turn = Callable[[], object]  # advances the run a little


def learn(args: argparse.Namespace, lifeline: Lifeline) -> State:
    """Build the run and advance it to its end; return how it ended."""
    stages = Stages("learner")
    with (
        hold_run_folder(args.run_dir),
        _assembled(args, lifeline, stages) as run,
        _turns(run) as turn,
    ):
        accept_settings(args.run_dir)
        _announce(run.trainer, args.run_dir)
        try:
            _to_first_step(run, args.run_dir, lifeline, turn, stages)
            _advance(run.trainer, args.run_dir, lifeline, turn)
        except RewardError as error:
            # The run can be resumed from here once the reward functions are fixed, and what they
            # did not score is sampled again. While catching up, no batch is in training.
            if run.return_batch is not None and not run.trainer.catching_up:
                run.return_batch(str(error))
            run.trainer.save(required=False)
            raise
        run.complete()
        record_event(args.run_dir, WorkDone())

    total = run.trainer.schedule.max_steps
    early = run.trainer.stopping and (total is None or run.trainer.step < total)
    return "stopped" if early else "finished"


@contextmanager
def _assembled(args: argparse.Namespace, lifeline: Lifeline, stages: Stages) -> "Generator[Run]":
    """Build the run, as its program requires; MLX is loaded only here."""
    program = read_run(args.run_dir).program
    if program == "grpo":
        from learner.build.online import OnlineAddresses, assemble_online

        stages.done("imports")
        addresses = OnlineAddresses(args.endpoint, args.snapshots, args.rewards, args.colocate)
        with assemble_online(args.run_dir, addresses, stages.done) as run:
            yield run
    else:
        from learner.build.offline import assemble_offline

        stages.done("imports")
        yield assemble_offline(args.run_dir, program, lambda: lifeline.stop_requested, stages.done)


def _announce(trainer: "Trainer[Any]", folder: Path) -> None:
    """Record the number of steps; say if all of them are done already."""
    total = trainer.schedule.max_steps
    change_state(folder, "running", total_steps=total)

    if total is not None and trainer.step >= total:
        log.warning(
            "the run is finished: step %d of %d; to continue training, resume it with a larger "
            "--train.max_steps or --train.num_train_epochs",
            trainer.step,
            total,
        )


def _to_first_step(
    run: "Run", folder: Path, lifeline: Lifeline, turn: Turn, stages: Stages
) -> None:
    """Advance until the first step is taken, and record how long it took to come there."""
    trainer, before = run.trainer, run.trainer.step
    _take_turn(trainer, folder, lifeline, turn)  # asks for the first groups
    if run.rehearse is not None and not trainer.stopping and trainer.step == before:
        run.rehearse()
        stages.done("kernels")

    while not trainer.done and trainer.step == before:
        _take_turn(trainer, folder, lifeline, turn)
    if trainer.step > before:
        stages.done("first batch", ago_s=trainer.last_metrics["step_time"])
        stages.done("first step")
        record_event(folder, stages.event())


@contextmanager
def _turns(run: "Run") -> Generator[Turn]:
    """Yield a function that advances the run by one turn, and waits a moment if none is due.

    With `actors.colocate`, trainer and worker take turns on this thread.
    """
    trainer, shared = run.trainer, run.in_process
    if shared is None:
        yield partial(trainer.advance, timeout_s=POLL_S)
        return

    from launch.processes.colocated import colocated_worker

    with colocated_worker(run, shared, load(GrpoRun, run.folder / CONFIG)) as worker:

        def turn() -> None:
            trained = trainer.advance()
            sampled = worker.advance()
            if not (trained or sampled):
                shared.bridges.wait(POLL_S)

        yield turn


def _advance(trainer: "Trainer[Any]", folder: Path, lifeline: Lifeline, turn: Turn) -> None:
    while not trainer.done:
        _take_turn(trainer, folder, lifeline, turn)


def _take_turn(trainer: "Trainer[Any]", folder: Path, lifeline: Lifeline, turn: Turn) -> None:
    if lifeline.stop_requested and not trainer.stopping:
        change_state(folder, "stopping")
        trainer.stopping = True
    turn()


if __name__ == "__main__":
    run_learner("learner", __doc__, learn)
