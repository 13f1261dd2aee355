"""The learner process: `launch/processes/learn.py RUN_DIR --kind grpo|preference|sft [...]`.

Started by the launcher, which wrote RUN_DIR/config.toml. MLX stays on this main thread; sockets
are served by an I/O thread. Exit status 0: the run is done or was stopped on request; 1: it failed.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.processes.blas import bound_lookahead
from launch.processes.lifeline import Lifeline
from launch.processes.run_lock import sole_learner
from launch.processes.start import begin
from launch.run_folder.resume import settle
from protocol.errors import PippinError, RewardError

if TYPE_CHECKING:
    from learner.build.common import Run
    from learner.trainer import Trainer

log = logging.getLogger("pippin.learner")
POLL_S = 0.2
TOTAL = "total_steps"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--kind", choices=["grpo", "preference", "sft"], required=True)
    parser.add_argument("--endpoint", action="append", default=[], help="where actors connect")
    parser.add_argument("--snapshots", default="", help="where snapshots are served")
    parser.add_argument("--rewards", action="append", default=[], help="a service's endpoints, ','")
    parser.add_argument("--child", action="store_true", help="end when standard input closes")
    return parser.parse_args()


def main() -> int:
    """Build the run, advance it to its end, and report how it ended by the exit status."""
    args = arguments()
    bound_lookahead()
    lifeline = begin(child=args.child, mlx=True)
    try:
        with sole_learner(args.run_dir), _assembled(args, lifeline) as run:
            settle(args.run_dir, begun=True)
            _announce(run.trainer, args.run_dir)
            try:
                _advance(run.trainer, lifeline)
            except RewardError:
                run.trainer.save(required=False)  # so that it can go on once they are mended
                raise
            run.complete()
    except (PippinError, OSError) as error:  # OSError: a full disk, a folder that went away
        log.error("%s: %s", type(error).__name__, error)
        return 1
    return 0


@contextmanager
def _assembled(args: argparse.Namespace, lifeline: Lifeline) -> "Iterator[Run]":
    """Build the run of the kind that `args.kind` names; MLX is loaded only here."""
    if args.kind == "grpo":
        from learner.build.online import OnlineAddresses, assemble_online

        addresses = OnlineAddresses(args.endpoint, args.snapshots, args.rewards)
        with assemble_online(args.run_dir, addresses) as run:
            yield run
    else:
        from learner.build.offline import assemble_offline

        yield assemble_offline(args.run_dir, args.kind, lambda: lifeline.stop_requested)


def _announce(trainer: "Trainer[Any]", folder: Path) -> None:
    """Write the number of steps to `total_steps`, for the display; say if all of them are done."""
    total = trainer.schedule.max_steps
    if total is None:
        return
    (folder / TOTAL).write_text(f"{total}\n")
    if trainer.step >= total:
        log.warning(
            "the run is finished: step %d of %d; to train on, resume it with a larger "
            "--train.max_steps or --train.num_train_epochs",
            trainer.step,
            total,
        )


def _advance(trainer: "Trainer[Any]", lifeline: Lifeline) -> None:
    while not trainer.done:
        if lifeline.stop_requested and not trainer.stopping:
            log.info("stopping after this step, as asked")
            trainer.stopping = True
        trainer.advance(timeout_s=POLL_S)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status) if status else sys.exit(0)
