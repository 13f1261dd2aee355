"""Kill parts of real runs and check that nothing is lost, trained twice or too stale. A program.

    python -m tests.acceptance.faults --max-staleness 0 1 4 [--kills 5] [--freeze]
    python -m tests.acceptance.faults --fuzz [--frames 1000000]

Each run is launch/grpo.py with its default recipe, two actors and small batches; its folder stays
under `--dir`. A flooded run is stopped by SIGINT when all frames are counted. Prints the figures;
exit status 1 if a check fails.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from launch.processes.exit_status import STOPPED
from launch.staleness import measure
from tests.acceptance.journal import account, check_complete, incarnations
from tests.acceptance.run import ROOT, CheckFailed, Launcher, check, lines, resident_mb
from tests.acceptance.strikes import (
    after_a_step,
    freeze_actor,
    freeze_learner,
    kill_actor,
    kill_reward_server,
)

BATCH = 8
Json = dict[str, Any]


def launch(args: argparse.Namespace, bound: int) -> Launcher:
    """Start a run of `args.steps` batches with this staleness bound."""
    folder = args.dir / f"faults-eta{bound}-{time.strftime('%H%M%S')}-{os.getpid()}"
    flags = {
        "run.dir": folder.parent,
        "run.name": folder.name,
        "run.log_completions": 0,
        "run.save_steps": 0,
        "run.max_restarts": 0,  # a killed learner ends the run, so that it is resumed by hand
        "data.eval_path": "",
        "eval.steps": 0,
        "train.batch_size": BATCH,
        "train.micro_batch_size": BATCH,
        "train.max_steps": args.steps,
        "queue.max_staleness": bound,
        "queue.lease_s": 5 if args.freeze else 120,
        "actors.count": 2,
        "actors.max_concurrent_completions": 4 * BATCH,
    }
    return Launcher(folder, [f"--{key}={value}" for key, value in flags.items()])


def kills(args: argparse.Namespace, bound: int) -> float:
    """Run with kills and check the records; return the mean waiting share of the learner."""
    run, started = launch(args, bound), time.monotonic()
    try:
        pid = 0
        for number in range(args.kills):
            after_a_step(run)
            pid = kill_actor(run, pid)
            if number == args.kills // 2:
                after_a_step(run)
                kill_reward_server(run)
        if args.freeze:
            after_a_step(run)
            freeze_actor(run, "actor-1")
            after_a_step(run)
            freeze_learner(run)
            after_a_step(run)
        status = run.wait(args.limit)
    finally:
        run.end()
    check(status == 0, f"the run ended with {status}; see {run.output}")
    print(f"eta {bound}: {run.folder}, {time.monotonic() - started:.0f} s")
    print(f"  actor-0 killed {args.kills} times, reward server once; exit status 0")
    if args.freeze:
        late = [e for e in run.events() if e["event"].get("reason") == "duplicate"]
        check(late, "no group came twice although the learner was frozen")
    return check_records(run, bound, args.steps)


def check_records(run: Launcher, bound: int, steps: int, *, left: int = 0) -> float:
    """Check journal, staleness and overlap of a run; return the mean waiting share.

    `left`: how many tasks a run that was stopped may leave to its checkpoint.
    """
    (events,) = incarnations(run.events()).values()
    books = account(events)
    check_complete(books, left=left)
    rollouts, metrics = lines(run.folder / "rollouts.jsonl"), run.steps()
    written = [line["task"] for line in rollouts if line["kind"] == "train"]
    check(written == [n for n, _ in books.trained], "rollouts.jsonl and the journal disagree")
    check(len(metrics) == steps, f"{len(metrics)} steps on record, required {steps}")
    print(
        f"  tasks leased {len(books.leased)}, trained {len(books.trained)}, dropped "
        f"{dict(Counter(books.dropped.values()))}; attempts {sum(books.leased.values())}, leases "
        f"ended without a group {dict(books.closed)}; discarded {dict(books.discarded)}"
    )
    seen = measure(rollouts, metrics)
    shares = [line["learner/waiting_share"] for line in metrics]
    share = sum(shares) / len(shares)
    print(
        f"  staleness max {seen.max}, mean {seen.mean:.3f}; sampling {seen.sampling_s:.1f} s, "
        f"training {seen.training_s:.1f} s, both at once {seen.overlap_s:.2f} s; waiting share "
        f"mean {share:.3f}, median {sorted(shares)[len(shares) // 2]:.3f}"
    )
    check(seen.max <= bound, f"staleness {seen.max} is above the bound {bound}")
    if bound >= 1:
        check(seen.max >= 1, "staleness never reached 1")
        check(seen.overlap_s > 0, "sampling and training never overlapped")
    return share


def fuzz(args: argparse.Namespace, bound: int) -> None:
    """Flood both sockets during a run; it must end well, count all frames, and not grow."""
    run = launch(args, bound)
    floods: list[subprocess.Popen[bytes]] = []
    try:
        run.until(lambda: len(run.steps()) >= 2, "step 2")
        pids = {name: run.child(name) for name in ("learn.py", "reward_server.py")}
        learner, server = pids["learn.py"], pids["reward_server.py"]
        if learner is None or server is None:
            raise CheckFailed("learner or reward server is gone")
        names = [r"--endpoint (ipc://\S+)", r"--bind (ipc://\S+)"]
        texts = [learner[1], server[1]]
        ends = [_found(n, text) for n, text in zip(names, texts, strict=True)]
        first = {pid: resident_mb(pid) for pid, _ in (learner, server)}
        peak = dict(first)
        floods = [flood(args, end) for end in ends]

        def counted() -> bool:
            for pid in peak:
                peak[pid] = max(peak[pid], resident_mb(pid))
            return sum(refused(run).values()) >= args.frames

        started = time.monotonic()
        run.until(counted, f"{args.frames} refusals", stall_s=args.limit)
        print(f"eta {bound}: {run.folder}: refused in {time.monotonic() - started:.0f} s")
        for process in floods:
            check(process.communicate(timeout=args.limit)[0] is not None, "a flood said nothing")
            check(process.returncode == 0, f"a flood ended with {process.returncode}")
        counted()  # the peaks again, as the other socket's flood may have gone on
        run.process.send_signal(signal.SIGINT)  # a clean stop, with a checkpoint
        status = run.wait(args.limit)
    finally:
        for process in floods:
            if process.poll() is None:
                process.kill()
            process.wait()
        run.end()
    check(status == STOPPED, f"the run ended with {status}; see {run.output}")
    check_records(run, bound, len(run.steps()), left=(bound + 1) * BATCH)
    print(f"  learner refused {refused(run)}")
    log = (run.folder / "logs" / "reward-0.log").read_text()
    said = re.findall(r"refused: (\{.*\})", log)
    check(said, "the reward server counted no refusals")
    print(f"  reward server refused {said[-1]}")
    for name, (pid, _) in (("learner", learner), ("reward server", server)):
        print(f"  {name}: {first[pid]:.0f} MiB before the flood, peak {peak[pid]:.0f} MiB")
        check(peak[pid] - first[pid] < args.growth, f"{name} grew beyond {args.growth} MiB")


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    check(match, f"no {pattern} in {text}")
    return match.group(1) if match else ""


def flood(args: argparse.Namespace, endpoint: str) -> subprocess.Popen[bytes]:
    """Start a sender of bad frames that stays until its standard input closes."""
    command = [sys.executable, "-m", "tests.protocol.messages.fuzz_frames", endpoint, "--hold"]
    command += ["--frames", str(args.frames), "--mutated", str(args.mutated)]
    command += ["--rewards"] if "reward" in endpoint else []
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def refused(run: Launcher) -> dict[str, int]:
    """Return the learner's refusals by kind, as of its last step."""
    steps = run.steps()
    last = steps[-1] if steps else {}
    return {k[13:]: int(v) for k, v in last.items() if k.startswith("wire/refused_")}


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-staleness", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--kills", type=int, default=5, help="SIGKILLs of actor-0")
    parser.add_argument(
        "--freeze", action="store_true", help="also stop actor-1 and the learner for seconds"
    )
    parser.add_argument("--fuzz", action="store_true")
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--mutated", type=int, default=1_000)
    parser.add_argument("--growth", type=float, default=256, help="MiB allowed under the flood")
    parser.add_argument("--steps", type=int, help="batches of 8 groups of 8")
    parser.add_argument("--dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a run may take")
    args = parser.parse_args(argv)
    args.dir = args.dir.absolute()
    args.steps = args.steps or (100_000 if args.fuzz else 160)
    shares: dict[int, float] = {}
    try:
        for bound in args.max_staleness:
            if args.fuzz:
                fuzz(args, bound)
            else:
                shares[bound] = kills(args, bound)
        for bound, share in shares.items():
            if bound > 0 and 0 in shares:
                check(share < shares[0], f"waiting share {share:.3f}, {shares[0]:.3f} at eta 0")
    except CheckFailed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print("all checks hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
