"""Replay a GRPO run: `launch/replay.py RUN [--from STEP] [--resample N]`.

The batches in RUN's journal are trained on again, without actors, and the weights of each step are
compared with those that the run published, by SHA-256. The first step and tensor that differ are
named. STEP is 0 or that of a checkpoint; without it, replay begins as early as the journal allows.
With --resample, N recorded groups are also sampled again from the policies that sampled them.
Exit status 0: all weights are the same; 1: some differ; 2: the run cannot be replayed.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.processes.blas import deterministic_kernels, prepare_mlx
from launch.processes.colocated import engine_model
from launch.processes.start import start_log
from launch.processes.workers import new_engine
from protocol.config.load import load
from protocol.config.settings import GrpoRun, builtins
from protocol.errors import ConfigError, PippinError
from protocol.run_record import read_run

if TYPE_CHECKING:
    import mlx.core as mx

    from learner.build.replay import Replay
    from learner.online.experience import PromptGroup


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a GRPO run")
    parser.add_argument(
        "--from", type=int, dest="start", metavar="STEP", help="0, or that of a checkpoint"
    )
    parser.add_argument(
        "--resample", type=int, default=0, metavar="N", help="groups to sample again"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Replay, and print what was found."""
    args = arguments(argv)
    folder = args.run.resolve()
    start_log()
    try:
        program = read_run(folder).program
        if program != "grpo":
            raise ConfigError(f"{folder}: required a run of launch/grpo.py, got one of {program}")
        settings = load(GrpoRun, folder / "config.toml")
        # MLX takes its kernels when it is loaded: those of the run.
        if settings.run.deterministic:
            os.environ.update(deterministic_kernels())
        prepare_mlx()

        from learner.build.replay import open_replay

        with open_replay(folder, args.start) as replay:
            return _replay(replay, args.resample)
    except PippinError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2


def _replay(replay: "Replay", groups: int) -> int:
    resampler = Resampler(replay, groups) if groups else None
    same = 0
    while not replay.source.exhausted:
        for found in replay.advance():
            if found.differing:
                more = len(found.differing) - 1
                print(
                    f"step {found.version}: the weights differ: tensor {found.differing[0]} first, "
                    f"and {more} more"
                )
                print(f"before it, {same} published versions have the same weights")
                return 1
            same += 1
            print(f"step {found.version}: same weights, SHA-256 {found.digest[:16]}", flush=True)
        if resampler is not None and not replay.source.exhausted:
            resampler.take()

    print(f"all {same} published versions from step {replay.start} on have the same weights")
    if resampler is not None:
        print(resampler.report())
    return 0


class Resampler:
    """Samples recorded groups again, each from the policy that sampled it.

    `count` groups are taken, evenly over the run; those of several policies are left out, because
    a swap between two tokens is not repeated.
    """

    def __init__(self, replay: "Replay", count: int) -> None:
        from learner.build.forward import longest_prompt

        run, settings = replay.run, replay.run.settings
        self._replay = replay
        self._count = count
        self._every = max(1, replay.batches() * settings.train.batch_size // count)
        self._seen = self._groups = self._left_out = 0
        self._equal = self._tokens = 0

        self._model = engine_model(run.policy)
        longest = longest_prompt(settings.data, run.prompts)
        self._engine = new_engine(
            run.policy,
            self._model,
            completions=settings.sampling.num_generations,
            prefill_step_size=settings.actors.prefill_step_size,
            max_tokens=longest + settings.sampling.max_completion_length,
            deterministic=settings.run.deterministic,
        )

    def take(self) -> None:
        """Sample what is due of the newest batch."""
        source = self._replay.source
        if source.batch is None:
            return
        for item, row in zip(source.batch.groups, source.rows, strict=True):
            self._seen += 1
            if self._seen % self._every or self._groups == self._count:
                continue
            versions = {span.version for c in item.group.completions for span in c.policy_spans}
            policy = source.policies.get(min(versions))
            if len(versions) > 1 or policy is None:
                self._left_out += 1
            else:
                self._sample(item, row, policy)

    def report(self) -> str:
        """Say how many tokens came out equal."""
        found = "there was none to take"
        if self._tokens:
            found = f"{self._equal / self._tokens:.4%} of {self._tokens} tokens are equal"
        return (
            f"groups sampled again: {self._groups}; {found}; left out, because several policies "
            f"sampled them: {self._left_out}"
        )

    def _sample(self, item: "PromptGroup", row: int, policy: "dict[str, mx.array]") -> None:
        from actors.engine.base import GenerationRequest
        from learner.online.tasks import task_seed
        from protocol.messages.arrays import ids_view
        from protocol.messages.parts import Sampling
        from protocol.model.snapshots import load_trainable

        settings = self._replay.run.settings
        self._groups += 1
        self._engine.set_policy(
            lambda: load_trainable(self._model, policy, "recorded policy"), self._groups, ""
        )
        self._engine.add(
            GenerationRequest(
                key=row,
                prompt_ids=item.prompt.prompt_ids,
                sampling=Sampling(**builtins(settings.sampling)),
                seed=task_seed(settings.run.seed, row, "train"),
            )
        )
        while not (finished := self._engine.step().finished):
            pass

        for then, now in zip(item.group.completions, finished[0].completions, strict=True):
            pairs = zip(ids_view(then.token_ids), ids_view(now.token_ids), strict=False)
            self._equal += sum(int(one == other) for one, other in pairs)
            self._tokens += ids_view(then.token_ids).size


if __name__ == "__main__":
    sys.exit(main())
