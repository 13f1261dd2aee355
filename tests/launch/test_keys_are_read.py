"""Offline programs read every key that they take, and no other: reads of settings are recorded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import launch.assemble_offline
import launch.cli
from launch.assemble_offline import assemble_offline
from launch.cli import read_command_line
from protocol.fields import leaf_fields
from protocol.settings import PreferenceRun, Section, SftRun
from protocol.unread import readers
from tests.tiny import write_model_folder

HELD_OUT = ["--data.eval_rows=2", "--eval.generate=true", "--eval.max_completion_length=2"]
STREAM = ["--data.streaming=true", "--train.max_steps=2", "--eval.at_start=false"]
PREFERENCES = [
    [*HELD_OUT, "--objective.loss_type=robust,discopop", "--objective.loss_weights=1,1",
     "--objective.label_smoothing=0.1", "--objective.f_divergence_type=alpha_divergence"],
    [*STREAM, "--objective.method=simpo"],
    ["--objective.method=kto"],
]  # fmt: skip
# Read for data from a hub, of which there is none here.
ELSEWHERE = {"data.name"}


class Recorder:
    """Notes which keys of which section are read, but for what `unseen` wraps."""

    def __init__(self) -> None:
        self.seen: set[tuple[type, str]] = set()
        self.paused = 0

    def read(self, section: Section, name: str) -> Any:
        if not self.paused:
            self.seen.add((type(section), name))
        return object.__getattribute__(section, name)

    def unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.paused += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.paused -= 1

        return wrapped


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    for module, name in (
        (launch.cli, "load"),  # checks read everything
        (launch.cli, "to_toml"),
        (launch.cli, "resolve_paths"),
        (launch.assemble_offline, "load"),
        (launch.assemble_offline, "unread"),
    ):
        monkeypatch.setattr(module, name, made.unseen(getattr(module, name)))
    monkeypatch.setattr(Section, "__getattribute__", lambda self, name: made.read(self, name))
    return made


@pytest.mark.parametrize(
    ("cls", "kind", "runs"),
    [(SftRun, "sft", [HELD_OUT, STREAM]), (PreferenceRun, "preference", PREFERENCES)],
)
def test_every_key_that_is_taken_is_read_and_no_other(
    tmp_path: Path, recorder: Recorder, cls: Any, kind: str, runs: Any
):
    rows = [
        {"prompt": f"w{2 + i} w7", "chosen": f" w{9 + i}", "rejected": f" w{20 + i} w3"}
        for i in range(6)
    ]
    if kind == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = write_model_folder(tmp_path / "model")
    for number, flags in enumerate(runs):
        common = [f"--model.path={model}", "--model.dtype=float32", f"--run.name=r{number}"]
        common += [f"--data.path={tmp_path / 'rows.jsonl'}", f"--run.dir={tmp_path / 'runs'}"]
        _, folder = read_command_line(cls, [*common, "--train.batch_size=4", *flags], "")
        trainer = assemble_offline(folder, kind).trainer
        while not trainer.done:
            trainer.advance(timeout_s=1.0)
    refused = {field.path for field in leaf_fields(cls) if readers(cls, field.path)}
    read = {field.path for field in leaf_fields(cls) if (field.owner, field.name) in recorder.seen}
    unread = {field.path for field in leaf_fields(cls)} - read
    assert unread == refused | ELSEWHERE
