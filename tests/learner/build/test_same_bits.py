"""Whole offline runs, assembled as the learner program does: same seed, same bits, also resumed.

Rows are counted from 0 in the file. Dropout is on, so that the random state counts too.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.build.offline import assemble_offline
from protocol.run_record import Program, RunRecord, write_run
from tests.tiny import write_model_folder

STEPS, ROWS, BATCH = 6, 10, 4
KINDS = ("preference", "sft")


@dataclass(frozen=True)
class Result:
    """What a run left: its adapter file, its losses, and the rows of its batches."""

    adapters: bytes
    losses: list[float]
    epochs: list[float]
    rows: list[list[int]]


@dataclass(frozen=True)
class Bench:
    """A model and a dataset on disk, and runs over them."""

    folder: Path
    kind: Program

    def run(
        self,
        name: str,
        *,
        seed: int = 42,
        order: str = "shuffled",
        stop_after: int | None = None,
        kill_after: int | None = None,
        resume: bool = False,
        dropout: float = 0.25,
    ) -> Result:
        """Assemble run `name` and take it to its end, stop it as Ctrl-C does, or leave it."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text(
            f"[run]\nseed = {seed}\nsave_steps = 2\n"
            f"resume = {json.dumps(str(folder) if resume else '')}\n"
            f"[model]\npath = {json.dumps(str(self.folder / 'model'))}\n"
            f"lora = {{rank = 4, dropout = {dropout}}}\n"
            f"[data]\npath = {json.dumps(str(self.folder / 'rows.jsonl'))}\norder = '{order}'\n"
            "[optimizer]\nlearning_rate = 1e-3\n"
            f"[train]\nbatch_size = {BATCH}\nmicro_batch_size = 2\nlength_bucket = 8\n"
            "num_train_epochs = 2\n"
        )
        if not resume:
            write_run(folder, RunRecord(program=self.kind))
        run = assemble_offline(folder, self.kind)
        rows: list[list[int]] = []
        prepare = run.trainer.objective.prepare

        def noted(batch: list[Any]) -> Any:
            rows.append([example.row for example in batch])
            return prepare(batch)

        run.trainer.objective.prepare = noted
        while not run.trainer.done and len(rows) != kill_after:
            run.trainer.stopping = len(rows) == stop_after
            run.trainer.advance()
        if kill_after is None:
            run.complete()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return Result(
            (folder / "adapters" / "adapters.safetensors").read_bytes()
            if run.trainer.done
            else b"",
            [line["loss"] for line in lines],
            [line["epoch"] for line in lines],
            rows,
        )


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    """Ten rows of unequal lengths."""
    write_model_folder(tmp_path / "model")
    rows: list[dict[str, str]] = []
    for row in range(ROWS):
        long = " ".join(f"w{2 + (row * 7 + i) % 60}" for i in range(2 + row))
        pair = {"prompt": f"w{row + 2} ", "chosen": long, "rejected": f"w{row + 20} w3"}
        rows.append(pair if request.param == "preference" else {"text": long})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Bench(tmp_path, request.param)


def test_a_seed_decides_every_bit_and_a_resume_changes_none(bench: Bench):
    first = bench.run("first")
    assert len(first.losses) == STEPS
    assert bench.run("again") == first

    other = bench.run("other", seed=43)
    assert other.rows != first.rows
    assert other.adapters != first.adapters

    undropped = bench.run("undropped", dropout=0.0)
    assert undropped.rows == first.rows
    assert undropped.adapters != first.adapters

    stopped = bench.run("stopped", stop_after=3)  # the fourth step begins the second epoch
    assert stopped.rows == first.rows[:3]
    assert stopped.adapters != first.adapters
    resumed = bench.run("stopped", resume=True)
    assert resumed.rows == first.rows[3:]
    assert resumed.losses == first.losses  # of both incarnations: one file
    assert resumed.adapters == first.adapters


def test_steps_that_a_killed_run_did_in_vain_are_recorded_once(bench: Bench):
    first = bench.run("first")
    killed = bench.run("killed", kill_after=5)  # saved at steps 2 and 4
    assert killed.losses == first.losses[:5]
    resumed = bench.run("killed", resume=True)
    assert resumed == dataclasses.replace(first, rows=first.rows[4:])
    undone = (bench.folder / "killed" / "metrics.undone.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in undone] == first.losses[4:5]


def test_sequential_follows_the_file_and_shuffled_epochs_differ(bench: Bench):
    epoch = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    sequential = bench.run("sequential", order="sequential")
    assert sequential.rows == epoch * 2
    assert sequential.epochs == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]
    assert bench.run("seed", order="sequential", seed=43).rows == epoch * 2
    bench.run("stopped", order="sequential", stop_after=2)
    resumed = bench.run("stopped", order="sequential", resume=True)
    assert resumed.rows == (epoch * 2)[2:]
    assert resumed.adapters == sequential.adapters

    shuffled = bench.run("shuffled").rows
    epochs = [np.concatenate(shuffled[at : at + 3]).tolist() for at in (0, 3)]
    assert [sorted(rows) for rows in epochs] == [list(range(ROWS))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(ROWS))
