"""Runs with precomputed reference log-probs: the same bits, stored once, never stale."""

import gc
import itertools
import json
import logging
import weakref

import mlx.core as mx
import pytest

from launch.cli.command_line import read_command_line
from learner.build import offline as assembly
from protocol.config.settings import PreferenceRun
from protocol.errors import ConfigError
from protocol.model.snapshots import trainable
from tests.tiny import write_model_folder

PRECOMPUTE = "--objective.precompute_ref_log_probs=true"
TIMES = ("time", "_at", "share", "step_time", "memory")


class Bench:
    """A model and a dataset of ragged rows; makes runs that cache under `cache`."""

    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"
        self.model = write_model_folder(folder / "model")
        self.rows = [
            {"prompt": "w2 " * (1 + i % 5), "chosen": f"w{9 + i} " * (1 + i % 7),
             "rejected": f"w{30 + i} w3 " * (1 + i % 4)}
            for i in range(14)
        ]  # fmt: skip
        self.judged = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 > 0}
            for i, row in enumerate(self.rows)
        ]

    def run(self, *flags, rows=None, stopped=lambda: False):
        path = self.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows or self.rows))
        shared = [
            f"--run.dir={self.folder / 'runs'}",
            f"--run.name=run-{sum(1 for _ in self.folder.glob('runs/*'))}",
            f"--model.path={self.model}",
            "--model.lora.rank=4",
            "--model.dtype=float32",
            f"--data.path={path}",
            "--data.eval_rows=3",
            "--optimizer.learning_rate=1e-2",
            "--train.batch_size=4",
            "--train.num_train_epochs=2",
            "--train.length_bucket=4",
        ]
        _, folder = read_command_line(PreferenceRun, [*shared, *flags], "")
        return assembly.assemble_offline(folder, "preference", stopped)

    def finished(self, *flags, rows=None):
        run = self.run(*flags, rows=rows)
        finish(run)
        return run

    def stored(self):
        return sorted(path.name for path in (self.cache / "pippin").glob("ref-logps-*"))


@pytest.fixture
def bench(tmp_path, monkeypatch, caplog):
    from datasets import config

    made = Bench(tmp_path)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", made.cache)
    caplog.set_level(logging.INFO)
    return made


def finish(run):
    while not run.trainer.done:
        run.trainer.advance()


def metrics(run):
    """Return every line of the run's metrics but those of clocks and memory."""
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in line.items() if not any(part in name for part in TIMES)}
        for line in lines
    ]


def same_tensors(one, other):
    ours, theirs = trainable(one.policy.model), trainable(other.policy.model)
    return all(mx.array_equal(array, theirs[name]).item() for name, array in ours.items())


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--train.head=full"],
        ["--model.fine_tune_type=full", "--optimizer.learning_rate=1e-3"],
        ["--train.micro_batch_size=3", "--data.order=sequential"],
        ["--train.micro_batch_size=2", "--train.num_train_epochs=1"],
        ['--objective.loss_type=["aot", "ipo"]', "--train.num_train_epochs=1"],
        ["--objective.use_weighting=true", "--objective.ld_alpha=0.5"],
    ],
    ids=["lora", "full head", "full", "sequential", "one epoch", "whole batch", "weighted"],
)
def test_metrics_and_tensors_are_bit_for_bit_those_of_the_step_without(bench, flags, caplog):
    plain = bench.finished(*flags)
    computed = bench.finished(*flags, PRECOMPUTE)
    assert len(bench.stored()) == 2  # training and held-out rows
    read = bench.finished(*flags, PRECOMPUTE)
    assert len(bench.stored()) == 2
    assert caplog.text.count("reference log-probs of 22 completions: computed in") == 1
    assert caplog.text.count("reference log-probs of 22 completions: read from") == 1
    assert len(metrics(plain)) > 3
    assert metrics(plain) == metrics(computed) == metrics(read)
    assert same_tensors(plain, computed)
    assert same_tensors(plain, read)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_ktos_mismatched_answers_are_precomputed_too(bench, loss, micro):
    flags = [
        "--objective.method=kto",
        f'--objective.loss_type=["{loss}"]',
        f"--train.micro_batch_size={micro}",
        "--data.order=sequential",
    ]
    plain = bench.finished(*flags, rows=bench.judged)
    precomputed = bench.finished(*flags, PRECOMPUTE, rows=bench.judged)
    if loss == "kto":
        assert any(line.get("kl", 0.0) > 0 for line in metrics(plain))
    assert metrics(plain) == metrics(precomputed)
    assert same_tensors(plain, precomputed)


def test_micro_batches_of_later_shuffled_epochs_differ_by_rounding_only(bench):
    flags = ["--train.micro_batch_size=2", "--eval.at_start=false"]
    plain, precomputed = (metrics(bench.finished(*flags, *more)) for more in ([], [PRECOMPUTE]))
    assert plain[:3] == precomputed[:3]  # the first epoch
    for one, other in zip(plain[3:], precomputed[3:], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_another_seed_finds_the_same_numbers(bench, caplog):
    bench.run(PRECOMPUTE)
    bench.run(PRECOMPUTE, "--run.seed=7", "--data.order=length_grouped")
    assert caplog.text.count("read from") == 2
    assert len(bench.stored()) == 2


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_reference_is_let_go_before_the_first_step(bench, monkeypatch, kind):
    made = []

    def remembering(policy, settings):
        reference = assembly_make(policy, settings)
        made.append(weakref.ref(reference.model))
        return reference

    assembly_make = assembly.make_reference
    monkeypatch.setattr(assembly, "make_reference", remembering)
    kept = bench.run(f"--model.fine_tune_type={kind}")
    freed = bench.run(f"--model.fine_tune_type={kind}", PRECOMPUTE)
    gc.collect()
    assert made[0]() is not None
    assert made[1]() is None
    assert (kept.trainer.objective.reference is None, freed.trainer.objective.reference) == (
        False,
        None,
    )


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_goes_on_with_the_same_bits(bench, caplog, kind):
    flags = [f"--model.fine_tune_type={kind}", "--train.micro_batch_size=1"]
    straight = bench.finished(*flags)
    stopped = bench.run(*flags, PRECOMPUTE)
    for _ in range(2):
        stopped.trainer.advance()
    stopped.trainer.stopping = True
    finish(stopped)
    for lost in ([], bench.stored()):  # with and without the stored numbers
        for name in lost:
            (bench.cache / "pippin" / name).unlink()
        caplog.clear()
        folder = read_command_line(PreferenceRun, [f"--run.resume={stopped.folder}"], "")[1]
        resumed = assembly.assemble_offline(folder, "preference")
        assert resumed.trainer.step == 2
        assert ("computed in" if lost else "read from") in caplog.text
        if lost:
            finish(resumed)
            assert metrics(resumed) == metrics(straight)
            assert same_tensors(resumed, straight)


@pytest.mark.parametrize(
    ("asked", "said", "stored"),
    [(2, "stopped after 2 of 6 micro-batches", 0), (7, "stopped after 1 of 2 micro-batches", 1)],
    ids=["training rows", "held-out rows"],
)
def test_a_stop_while_computing_saves_and_a_resumed_run_computes_anew(
    bench, caplog, asked, said, stored
):
    # 11 rows in batches of 4, 4 and 3, by two; 3 held-out rows in two batches
    flags = [PRECOMPUTE, "--train.micro_batch_size=2", "--eval.batch_size=2"]
    flags += ["--data.order=sequential"]
    straight = bench.finished(*flags)
    for name in bench.stored():
        (bench.cache / "pippin" / name).unlink()
    caplog.clear()
    calls = itertools.count()
    run = bench.run(*flags, stopped=lambda: next(calls) >= asked)
    finish(run)
    assert said in caplog.text
    assert "evaluating" not in caplog.text
    assert (run.trainer.step, len(bench.stored())) == (0, stored)
    assert next(calls) == asked + 2  # once while it computed, once before training
    folder = read_command_line(PreferenceRun, [f"--run.resume={run.folder}"], "")[1]
    resumed = assembly.assemble_offline(folder, "preference")
    finish(resumed)
    assert len(bench.stored()) == 2
    assert metrics(resumed) == metrics(straight)
    assert same_tensors(resumed, straight)


def test_a_changed_reference_dataset_or_file_is_computed_again(bench, caplog):
    bench.run(PRECOMPUTE)
    first = bench.stored()
    other = write_model_folder(bench.folder / "other", seed=3)
    bench.run(PRECOMPUTE, f"--model.reference={other}")
    assert len(bench.stored()) == 4
    changed = [{**row, "chosen": row["chosen"] + "w8"} for row in bench.rows]
    bench.run(PRECOMPUTE, rows=changed)
    assert len(bench.stored()) == 6
    bench.run(PRECOMPUTE, "--train.head=full")
    assert len(bench.stored()) == 8
    assert "read from" not in caplog.text
    files = [bench.cache / "pippin" / name for name in first]
    whole = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(file.read_bytes()[:-4])
    bench.run(PRECOMPUTE)
    assert caplog.text.count("computed again") == 2
    assert [file.read_bytes() for file in files] == whole
    assert "read from" not in caplog.text


def test_a_cache_that_cannot_be_written_is_reported_and_training_goes_on(bench, caplog):
    bench.cache.write_text("a file where the folder should be")
    run = bench.finished(PRECOMPUTE)
    assert run.trainer.step == 6
    assert caplog.text.count("HF_DATASETS_CACHE names another folder") == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data.streaming=true", "--train.max_steps=2"], "must be false with data.streaming"),
        (["--objective.reference_free=true"], "there is no reference"),
        (["--objective.method=orpo"], "is for objective.method = 'dpo' or 'kto' only"),
        (["--objective.method=kto"], 'data.order = "sequential"'),
    ],
)
def test_what_cannot_be_precomputed_is_refused_at_load(bench, flags, said):
    with pytest.raises(ConfigError, match=said) as refused:
        bench.run(PRECOMPUTE, *flags)
    assert "objective.precompute_ref_log_probs" in str(refused.value)
    assert not list(bench.folder.glob("runs/*"))
