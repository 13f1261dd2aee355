"""Time and GPU memory of a whole run of launch/grpo.py at Qwen3-0.6B's shape.

    python tests/benchmarks/run_gpu.py [--actors N] [--staleness K] [--rows N|auto] [--steps 25]
        [--set section.key=value …] [--shape tiny]

LoRA of rank 16, 8 prompts of about 111 tokens, 8 completions of 256 tokens each, random weights in
bfloat16; other settings are the program's defaults. The run is started as users start it. Means are
over `--steps` steps after `--warmup` others. GPU memory is what nvidia-smi reports for every GPU
together with the processes of the run, less what it reported before. Prints one line of JSON; the
run's own output goes to stderr.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from tests.benchmarks.shapes import SHAPES, Shape

ROOT = Path(__file__).parents[2]
QUERY = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
POLL_S = 0.3


def even_share(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Return the share of even token IDs in each completion: the run's reward."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@dataclass
class GpuMemory:
    """Watches the memory in use on every GPU, MiB, by polling nvidia-smi; without it, nothing."""

    before: dict[int, int] = field(default_factory=dict[int, int])
    most: dict[int, int] = field(default_factory=dict[int, int])
    most_together: int = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watch inside the context."""
        if shutil.which(QUERY[0]) is None:
            yield
            return

        self.before = used_memory()
        over = threading.Event()
        reader = threading.Thread(target=self._read, args=(over,))
        reader.start()
        try:
            yield
        finally:
            over.set()
            reader.join()

    def _read(self, over: threading.Event) -> None:
        while not over.wait(POLL_S):
            now = {index: used - self.before[index] for index, used in used_memory().items()}
            self.most = {index: max(self.most.get(index, 0), now[index]) for index in now}
            self.most_together = max(self.most_together, sum(now.values()))

    def figures(self) -> dict[str, Any]:
        """Return the peaks, in GB (1e9 bytes)."""
        if not self.before:
            return {}
        each = {str(index): round(used * 2**20 / 1e9, 2) for index, used in self.most.items()}
        return {
            "gpu_peak_gb": round(self.most_together * 2**20 / 1e9, 2),
            "gpu_peak_gb_each": each,
            "gpu_before_mib": self.before,
        }


def used_memory() -> dict[int, int]:
    """Return the memory in use on each GPU, MiB, by its index."""
    done = subprocess.run(QUERY, capture_output=True, text=True, check=True)
    pairs = (line.split(",") for line in done.stdout.splitlines())
    return {int(index): int(used) for index, used in pairs}


def recipe(options: argparse.Namespace, shape: Shape, folder: Path) -> list[str]:
    """Return the flags of launch/grpo.py: what the shape needs, and what was asked for."""
    values: dict[str, object] = {
        "run.dir": folder / "runs",
        "run.name": "bench",
        "model.path": folder / "model",
        "model.lora.rank": 16,
        "data.path": folder / "rows.jsonl",
        "rewards.functions": json.dumps([f"{Path(__file__).resolve()}:even_share"]),
        "sampling.num_generations": shape.group,
        "sampling.max_completion_length": shape.completion,
        "train.batch_size": shape.prompts,
        "train.max_steps": options.warmup + options.steps,
        "actors.count": options.actors,
    }
    if options.staleness is not None:
        values["queue.max_staleness"] = options.staleness
    if options.rows is not None:
        values["actors.max_concurrent_completions"] = options.rows
    values |= dict(text.split("=", 1) for text in options.set)
    return [f"--{key}={value}" for key, value in values.items()]


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Write the model, in a process of its own, whose GPU memory is then free again; the rows."""
    execute("tests/benchmarks/shapes.py", str(folder), "--shape", options.shape)
    # The program's defaults, rather than those of the embedded run.
    (folder / "recipe.toml").write_text("")


def start(options: argparse.Namespace, folder: Path) -> float:
    """Run launch/grpo.py to its end; return the Unix time at which it was started."""
    flags = recipe(options, SHAPES[options.shape], folder)
    began = time.time()
    execute("launch/grpo.py", str(folder / "recipe.toml"), *flags)
    return began


def execute(program: str, *arguments: str) -> None:
    """Run one of the repository's programs to its end; raises CalledProcessError if it fails."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(ROOT / program), *arguments]
    subprocess.run(command, stdout=sys.stderr, env=environment, check=True)


def measure(run: Path, began: float, warmup: int) -> dict[str, Any]:
    """Return the figures that the files of a run give; `began` is when it was started, Unix s."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    first, last, base = steps[0], steps[-1], steps[warmup - 1]
    measured = steps[warmup:]
    seconds = last["time_s"] - base["time_s"]
    sampled = last["actors/tokens_sampled"] - base["actors/tokens_sampled"]

    def mean(name: str) -> float:
        return round(fmean(line[name] for line in measured), 4)

    return {
        "steps": len(measured),
        "seconds_per_step": round(seconds / len(measured), 4),
        "update_s": mean("time/update_s"),
        "prepare_s": mean("time/prepare_s"),
        "publish_s": mean("time/publish_s"),
        "waiting_s": mean("time/waiting_s"),
        "waiting_share": round(sum(line["time/waiting_s"] for line in measured) / seconds, 3),
        "sampled_tokens_per_s": round(sampled / seconds, 1),
        "trained_tokens_per_s": round(sum(line["batch_tokens"] for line in measured) / seconds, 1),
        "mean_length": mean("completions/mean_length"),
        "reward_std": mean("reward_std"),
        "staleness_mean": mean("staleness/mean"),
        "first_step_s": round(first["train_finished_at"] - began, 2),
        "start_up": start_up(run),
        "first_update_s": round(first["time/update_s"], 2),
        "memory": {name: value for name, value in last.items() if "memory/" in name},
        # Before the first update, the policy is the one that sampled.
        "logp_difference_first": {
            name.rpartition("/")[2]: value
            for name, value in first.items()
            if name.startswith("sampling/sampling_logp_difference")
        },
    }


def start_up(run: Path) -> dict[str, dict[str, float]]:
    """Return each process's seconds to the first step, by part."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return {each["process"]: each["parts"] for each in events if each["event"] == "StartUp"}


def main() -> None:
    """Run once and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--staleness", type=int, help="queue.max_staleness")
    parser.add_argument("--rows", help="actors.max_concurrent_completions")
    parser.add_argument("--steps", type=int, default=25, help="that are measured")
    parser.add_argument("--warmup", type=int, default=5, help="steps before these")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to copy the run's files")
    options = parser.parse_args()
    if options.steps < 1 or options.warmup < 1:
        parser.error("--steps and --warmup must be at least 1")

    memory = GpuMemory()
    with tempfile.TemporaryDirectory(prefix="pippin-bench-") as name:
        folder = Path(name)
        run = folder / "runs" / "bench"
        prepare(options, folder)
        try:
            with memory.watch():
                began = start(options, folder)
            figures = measure(run, began, options.warmup)
        finally:
            if options.keep is not None and run.is_dir():
                keep(run, options.keep)
    asked = {key: getattr(options, key) for key in ("shape", "actors", "staleness", "rows", "set")}
    print(json.dumps({**asked, **figures, **memory.figures()}))


def keep(run: Path, target: Path) -> None:
    """Copy the run's records and logs, not its weights."""
    target.mkdir(parents=True, exist_ok=True)
    for path in [*run.glob("*.json*"), *run.glob("*.toml"), *run.glob("logs/*.log")]:
        if path.name != "rollouts.jsonl":
            shutil.copy(path, target)


if __name__ == "__main__":
    main()
