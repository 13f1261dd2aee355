"""A run in bfloat16: its checkpoints hold the float32 masters, and a resume goes on bit for bit."""

import json

import mlx.core as mx
import numpy as np

from launch.cli.command_line import read_command_line
from learner.build.offline import assemble_offline
from learner.checkpoint import load_checkpoint
from protocol.config.settings import SftRun
from tests.tiny import write_model_folder


def assembled(*flags):
    return assemble_offline(read_command_line(SftRun, list(flags), "")[1], "sft")


def finish(run):
    while not run.trainer.done:
        run.trainer.advance()
    return load_checkpoint(run.folder / "checkpoints")


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(mx.array_equal(array, theirs[name]) for name, array in ours.items())


def test_checkpoints_keep_masters_and_a_resume_is_bit_exact(tmp_path):
    model = write_model_folder(tmp_path / "model")
    rows = [{"text": f"w{2 + i} w{9 + i} w{30 - i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        f"--run.dir={tmp_path / 'runs'}",
        f"--model.path={model}",
        "--model.fine_tune_type=full",
        "--model.dtype=bfloat16",
        f"--data.path={tmp_path / 'rows.jsonl'}",
        "--optimizer.learning_rate=1e-6",
        "--train.batch_size=2",
        "--train.micro_batch_size=1",
        "--train.max_steps=4",
    ]
    straight = finish(assembled(*flags, "--run.name=straight"))
    stopped = assembled(*flags, "--run.name=stopped")
    for _ in range(2):
        stopped.trainer.advance()
    stopped.trainer.stopping = True
    half = finish(stopped)
    masters = {
        name.removeprefix("master."): array
        for name, array in half.optimizer.items()
        if name.startswith("master.")
    }
    assert same(half.weights, {name: a.astype(mx.bfloat16) for name, a in masters.items()})
    # Two steps of 1e-6 are below what bfloat16 can tell: rounded masters would have lost them.
    begun = mx.load(str(model / "model.safetensors"))
    assert isinstance(begun, dict)
    name = "model.layers.0.mlp.down_proj.weight"
    moved = masters[name] - begun[name].astype(mx.bfloat16).astype(mx.float32)
    assert 1e-6 < np.abs(np.array(moved)).max() < 2.1e-6
    assert not mx.array_equal(masters[name], masters[name].astype(mx.bfloat16))

    resumed = assembled(f"--run.resume={stopped.folder}")
    assert resumed.trainer.step == 2
    last = finish(resumed)
    assert (last.step, straight.step) == (4, 4)
    assert same(last.weights, straight.weights)
    assert same(last.optimizer, straight.optimizer)
