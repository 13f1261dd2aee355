"""Programs read every key that they take: reads of settings are recorded.

That they read no others follows from their Structs, which have no others.
"""

import json
from argparse import Namespace
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import anyio
import pytest

import launch.cli.command_line
import launch.processes.collect
import launch.run_folder.create
import learner.build.grpo_run
import learner.build.offline
import learner.build.online
import learner.build.recover
import learner.objectives.base
from launch.cli.command_line import read_command_line
from launch.pairs import build, read
from launch.processes.collect import Writer, collect
from launch.processes.placement import colocates
from launch.processes.specs import actor_specs, learner_spec, reward_services
from launch.processes.start import Lifeline
from learner.build.offline import assemble_offline
from learner.build.online import OnlineAddresses, assemble_online
from learner.data.prompts import Prompt
from learner.online.experience import PromptGroup, TrainBatch
from learner.online.source import OnlineSource
from protocol.config.fields import Section, leaf_fields
from protocol.config.settings import (
    PROGRAMS,
    GrpoRun,
    ModelSettings,
    PairsRun,
    PreferenceRun,
    SftRun,
    builtins,
)
from protocol.model.policy import load_policy
from tests.protocol.builders import a_completion, a_group, a_reward
from tests.tiny import write_model_folder

HELD_OUT = ["--data.eval_rows=2", "--eval.generate=true", "--eval.max_completion_length=2"]
STREAM = ["--data.streaming=true", "--train.max_steps=2", "--eval.at_start=false"]
PREFERENCES = [
    [*HELD_OUT, "--objective.loss_type=robust,discopop", "--objective.loss_weights=1,1",
     "--objective.label_smoothing=0.1", "--objective.f_divergence_type=alpha_divergence"],
    [*STREAM, "--objective.method=simpo"],
    ["--objective.method=kto"],
]  # fmt: skip
GRPO = [
    ["--objective.beta=0.1", "--objective.entropy_coef=0.1", "--objective.top_entropy_quantile=0.5",
     "--objective.off_policy_mask_threshold=0.1", "--objective.old_logprobs=recompute",
     "--objective.importance_sampling_correction=true"],
    ["--objective.loss_type=sapo", "--train.max_steps=1"],
    ["--objective.loss_type=vespo", "--train.max_steps=1"],
]  # fmt: skip
# Read for data from a hub, of which there is none here; and, as a flag, by the command line.
ELSEWHERE = {"data.name", "run.resume"}


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

    def whole(self, section: Section) -> dict[str, Any]:
        return {name: getattr(section, name) for name in section.__struct_fields__}

    def unread(self, cls: type[Section]) -> set[str]:
        # The model of pairs is loaded as a section derived from theirs.
        seen = {(base, name) for owner, name in self.seen for base in owner.__mro__}
        return {
            path
            for path, field in leaf_fields(cls).items()
            if (field.owner, path.rpartition(".")[2]) not in seen
        }


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    for cls in PROGRAMS:  # kept from now on; their making reads every default
        leaf_fields(cls)
    for module, name in (
        (launch.cli.command_line, "load"),  # checks read everything
        (launch.run_folder.create, "to_toml"),
        (launch.cli.command_line, "resolve_paths"),
        (learner.build.offline, "load"),
        (launch.cli.command_line, "require_files"),
        (learner.objectives.base, "check_preference"),
        (learner.build.grpo_run, "load"),
        (learner.build.grpo_run, "idle"),
        (learner.build.recover, "builtins"),  # for a digest of what is trained
        (learner.build.offline, "idle"),
        (launch.processes.collect, "load"),
    ):
        monkeypatch.setattr(module, name, made.unseen(getattr(module, name)))
    # What is sent as a whole is read by actors.
    monkeypatch.setattr(learner.build.online, "builtins", made.whole)
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
        run, folder = read_command_line(cls, [*common, "--train.batch_size=4", *flags], "")
        learner_spec(run, folder)
        trainer = assemble_offline(folder, kind).trainer
        while not trainer.done:
            trainer.advance(timeout_s=1.0)
    assert recorder.unread(cls) == ELSEWHERE


def test_grpo_reads_every_key_that_it_takes(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
):
    """A batch made by hand is trained on; the processes of the run are named but not started."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w5"}\n' * 3)
    common = [f"--model.path={write_model_folder(tmp_path / 'model')}", "--model.dtype=float32"]
    common += [f"--data.path={tmp_path / 'rows.jsonl'}", f"--run.dir={tmp_path / 'runs'}"]
    common += ["--rewards.functions=a.py:f", "--train.batch_size=1"]
    completions = [a_completion([5 + i, 7, 1], 0) for i in range(2)]
    group = a_group(completions, reward=a_reward([0.0, 1.0]))
    batch = TrainBatch([PromptGroup(Prompt(0, [5], {"prompt": "w5"}), group)], 0)
    monkeypatch.setattr(OnlineSource, "poll", lambda self, timeout_s: batch)
    monkeypatch.setattr(OnlineSource, "publish", lambda self, version: None)  # nothing is leased

    for number, flags in enumerate((*GRPO, STREAM)):
        run, folder = read_command_line(GrpoRun, [*common, f"--run.name=g{number}", *flags], "")
        reward_services(run, folder)
        actor_specs(run, folder, "ipc://x")
        learner_spec(run, folder)
        colocates(run, [])
        endpoint = f"ipc://{folder}/s"
        addresses = OnlineAddresses([endpoint], f"{endpoint}2", ["ipc://x"])
        with assemble_online(folder, addresses) as assembled:
            while not assembled.trainer.done:
                assembled.trainer.advance(timeout_s=1.0)
    assert recorder.unread(GrpoRun) == ELSEWHERE


def test_pairs_read_every_key_that_they_take_and_no_other(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
):
    """The collector is asked to stop before it leases; what an actor answers is made by hand."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w5", "answer": "w7"}\n' * 3)
    common = [f"--model.path={write_model_folder(tmp_path / 'model')}", "--model.dtype=float32"]
    common += [f"--data.path={tmp_path / 'rows.jsonl'}", f"--run.dir={tmp_path / 'runs'}"]
    lifeline = Lifeline(child=False)
    lifeline.request_stop()
    group = a_group([a_completion([5, 1]), a_completion([6, 1])])
    item = PromptGroup(Prompt(0, [5], {"prompt": "w5", "answer": "w7"}), group)
    functions = "--rewards.functions=a.py:f"
    for number, flags in enumerate((["--mode=given"], [*STREAM[:2], functions])):
        run, folder = read([*common, f"--run.name=p{number}", *flags])
        with monkeypatch.context() as patch:
            patch.setattr(anyio, "run", lambda _: 0)  # no process is started
            assert build(run, folder) == 0
        endpoint = f"ipc://{folder}/s"
        args = Namespace(run_dir=folder, endpoint=[endpoint], snapshots=f"{endpoint}2")
        args.rewards = ["ipc://x"]
        assert collect(args, lifeline) == "stopped"
        tokenizer = load_policy(ModelSettings(**builtins(run.model)), seed=0).tokenizer
        Writer(run, tokenizer, StringIO()).add(item)
    assert recorder.unread(PairsRun) == {"data.name"}
