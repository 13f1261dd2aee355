"""launch/replay.py on recorded runs: the same bits, the first difference, and what is refused."""

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from launch import grpo, replay
from learner.ledger.journal import Entry, JournalWriter, segments
from learner.ledger.journal_reader import JournalReader, read_header
from protocol.messages.arrays import floats_bytes, floats_view
from protocol.messages.messages import Group
from protocol.run_record import RunRecord, write_run
from tests.launch.processes.whole_runs import launched

STEPS, BATCH = 4, 4


def replayed(*arguments: str | Path | int) -> tuple[int, str]:
    """Run the program; return its exit status and its output."""
    command = [sys.executable, replay.__file__, *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a short asynchronous run with dropout, which counts too."""
    folder = tmp_path_factory.mktemp("replay")
    launched(
        *(f"--run.dir={folder}", "--run.name=r", "--run.deterministic=true", "--run.save_steps=2"),
        *(f"--train.max_steps={STEPS}", f"--train.batch_size={BATCH}", "--model.lora.dropout=0.1"),
        *("--train.micro_batch_size=2", "--data.eval_path=", "--eval.steps=0"),
    )
    return folder / "r"


def test_every_step_and_every_token_comes_out_the_same(recorded: Path):
    status, said = replayed(recorded, "--resample", STEPS)
    assert status == 0, said
    assert said.count("same weights, SHA-256") == STEPS + 1
    assert "all 5 published versions from step 0 on have the same weights" in said
    assert "100.0000% of" in said.splitlines()[-1]


def test_a_replay_may_begin_at_a_checkpoint(recorded: Path):
    status, said = replayed(recorded, "--from", 2)
    assert status == 0, said
    assert "all 2 published versions from step 2 on have the same weights" in said
    status, said = replayed(recorded, "--from", 3)
    assert status == 2
    assert "required a checkpoint of step 3; kept are step-000002, step-000004" in said


def copied(run: Path, target: Path) -> Path:
    """Copy what a replay reads of a run, but for its journal."""
    target.mkdir()
    for name in ("config.toml", "run.json"):
        (target / name).write_bytes((run / name).read_bytes())
    return target


def changed_in(entries: list[Entry], number: int) -> list[Entry]:
    """Change the reward of one completion in the group of a task."""
    found: list[Entry] = []
    for entry in entries:
        if isinstance(entry, Group) and entry.task.number == number:
            values = np.array(floats_view(entry.reward.rewards))
            values[0] = 1.0 - values[0]
            reward = msgspec.structs.replace(entry.reward, rewards=floats_bytes(values.tolist()))
            found.append(msgspec.structs.replace(entry, reward=reward))
        else:
            found.append(entry)
    return found


def test_the_first_step_and_tensor_that_differ_are_named(recorded: Path, tmp_path: Path):
    run = copied(recorded, tmp_path / "r")
    header = read_header(segments(recorded / "journal")[0])
    assert header is not None
    writer = JournalWriter(run / "journal", header.identity, 0)
    entries = [entry for _, entry in JournalReader(recorded / "journal")]
    writer.append(changed_in(entries, BATCH + 1))  # of the second batch
    writer.close()
    status, said = replayed(run)
    assert status == 1, said
    assert "step 2: the weights differ: tensor model.layers." in said
    assert said.endswith("before it, 2 published versions have the same weights\n")


def test_what_cannot_be_replayed_is_said(recorded: Path, tmp_path: Path):
    run = copied(recorded, tmp_path / "none")
    status, said = replayed(run)
    assert status == 2
    assert "JournalError: " in said
    assert "required a journal, found none" in said

    status, said = replayed(tmp_path)
    assert status == 2
    assert "required a run folder with run.json; found none" in said
    write_run(run, RunRecord(program="sft"))
    status, said = replayed(run)
    assert (status, "required a run of launch/grpo.py, got one of sft" in said) == (2, True)

    other = copied(recorded, tmp_path / "other")
    text = (other / "config.toml").read_text()
    (other / "config.toml").write_text(text.replace("adam_beta2 = 0.999", "adam_beta2 = 0.99"))
    (other / "journal").mkdir()
    for path in segments(recorded / "journal"):
        (other / "journal" / path.name).write_bytes(path.read_bytes())
    status, said = replayed(other)
    assert status == 2
    assert "since when the settings are those of config.toml; found neither" in said
    assert Path(grpo.__file__).with_name("replay.py").samefile(replay.__file__)
