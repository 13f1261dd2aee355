"""SFT, then DPO from its adapter: the reference of a run, of its resume, of a swapped file."""

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest

from launch.cli.command_line import read_command_line
from learner.build.offline import assemble_offline
from learner.objectives.preference import PreferenceObjective
from protocol.config.settings import ModelSettings, PreferenceRun, SftRun
from protocol.errors import CheckpointError
from protocol.model.policy import load_policy
from protocol.model.snapshots import tensors_digest, trainable
from tests.tiny import tensors, write_model_folder

KINDS = ["lora", "dora"]


class Bench:
    """A model, an SFT run that left an adapter, and pairs for DPO runs that start from it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.model = write_model_folder(folder / "model")
        sequences = [{"text": f"w{2 + i} w{9 + i} w{30 - i}"} for i in range(8)]
        pairs = [
            {"prompt": f"w{2 + i} w7", "chosen": f" w{9 + i}", "rejected": f" w{20 + i} w3"}
            for i in range(8)
        ]
        for name, rows in (("sft", sequences), ("dpo", pairs)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text)
        run = self.run(SftRun, "sft", *self.flags("sft"), "--train.max_steps=3")
        finish(run)
        run.complete()
        self.adapter = run.folder / "adapters"

    def flags(self, name):
        return [
            f"--run.dir={self.folder / 'runs'}",
            f"--run.name={name}-{sum(1 for _ in self.folder.glob('runs/*'))}",
            f"--model.path={self.model}",
            f"--model.fine_tune_type={self.kind}",
            "--model.lora.rank=4",
            "--model.dtype=float32",
            f"--data.path={self.folder / name}.jsonl",
            "--optimizer.learning_rate=1e-2",
            "--train.batch_size=4",
            "--train.micro_batch_size=2",
        ]

    def run(self, cls, kind, *flags):
        _, folder = read_command_line(cls, list(flags), "")
        return assemble_offline(folder, kind)

    def dpo(self, *flags, adapter=True):
        start = [f"--model.adapter_path={self.adapter}"] if adapter else []
        flags = [*self.flags("dpo"), "--train.max_steps=4", *start, *flags]
        return self.run(PreferenceRun, "preference", *flags)

    def resume(self, folder):
        return self.run(PreferenceRun, "preference", f"--run.resume={folder}")


@pytest.fixture(scope="module", params=KINDS)
def bench(request, tmp_path_factory):
    return Bench(tmp_path_factory.mktemp(request.param), request.param)


def finish(run):
    while not run.trainer.done:
        run.trainer.advance()


def losses(run):
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def reference_of(run):
    objective = run.trainer.objective
    assert isinstance(objective, PreferenceObjective)
    assert objective.reference is not None
    return objective.reference


def logits(model):
    return model(mx.array([[2, 7, 9, 20, 3]]))


def sft_model(bench):
    """Load the SFT adapter on its base as a run that starts from it does."""
    settings = ModelSettings(
        path=str(bench.model),
        fine_tune_type=bench.kind,
        adapter_path=str(bench.adapter),
        dtype="float32",
    )
    return load_policy(settings, seed=0).model


@pytest.mark.parametrize("bits", [0, 4])
def test_dpo_of_an_untrained_adapter_begins_at_log_two(bench, bits):
    quantised = [f"--model.quantize_bits={bits}", "--model.quantize_group_size=32"]
    run = bench.dpo(*quantised, adapter=False)
    finish(run)
    first, *_, last = losses(run)
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert last < first - 1e-3


def test_dpo_from_an_sft_adapter_begins_at_log_two_with_initial_and_not_with_base(bench):
    begin = {}
    for reference in ("initial", "base"):
        run = bench.dpo(f"--model.reference={reference}")
        finish(run)
        begin[reference] = losses(run)[0]
    assert begin["initial"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(begin["base"] - math.log(2)) > 1e-3


def test_a_resumed_run_has_the_reference_that_it_began_with(bench):
    straight = bench.dpo()
    digest = tensors_digest(tensors(reference_of(straight)))
    assert mx.array_equal(logits(reference_of(straight)), logits(sft_model(bench)))
    finish(straight)

    stopped = bench.dpo()
    for _ in range(2):
        stopped.trainer.advance()
    stopped.trainer.stopping = True
    finish(stopped)
    resumed = bench.resume(stopped.folder)
    assert resumed.trainer.step == 2
    policy, reference = resumed.policy.model, reference_of(resumed)
    assert not mx.array_equal(logits(policy), logits(reference))
    assert tensors_digest(tensors(reference)) == digest
    assert mx.array_equal(logits(reference), logits(sft_model(bench)))
    finish(resumed)
    assert tensors_digest(tensors(reference)) == digest
    assert losses(resumed) == losses(straight)
    ours, theirs = trainable(policy), trainable(straight.policy.model)
    assert all(mx.array_equal(array, theirs[name]) for name, array in ours.items())


def test_a_resume_is_refused_where_the_adapter_file_was_swapped(bench):
    run = bench.dpo("--train.max_steps=1")
    finish(run)
    file = bench.adapter / "adapters.safetensors"
    original = file.read_bytes()
    mx.save_safetensors(str(file), dict(trainable(run.policy.model)))
    try:
        with pytest.raises(CheckpointError, match="made with reference_digest") as refused:
            bench.resume(run.folder)
    finally:
        file.write_bytes(original)
    assert "reference that the run began with" in str(refused.value)
    assert bench.resume(run.folder).trainer.step == 1  # its own file again


def test_the_memory_of_a_step_is_estimated_before_the_first(bench, caplog, monkeypatch):
    monkeypatch.setattr("learner.model.memory.device_memory", lambda: 1024)
    bench.dpo("--train.max_steps=1")
    assert "A step needs about" in caplog.text


@pytest.mark.parametrize("change", ['dtype = "bfloat16"', "quantize_bits = 4"])
def test_a_resume_in_another_precision_is_refused(bench, change):
    run = bench.dpo("--train.max_steps=1", "--model.quantize_group_size=32")
    finish(run)
    config = run.folder / "config.toml"
    key = change.split()[0]
    lines = [change if x.startswith(f"{key} =") else x for x in config.read_text().splitlines()]
    assert change in lines
    config.write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match=r"made with (model|reference)_digest"):
        bench.resume(run.folder)


def test_a_resume_with_another_reference_is_refused(bench):
    run = bench.dpo("--train.max_steps=1")
    finish(run)
    config = run.folder / "config.toml"
    text = config.read_text()
    assert 'reference = "initial"' in text
    config.write_text(text.replace('reference = "initial"', 'reference = "base"'))
    with pytest.raises(CheckpointError, match="made with reference_digest"):
        bench.resume(run.folder)
