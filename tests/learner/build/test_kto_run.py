"""KTO runs over pairs: both answers of each are trained on, and the weights' advice is given."""

import json

import pytest

from launch.cli.command_line import read_command_line
from learner.build.offline import assemble_offline
from protocol.config.settings import PreferenceRun
from tests.tiny import write_model_folder


def finished(folder, *flags):
    model = write_model_folder(folder / "model")
    rows = [
        {"prompt": f"w{2 + i} w7", "chosen": f" w{9 + i}", "rejected": f" w{20 + i} w3"}
        for i in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = [
        f"--run.dir={folder / 'runs'}",
        f"--model.path={model}",
        f"--data.path={folder / 'rows.jsonl'}",
        "--model.dtype=float32",
        "--objective.method=kto",
        "--optimizer.learning_rate=1e-2",
        "--train.batch_size=4",
        "--train.length_bucket=4",
    ]
    _, run_folder = read_command_line(PreferenceRun, [*shared, *flags], "")
    run = assemble_offline(run_folder, "preference")
    while not run.trainer.done:
        run.trainer.advance()
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def test_pairs_train_as_good_and_bad_answers(tmp_path, caplog):
    steps = finished(tmp_path, "--data.order=sequential", "--train.num_train_epochs=3")
    # 16 answers in batches of 4: two of good ones, then two of bad ones
    sides = [{name for name in line if name.startswith("rewards/")} for line in steps]
    assert sides == ([{"rewards/chosen"}] * 2 + [{"rewards/rejected"}] * 2) * 3
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-6)  # 1 - sigmoid(0)
    assert steps[8]["rewards/chosen"] > steps[1]["rewards/chosen"]
    assert "not balanced" not in caplog.text


def test_a_run_that_sees_good_answers_alone_is_told_so(tmp_path, caplog):
    finished(tmp_path, "--data.order=sequential", "--train.max_steps=2")
    assert "8 good and 0 bad answers are not balanced by their weights" in caplog.text
