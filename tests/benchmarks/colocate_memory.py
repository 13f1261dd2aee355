"""Resident memory of a short GRPO run, with an actor and with `actors.colocate`.

    uv run tests/benchmarks/colocate_memory.py MODEL [--steps 4 --prompts 2 --generations 4
        --completion 16] [--out DIR] [--section.key value …]

MODEL is a folder or hub id; further flags go to launch/grpo.py. Every 50 ms the memory of all
processes of the run (launcher, learner, actor, reward server) is read from /proc, so it needs
Linux: RSS counts a page in each process that has it, PSS divides shared pages among them. Prints
each run's peak of the sum, its seconds, and what every process held at the peak of PSS; then the
ratios. What one Mac holds is nearer to PSS.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INTERVAL_S = 0.05
REWARD = """
def short(completions, **kwargs):
    return [1.0 / (1 + len(text)) for text in completions]
"""


@dataclass
class Peaks:
    """The highest sums over the processes of a run, in bytes, and its seconds."""

    rss: int = 0
    pss: int = 0
    seconds: float = 0.0
    at_peak: dict[str, int] = field(default_factory=dict[str, int])  # PSS by process


def family(root: int) -> list[int]:
    """Return a process and its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name in parentheses may hold anything; the parent is the second field after it.
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))

    found, open_ = [], [root]
    while open_:
        pid = open_.pop()
        found.append(pid)
        open_ += children.get(pid, [])
    return found


def held(pid: int) -> tuple[int, int]:
    """Return the RSS and PSS of a process in bytes; 0 if it has ended."""
    sizes = {"Rss": 0, "Pss": 0}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in sizes:
                sizes[name] = int(rest.split()[0]) * 1024
    return sizes["Rss"], sizes["Pss"]


def name_of(pid: int) -> str:
    """Return the program of a process: `learn.py`; "" if it has ended."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        return next((Path(word).name for word in words if word.endswith(".py")), words[0])
    return ""


def measure(command: list[str], log: Path) -> Peaks:
    """Run a command to its end; return the peaks of its processes."""
    peaks, start = Peaks(), time.monotonic()
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        while process.poll() is None:
            sizes = {pid: held(pid) for pid in family(process.pid)}
            peaks.rss = max(peaks.rss, sum(rss for rss, _ in sizes.values()))
            pss = sum(pss for _, pss in sizes.values())
            if pss > peaks.pss:
                peaks.pss = pss
                peaks.at_peak = {f"{name_of(pid)}[{pid}]": size for pid, (_, size) in sizes.items()}
            time.sleep(INTERVAL_S)

    peaks.seconds = time.monotonic() - start
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()}")
    return peaks


def main() -> None:
    """Measure the run that the options describe, with an actor and colocated."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--completion", type=int, default=16)
    parser.add_argument("--out", type=Path, help="folder for the runs; default: a temporary one")
    args, further = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.toml").touch()  # else the default recipe is run
        (folder / "rewards.py").write_text(REWARD)
        rows = [f'{{"prompt": "{n} plus {n + 3} is"}}\n' for n in range(args.steps * args.prompts)]
        (folder / "rows.jsonl").write_text("".join(rows))
        command = [
            *(sys.executable, str(ROOT / "launch/grpo.py"), str(folder / "recipe.toml")),
            f"--model.path={args.model}",
            f"--data.path={folder / 'rows.jsonl'}",
            f"--rewards.functions={folder / 'rewards.py'}:short",
            f"--run.dir={folder / 'runs'}",
            f"--train.batch_size={args.prompts}",
            f"--train.max_steps={args.steps}",
            f"--sampling.num_generations={args.generations}",
            f"--sampling.max_completion_length={args.completion}",
            *further,
        ]

        peaks: list[Peaks] = []
        for name, colocate in (("two processes", "false"), ("colocated", "true")):
            run = [*command, f"--run.name=colocate-{colocate}", f"--actors.colocate={colocate}"]
            found = measure(run, folder / f"colocate-{colocate}.log")
            peaks.append(found)
            parts = ", ".join(
                f"{process} {size / 1e6:.0f}"
                for process, size in sorted(found.at_peak.items(), key=lambda item: -item[1])
            )
            print(
                f"{name:14} PSS {found.pss / 1e6:6.0f} MB  RSS {found.rss / 1e6:6.0f} MB  "
                f"{found.seconds:5.1f} s  ({parts})",
                flush=True,
            )

    two, one = peaks
    print(f"colocated / two processes: PSS {one.pss / two.pss:.2f}, RSS {one.rss / two.rss:.2f}")


if __name__ == "__main__":
    main()
