"""Kill everything of a run, again and again, at random; then account for every task. A program.

    python -m tests.acceptance.soak [--max-staleness 0 1 4] [--learner 20] [--helpers 76]
        [--launcher 4] [--steps 400] [--seed 0]

Per bound: one run of launch/grpo.py with its default model, two actors and two reward servers, in
which SIGKILL hits the learner, helpers (actors and reward servers) and the launcher as often as
asked, in random order at random times; a killed launcher's run is resumed. Then:

- every leased task was trained exactly once or dropped with its reason, in the order of the queue;
- no accepted group was sampled twice: an attempt that gave no group is one whose actor was killed;
- each step is in metrics.jsonl once, and staleness is within the bound;
- no process of the run is left;
- at bound 0, the adapters are bit for bit those of the same run without any kill; at others,
  launch/replay.py comes to the same weights at every step.

Prints the figures: kills, time from a learner's kill to its next new step, and how much of that is
loading. Exit status 1 if a check fails.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import mlx.core as mx

from launch.processes.exit_status import FINISHED
from launch.run_folder.tail import EventTail
from launch.staleness import measure
from protocol.model.snapshots import tensors_digest
from protocol.run_record import StartUp
from tests.acceptance.journal import Accounts, account, check_complete
from tests.acceptance.run import ROOT, CheckFailed, Launcher, check, lines

BATCH = 8
LOADING = ("imports", "model", "data", "preparation")
RESUME_S = 120.0


@dataclass
class Recovery:
    """How long it took from a learner's kill to its next new step, s, and to load again."""

    total_s: float
    loading_s: float


@dataclass
class Soak:
    """One run under fire; `left` says which kills are still to come."""

    args: argparse.Namespace
    bound: int
    left: Counter[str]
    chance: random.Random
    done: Counter[str] = field(default_factory=Counter[str])
    recoveries: list[Recovery] = field(default_factory=list[Recovery])

    def run(self) -> None:
        """Run to the end, with all kills, and check what it wrote."""
        name = f"soak-eta{self.bound}-{time.strftime('%H%M%S')}-{os.getpid()}"
        run = Launcher(self.args.dir / name, self._flags(name))
        try:
            run.until(lambda: len(run.steps()) >= 1, "step 1")
            while sum(self.left.values()):
                run = self._strike(run)
            status = run.wait(self.args.limit)
        finally:
            run.end()

        print(f"eta {self.bound}: {run.folder}: kills {dict(self.done)}")
        check(status == FINISHED, f"the run ended with {status}; see {run.output}")
        check(not processes_of(run.folder), f"left over: {processes_of(run.folder)}")
        self._check_records(run)
        self._print_recoveries()
        if self.bound == 0:
            self._check_bits(run)
        else:
            check_replay(run.folder)

    def _flags(self, name: str) -> list[str]:
        flags = {
            "run.dir": self.args.dir,
            "run.name": name,
            "run.log_completions": 0,
            "run.save_steps": 10,
            "run.max_restarts": 10_000,
            "run.deterministic": str(self.bound == 0).lower(),
            "data.eval_path": "",
            "eval.steps": 0,
            "train.batch_size": BATCH,
            "train.micro_batch_size": BATCH,
            "train.max_steps": self.args.steps,
            "queue.max_staleness": self.bound,
            "actors.count": 2,
            "actors.max_restarts": 10_000,
            "actors.max_concurrent_completions": 4 * BATCH,
            "actors.colocate": "false",
            "rewards.workers": 2,
        }
        return [f"--{key}={value}" for key, value in flags.items()]

    def _strike(self, run: Launcher) -> Launcher:
        """Kill something; return the launcher of the run, which is another if it was killed."""
        time.sleep(self.chance.uniform(0.0, self.args.pause))
        kinds = [kind for kind, count in self.left.items() if count]
        kind = self.chance.choices(kinds, [self.left[kind] for kind in kinds])[0]
        check(run.process.poll() is None, f"the run ended before all kills; see {run.output}")

        if kind == "launcher":
            run = self._kill_launcher(run)
        elif kind == "learner":
            self._kill_learner(run)
        else:
            name = self.chance.choice(["--name actor-0", "--name actor-1", "reward_server.py"])
            found = run.child(name)
            if found is None:  # it waits for its restart
                return run
            os.kill(found[0], signal.SIGKILL)
        self.left[kind] -= 1
        self.done[kind] += 1
        return run

    def _kill_learner(self, run: Launcher) -> None:
        found = run.until(lambda: run.child("learn.py"), "learner")
        # Now and then while it still loads; mostly, the recovery is waited for and timed.
        if self.chance.random() < 0.2:
            os.kill(found[0], signal.SIGKILL)
            return

        before, events = len(run.steps()), EventTail(run.folder)
        run.until(lambda: len(run.steps()) > before, "new step")
        time.sleep(self.chance.uniform(0.0, 1.0))
        found = run.until(lambda: run.child("learn.py"), "learner")
        reached = len(run.steps())
        if reached >= self.args.steps:
            raise CheckFailed("the run is too short for these kills; raise --steps")
        os.kill(found[0], signal.SIGKILL)
        killed = time.monotonic()
        run.until(lambda: len(run.steps()) > reached, "step after a kill of the learner")
        total = time.monotonic() - killed
        starts = [e for e in events.read() if isinstance(e, StartUp) and e.process == "learner"]
        if starts:
            loading = sum(starts[-1].parts.get(part, 0.0) for part in LOADING)
            self.recoveries.append(Recovery(total, loading))

    def _kill_launcher(self, run: Launcher) -> Launcher:
        run.process.kill()
        run.process.wait()
        deadline = time.monotonic() + RESUME_S
        while processes_of(run.folder):
            check(time.monotonic() < deadline, f"orphans: {processes_of(run.folder)}")
            time.sleep(0.1)
        resumed = Launcher(run.folder, ["--run.resume", str(run.folder)])
        before = len(resumed.steps())
        try:
            resumed.until(lambda: len(resumed.steps()) > before, "step after a resume")
        except CheckFailed:
            resumed.end()
            raise
        return resumed

    def _check_records(self, run: Launcher) -> None:
        events = [line["event"] for line in run.events()]
        books = account(events)
        check_complete(books)
        check_sampled_once(books, self.done)

        steps = [int(line["step"]) for line in run.steps()]
        check(steps == list(range(1, self.args.steps + 1)), "a step is missing, or there twice")
        rollouts = lines(run.folder / "rollouts.jsonl")
        written = [line["task"] for line in rollouts if line["kind"] == "train"]
        check(written == [n for n, _ in books.trained], "rollouts.jsonl and the journal disagree")
        seen = measure(rollouts, run.steps())
        check(seen.max <= self.bound, f"staleness {seen.max} is above the bound {self.bound}")
        print(
            f"  {len(steps)} steps once each; tasks trained {len(books.trained)}, dropped "
            f"{dict(Counter(books.dropped.values()))}; attempts {sum(books.leased.values())}, "
            f"without a group {dict(books.closed)}; discarded {dict(books.discarded)}; "
            f"staleness at most {seen.max}"
        )

    def _print_recoveries(self) -> None:
        if self.recoveries:
            total = median(each.total_s for each in self.recoveries)
            share = median(each.loading_s / each.total_s for each in self.recoveries)
            print(
                f"  from a kill of the learner to its next new step: median {total:.1f} s of "
                f"{len(self.recoveries)}, of which loading {share:.0%}"
            )

    def _check_bits(self, run: Launcher) -> None:
        name = f"{run.folder.name}-calm"
        calm = Launcher(self.args.dir / name, self._flags(name))
        try:
            status = calm.wait(self.args.limit)
        finally:
            calm.end()
        check(status == FINISHED, f"the run without kills ended with {status}")
        ours, theirs = adapters(run.folder), adapters(calm.folder)
        check(ours == theirs, f"adapters {ours[:16]} with kills, {theirs[:16]} without")
        print(f"  adapters as without kills, bit for bit: SHA-256 {ours[:16]}")


def check_sampled_once(books: Accounts, kills: Counter[str]) -> None:
    """Every attempt but those of killed actors gave the group that was trained on."""
    attempts, groups = sum(books.leased.values()), len(books.received)
    twice = [number for number, count in Counter(books.received).items() if count > 1]
    check(not twice, f"tasks {twice} have two accepted groups")
    check(
        attempts - groups == sum(books.closed.values()),
        f"{attempts} attempts, {groups} groups and {dict(books.closed)} do not add up",
    )
    # An actor works on four groups at a time, and a killed launcher takes both actors with it.
    in_flight = 4 * kills["helper"] + 8 * kills["launcher"]
    check(
        sum(books.closed.values()) <= in_flight,
        f"{dict(books.closed)} attempts gave no group; {in_flight} were in flight at kills",
    )
    other = set(books.closed) - {"gone"}
    check(not other, f"attempts ended for reasons that no kill explains: {dict(books.closed)}")


def check_replay(folder: Path) -> None:
    """Replay the run; every published version must have the same weights."""
    done = subprocess.run(
        [sys.executable, "launch/replay.py", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    said = done.stdout.splitlines()
    check(done.returncode == 0, f"the replay ended with {done.returncode}: {said[-2:]}")
    found = re.search(r"all \d+ published versions .*", done.stdout)
    print(f"  replay: {found.group() if found else said[-1]}")


def adapters(folder: Path) -> str:
    """Return the digest of a run's adapters."""
    arrays = mx.load(str(folder / "adapters" / "adapters.safetensors"))
    assert isinstance(arrays, dict)
    return tensors_digest(arrays)


def processes_of(folder: Path) -> list[str]:
    """Return the commands of live processes that name a run folder, but for launchers."""
    listing = subprocess.run(
        ["ps", "-axww", "-o", "stat=,command="], capture_output=True, text=True, check=True
    ).stdout
    return [
        line
        for line in listing.splitlines()
        if f"{folder} " in f"{line} " and "grpo.py" not in line and not line.startswith("Z")
    ]


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-staleness", type=int, nargs="+", default=[0, 1, 4], metavar="N")
    parser.add_argument("--learner", type=int, default=20, help="its kills, per bound")
    parser.add_argument("--helpers", type=int, default=76, help="kills, per bound")
    parser.add_argument("--launcher", type=int, default=4, help="its kills, per bound")
    parser.add_argument("--steps", type=int, default=400, help="batches of 8 groups of 8")
    parser.add_argument("--pause", type=float, default=1.0, help="s between kills, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that a run may take")
    args = parser.parse_args(argv)
    args.dir = args.dir.absolute()
    try:
        for bound in args.max_staleness:
            left = Counter(learner=args.learner, helper=args.helpers, launcher=args.launcher)
            Soak(args, bound, left, random.Random(args.seed + bound)).run()
    except CheckFailed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print("all checks hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
