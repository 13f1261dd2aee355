"""How many groups the learner's I/O thread takes from N simulated actors, and how fast it answers.

    uv run python -m tests.benchmarks.swarm [--actors 10 100 1000] [--seconds 10] [--no-journal]

A real LearnerService, Coordinator and Ledger, with the journal, over ipc sockets; the actors
(`swarm_actors.py`) are one other process, and the trainer takes every batch at once and publishes.
Groups are 64 completions of 256 tokens: 0.14 MB. An actor has room for four, and the queue holds
two tasks per actor, so that actors always wait for work. Per number of actors: groups per second
when every actor answers at once; the time from a group to its acknowledgement at half of that load;
CPU time of this process per heartbeat, while every actor holds a task. Before these, the time that
one group takes to be decoded, checked and journalled, and the bytes that the journal has per token.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from learner.data.epochs import ListEpochs
from learner.data.filter import Report
from learner.data.prompts import Prompt, PromptSource
from learner.data.sets import Sets
from learner.ledger.journal import JournalWriter, segments
from learner.ledger.ledger import Ledger
from learner.ledger.types import LedgerSettings
from learner.online.commands import Command, EndRun, PublishPolicy, Reply, RequestBatch
from learner.online.coordinator import Coordinator
from learner.online.experience import TrainBatch
from learner.online.service import LearnerService
from learner.online.tasks import group_fault
from protocol.config.settings import DataSettings
from protocol.messages import wire
from protocol.messages.messages import Group, Policy, TaskKind
from protocol.messages.parts import Sampling
from protocol.transport.bridge import Bridge, BridgeClosed
from tests.benchmarks.swarm_actors import GENERATIONS, TOKENS, VOCAB, Measured, Phase
from tests.learner.small_run import IDENTITY
from tests.protocol.builders import a_completion, a_group, a_welcome

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0  # for one answer of the actors' process
FILES = 16_384


def coordinator(actors: int) -> Coordinator:
    """Make the coordinator of a run without end."""
    limits = LedgerSettings(
        batch_size=max(16, actors), max_staleness=1, num_generations=GENERATIONS, total_batches=None
    )
    rng = np.random.default_rng(0)
    rows = [
        Prompt(i, rng.integers(0, VOCAB, 128).tolist(), {"prompt": f"{i} + {i} =", "answer": 2 * i})
        for i in range(1024)
    ]
    epochs = ListEpochs(rows, DataSettings(order="sequential"), seed=0, batch_size=1)
    prompts = PromptSource(Sets(epochs, [], Report("rows")), None)
    sampling = Sampling(num_generations=GENERATIONS, max_completion_length=TOKENS)
    kinds: dict[TaskKind, Sampling] = {"train": sampling, "eval": sampling}
    welcome = a_welcome("L1", model_digest="m", tokenizer_digest="m")
    return Coordinator(Ledger.new(limits, "r", "L1"), prompts, [], welcome, kinds, vocab_size=VOCAB)


class FakeTrainer(threading.Thread):
    """Takes every batch at once, and publishes the next version."""

    def __init__(self, bridge: Bridge[Command, Reply]) -> None:
        super().__init__(daemon=True)
        self._bridge = bridge
        self.groups = 0
        self.ended = threading.Event()

    def run(self) -> None:
        version = 0
        try:
            self._publish(version)
            while not self.ended.is_set():
                self._bridge.put(RequestBatch())
                while not isinstance(reply := self._bridge.get(0.5), TrainBatch):
                    if self.ended.is_set():
                        return
                self.groups += len(reply.groups)
                version += 1
                self._publish(version)
        except BridgeClosed:
            return

    def _publish(self, version: int) -> None:
        self._bridge.put(
            PublishPolicy(Policy(version=version, digest=f"d{version}", size=0), None, b"")
        )


class ActorProcess:
    """The process of the simulated actors."""

    def __init__(self, endpoint: str, actors: int) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.swarm_actors", endpoint, str(actors)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._line()

    def measure(self, phase: Phase) -> Measured:
        """Have the actors do what a phase says."""
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(phase).decode() + "\n")
        self.process.stdin.flush()
        return msgspec.json.decode(self._line(), type=Measured)

    def _line(self) -> str:
        assert self.process.stdout is not None
        timer = threading.Timer(LIMIT_S, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            raise SystemExit("the actors' process ended, or did not answer in time")
        return line

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def learner(actors: int, folder: Path, *, journal: bool) -> Iterator[str]:
    """Serve a run in this process; give the endpoint for its actors."""
    endpoint = f"ipc://{folder}/actors"
    bridge = Bridge[Command, Reply]()
    service = LearnerService(
        coordinator(actors),
        [endpoint],
        f"ipc://{folder}/snapshots",
        bridge,
        journal=JournalWriter(folder / "journal", IDENTITY, 0) if journal else None,
    )
    trainer = FakeTrainer(bridge)
    bridge.start(lambda _: service.run())
    trainer.start()
    try:
        yield endpoint
    finally:
        trainer.ended.set()
        trainer.join()
        bridge.put(EndRun("measured"))
        bridge.close()


def measure(actors: int, seconds: float, *, journal: bool) -> str:
    """Return a row of the table."""
    with (
        tempfile.TemporaryDirectory(prefix="swarm-", dir="/tmp") as name,
        learner(actors, Path(name), journal=journal) as endpoint,
    ):
        swarm = ActorProcess(endpoint, actors)
        try:
            return _phases(swarm, actors, seconds)
        finally:
            swarm.end()


def cost_of_a_group() -> str:
    """Say how long a group takes to be decoded and checked."""
    sampling = Sampling(num_generations=GENERATIONS, max_completion_length=TOKENS)
    group = a_group([a_completion(range(TOKENS))] * GENERATIONS)
    data, digests = wire.encode(group), {3: "d3"}
    with tempfile.TemporaryDirectory(prefix="swarm-", dir="/tmp") as name:
        return _cost(group, data, sampling, digests, Path(name))


def _cost(
    group: Group, data: bytes, sampling: Sampling, digests: dict[int, str], folder: Path
) -> str:
    journal = JournalWriter(folder, IDENTITY, 0)
    work: dict[str, Callable[[], object]] = {
        "decoded": lambda: wire.decode_actor(data),
        "checked": lambda: group_fault(group, sampling, VOCAB, digests, None),
        "journalled": lambda: journal.append([group]),
    }
    parts = ", ".join(f"{name} in {_best_us(each):.0f} µs" for name, each in work.items())
    journal.close()
    size = sum(path.stat().st_size for path in segments(folder)) / journal.number
    return (
        f"a group of {len(data) / 1e6:.2f} MB is {parts}; {size / (GENERATIONS * TOKENS):.2f} "
        "bytes per token"
    )


def _best_us(work: Callable[[], object]) -> float:
    return min(timeit.repeat(work, number=50, repeat=10)) / 50 * 1e6


def _phases(swarm: ActorProcess, actors: int, seconds: float) -> str:
    swarm.measure(Phase(seconds=2.0, rate=None))  # to warm up
    full = swarm.measure(Phase(seconds=seconds, rate=None))
    rate = len(full.waits_s) / full.elapsed_s

    swarm.measure(Phase(seconds=2.0, rate=rate / 2))
    half = swarm.measure(Phase(seconds=seconds, rate=rate / 2))
    median, worst = (float(np.quantile(half.waits_s or [np.nan], q)) for q in (0.5, 0.99))

    swarm.measure(Phase(seconds=2.0))
    began = time.process_time()
    beats = swarm.measure(Phase(heartbeats=max(20_000, 100 * actors)))
    per_beat = (time.process_time() - began) / beats.heartbeats
    return (
        f"{actors:6} | {rate:8.0f} | {len(half.waits_s) / half.elapsed_s:8.0f} | "
        f"{median * 1e3:8.1f} | {worst * 1e3:8.1f} | {per_beat * 1e6:8.0f}"
    )


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--actors", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase")
    parser.add_argument("--no-journal", action="store_false", dest="journal")
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))

    print(cost_of_a_group())
    print("actors | groups/s | half load, groups/s | ack p50, ms | p99, ms | µs per heartbeat")
    for actors in args.actors:
        print(measure(actors, args.seconds, journal=args.journal), flush=True)


if __name__ == "__main__":
    main()
